import csv
import json
import os

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands.evaluate import run
from mambahome_jax.errors import ConfigError, DatasetError, OutputError
from mambahome_jax.evaluation import evaluate
from mambahome_jax.evaluation.pairs import find_names, reconcile_names
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.imaging.volume import Volume, write_volume
from tests.imaging.dicom_files import RTSTRUCT, write_slice
from tests.imaging.test_dicom_series import series


def write(path, label=1, shift=0, shape=(16, 14, 12)):
    array = np.zeros(shape, np.uint8)
    array[3 + shift : 9 + shift, 3:9, 3:9] = label
    write_volume(path, Volume(array, np.diag([1.0, 1.0, 2.0, 1.0])))


@pytest.fixture
def folders(tmp_path):
    """Two cases on both sides, the second prediction two voxels off, and names beside the references."""
    for case, shift in (("a", 0), ("b", 2)):
        write(tmp_path / "OUT" / "labels" / f"{case}.nii.gz")
        write(tmp_path / "PRED" / f"{case}.nii.gz", shift=shift)
    (tmp_path / "OUT" / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "spleen"}}))
    return tmp_path


def config(folder, **changes):
    paths = {"predictions": folder / "PRED", "references": folder / "OUT" / "labels", "output_dir": folder / "EVAL"}
    return EvaluateConfig(**(paths | changes))


def summary_of(folder):
    return json.loads((folder / "EVAL" / "summary.json").read_text())


def test_all_cases(folders, capsys):
    assert run(config(folders)) == 0
    summary = summary_of(folders)
    assert summary["cases"] == 2
    assert summary["failures"] == []
    assert summary["structures"]["liver"]["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["structures"]["spleen"]["dice"] is None
    assert summary["mean"]["dice"] == summary["structures"]["liver"]["dice"]
    assert summary["structures"]["liver"]["hd95"] == pytest.approx(1.0)
    with (folders / "EVAL" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"]) for row in rows] == [
        ("a", "liver"),
        ("a", "spleen"),
        ("b", "liver"),
        ("b", "spleen"),
    ]
    printed = capsys.readouterr().out
    assert "liver" in printed
    assert "0.833" in printed


def test_as_a_function_nothing_is_printed_and_all_is_returned(folders, capsys):
    write(folders / "PRED" / "c.nii.gz")
    found = mh.evaluate(
        predictions=str(folders / "PRED"), references=folders / "OUT/labels", output_dir=folders / "EVAL"
    )
    assert capsys.readouterr() == ("", "")
    assert found.summary["mean"]["dice"] == summary_of(folders)["mean"]["dice"]
    assert [(row.case, row.structure) for row in found.scores][:2] == [("a", "liver"), ("a", "spleen")]
    assert [case for case, _ in found.failures] == ["c"] and found.exit_code == 1
    assert all(path.is_file() for path in found.files) and len(found.files) == 2
    page = mh.report(evaluation=folders / "EVAL")
    assert page.path.stat().st_size > 1000 and page.shown == ("b", "a") and page.exit_code == 0
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="refs: there is no such keyword"):
        mh.evaluate(predictions="a", refs="b", output_dir="c")


def test_processes_give_the_same(folders, monkeypatch):
    assert run(config(folders)) == 0
    one = summary_of(folders)
    monkeypatch.setattr("mambahome_jax.evaluation.evaluate.SMALL_BYTES", 0)
    assert run(config(folders, num_workers=2)) == 0
    assert summary_of(folders) == one


def test_tolerance_reaches_nsd(folders):
    assert run(config(folders, tolerance_mm=2.0)) == 0
    assert summary_of(folders)["structures"]["liver"]["nsd"] == 1


def test_faulty_cases_are_reported_and_the_rest_is_scored(folders, capsys):
    write(folders / "PRED" / "only_prediction.nii.gz")
    write(folders / "OUT" / "labels" / "only_reference.nii.gz")
    write(folders / "OUT" / "labels" / "other_grid.nii.gz")
    write(folders / "PRED" / "other_grid.nii.gz", shape=(16, 14, 13))
    write(folders / "OUT" / "labels" / "truncated.nii.gz")
    whole = (folders / "PRED" / "a.nii.gz").read_bytes()
    (folders / "PRED" / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert run(config(folders)) == 1
    summary = summary_of(folders)
    assert summary["cases"] == 2
    reasons = {failure["case"]: failure["reason"] for failure in summary["failures"]}
    assert set(reasons) == {"only_prediction", "only_reference", "other_grid", "truncated"}
    assert "no reference" in reasons["only_prediction"]
    assert "no prediction" in reasons["only_reference"]
    assert "grid of 16 x 14 x 13 voxels" in reasons["other_grid"]
    assert "truncated" in reasons["truncated"]
    printed = capsys.readouterr().out
    assert all(f"Not scored: {case}" in printed for case in reasons)


def test_surface_reaches_the_distances(folders):
    assert run(config(folders)) == 0
    by_voxels = summary_of(folders)
    assert run(config(folders, surface="area")) == 0
    by_area = summary_of(folders)
    assert (by_voxels["surface"], by_area["surface"]) == ("voxels", "area")
    assert by_area["mean"]["dice"] == by_voxels["mean"]["dice"] and by_area["mean"]["nsd"] != by_voxels["mean"]["nsd"]
    assert "area" in by_area["definitions"]["hd95"] and "area" not in by_voxels["definitions"]["hd95"]


@pytest.mark.parametrize(
    ("name", "reason"), [("line\nbreak", "control characters"), (os.fsdecode(b"latin\xff"), "no UTF-8")]
)
def test_a_name_that_no_table_can_hold_is_reported_and_the_rest_is_scored(folders, name, reason):
    for folder in ("PRED", "OUT/labels"):
        write(folders / folder / f"{name}.nii.gz")
    assert run(config(folders)) == 1
    [failure] = summary_of(folders)["failures"]
    assert failure["case"] == repr(name)[1:-1] and reason in failure["reason"]
    with (folders / "EVAL/metrics.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"a", "b"}


@pytest.mark.parametrize("entry", [{"id": "a", "labelled": 5}, {"labelled": [1]}, {"id": ["a"], "labelled": None}, 3])
def test_cases_of_a_damaged_table_count_as_labelled_throughout(folders, entry):
    table = json.loads((folders / "OUT/dataset.json").read_text()) | {"cases": [entry]}
    (folders / "OUT/dataset.json").write_text(json.dumps(table))
    assert run(config(folders)) == 0


def test_nothing_could_be_scored(folders):
    for file in (folders / "PRED").iterdir():
        file.write_bytes(b"no scan")
    assert run(config(folders)) == 2


def test_two_files(folders):
    result = run(
        config(folders, predictions=folders / "PRED" / "b.nii.gz", references=folders / "OUT" / "labels" / "a.nii.gz")
    )
    assert result == 0
    assert summary_of(folders)["cases"] == 1


def test_where_names_come_from(folders):
    predictions, references = folders / "PRED", folders / "OUT" / "labels"
    (predictions / "run.json").write_text(json.dumps({"labels": {"1": "from_run"}}))
    assert find_names(predictions, references) == ({1: "liver", 2: "spleen"}, folders / "OUT" / "dataset.json")
    assert find_names(predictions, references, predictions / "run.json")[0] == {1: "from_run"}
    (folders / "OUT" / "dataset.json").unlink()
    assert find_names(predictions, references)[0] == {1: "from_run"}
    (predictions / "run.json").unlink()
    assert find_names(predictions, references) == ({}, None)
    assert run(config(folders)) == 0
    assert list(summary_of(folders)["structures"]) == ["label_1"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"predictions": "nowhere"}, DatasetError, "no such folder"),
        ({"references": "empty"}, DatasetError, r"no \.nii\.gz, \.nii, .* file"),
        ({"predictions": "others"}, DatasetError, "no file name is in both"),
        ({"labels": "nowhere.json"}, DatasetError, "no such file"),
        ({"tolerance_mm": -1.0}, ConfigError, "tolerance_mm"),
        ({"tolerance_mm": float("nan")}, ConfigError, "tolerance_mm"),
        ({"num_workers": -1}, ConfigError, "num_workers"),
    ],
)
def test_says_what_is_wrong(folders, changes, error, message):
    (folders / "empty").mkdir()
    write(folders / "others" / "x.nii.gz")
    paths = {key: folders / value if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        run(config(folders, **paths))


def test_values_of_another_table_are_compared_by_name(tmp_path, capsys):
    prediction = np.zeros((6, 6, 6), np.uint8)
    prediction[1:3], prediction[4:] = 1, 2
    write_volume(tmp_path / "pred/a.nii.gz", Volume(prediction, np.eye(4)))
    reference = np.select([prediction == 1, prediction == 2], [6, 4], 0)
    reference[0] = 9
    write_volume(tmp_path / "ref/labels/a.nii.gz", Volume(reference.astype(np.uint8), np.eye(4)))
    (tmp_path / "pred/run.json").write_text(json.dumps({"labels": {"1": "liver", "2": "gallbladder"}}))
    table = {"6": "liver", "4": "gall bladder", "9": "aorta"}
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": table}))
    config = EvaluateConfig(tmp_path / "pred", tmp_path / "ref/labels", tmp_path / "eval", num_workers=0)
    assert run(config) == 0
    found = json.loads((tmp_path / "eval/summary.json").read_text())
    assert {name: entry["dice"] for name, entry in found["structures"].items()} == {"liver": 1, "gallbladder": 1}
    assert "4 is 2 (gallbladder), 6 is 1 (liver)" in capsys.readouterr().out

    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": {"1": "pdac"}}))
    with pytest.raises(DatasetError, match=r"structures 1 pdac; expected some of: 1 liver, 2 gallbladder"):
        run(config)
    assert reconcile_names(tmp_path / "pred", tmp_path / "pred", {1: "liver"}) == ({1: "liver"}, None)


def test_structures_that_a_case_does_not_label_are_not_judged(tmp_path):
    prediction = np.zeros((6, 6, 6), np.uint8)
    prediction[1:3], prediction[4:] = 1, 2
    write_volume(tmp_path / "pred/a.nii.gz", Volume(prediction, np.eye(4)))
    write_volume(tmp_path / "out/labels/a.nii.gz", Volume(np.where(prediction == 1, 1, 0).astype(np.uint8), np.eye(4)))
    content = {"labels": {"1": "liver", "2": "brain"}, "cases": [{"id": "a", "labelled": [1]}, {"id": "b"}]}
    (tmp_path / "out/dataset.json").write_text(json.dumps(content))
    assert run(EvaluateConfig(tmp_path / "pred", tmp_path / "out/labels", tmp_path / "eval", num_workers=0)) == 0
    assert list(json.loads((tmp_path / "eval/summary.json").read_text())["structures"]) == ["liver"]


@pytest.mark.parametrize("taken", ["scores", "scores/metrics.csv", "scores/summary.json"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(folders, monkeypatch, taken):
    def work(*_):
        raise AssertionError("scored before the output folder was looked at")

    monkeypatch.setattr(evaluate, "_score", work)
    (folders / taken).parent.mkdir(exist_ok=True)
    (folders / taken).touch() if taken == "scores" else (folders / taken).mkdir()
    with pytest.raises(OutputError, match=f"{taken}: cannot be written: .*name another --output_dir"):
        run(config(folders, output_dir=folders / "scores"))


def test_a_disk_that_fills_up_meanwhile_costs_the_files_but_not_the_table(folders, monkeypatch, capsys):
    def full(path, scores):
        raise OutputError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(evaluate, "write_metrics", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(config(folders))
    shown = capsys.readouterr().out
    assert "Dice" in shown and "liver" in shown and "Written" not in shown


def test_statistics_are_in_the_summary_and_in_a_wide_table(folders, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "130")
    assert run(config(folders)) == 0
    summary = summary_of(folders)
    entry = summary["statistics"]["structures"]["liver"]["dice"]
    assert (entry["mean"], entry["median"]) == pytest.approx((5 / 6, 5 / 6))
    assert (entry["low"], entry["high"]) == pytest.approx((2 / 3, 1))
    assert summary["statistics"]["overall"]["dice"]["mean"] == summary["mean"]["dice"]
    assert summary["structures"]["liver"]["volume_difference_ml"] == 0
    assert "0.667 to 1.000" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert run(config(folders)) == 0
    shown = capsys.readouterr().out
    assert "0.667 to 1.000" not in shown and "0.833" in shown


def test_two_runs_are_compared_case_by_case(folders, capsys):
    assert run(config(folders, output_dir=folders / "BEFORE")) == 0
    write(folders / "PRED" / "b.nii.gz", shift=1)
    write(folders / "PRED" / "c.nii.gz")
    write(folders / "OUT" / "labels" / "c.nii.gz")
    before = folders / "BEFORE" / "metrics.csv"
    before.write_text(before.read_text() + "old,liver,1,0,0,1,1,1,0\n")
    assert run(config(folders, compare=folders / "BEFORE")) == 0
    found = json.loads((folders / "EVAL" / "comparison.json").read_text())
    entry = found["metrics"]["dice"]["structures"]["liver"]
    assert entry["difference"] == pytest.approx((5 / 6 - 2 / 3) / 2, abs=1e-5)
    assert (entry["low"], entry["high"]) == pytest.approx((0, 5 / 6 - 2 / 3), abs=1e-5)
    assert (entry["p"], entry["cases"]) == (1, 2)
    assert (found["only_here"], found["only_there"]) == (["c"], ["old"])
    shown = capsys.readouterr().out
    assert "Cases that the other run lacks: c" in shown and "Cases that only the other run has: old" in shown
    assert "+0.083" in shown
    # The next evaluation compares nothing: what is left of this one would be taken for its own.
    assert run(config(folders)) == 0
    assert not (folders / "EVAL" / "comparison.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compare": "nowhere"}, DatasetError, r"metrics\.csv: no such file; expected an evaluation"),
        ({"compare": "EVAL"}, ConfigError, "is the --output_dir itself"),
        (
            {"compare": "BEFORE", "surface": "area"},
            ConfigError,
            "of voxels there; expected area. Pass --surface voxels",
        ),
        ({"compare": "BEFORE", "tolerance_mm": 2.0}, ConfigError, r"at 1\.0 mm there; expected 2 mm"),
        ({"compare": "OTHERS"}, DatasetError, "other cases, such as x; expected some of the cases"),
    ],
)
def test_another_run_that_cannot_be_compared_is_told_before_the_work(folders, monkeypatch, changes, error, message):
    assert run(config(folders, output_dir=folders / "BEFORE")) == 0
    (folders / "OTHERS").mkdir()
    text = (folders / "BEFORE" / "metrics.csv").read_text()
    (folders / "OTHERS" / "metrics.csv").write_text(text.replace("\na,", "\nx,").replace("\nb,", "\ny,"))

    def work(*_):
        raise AssertionError("scored before the other run was looked at")

    monkeypatch.setattr(evaluate, "_score", work)
    with pytest.raises(error, match=message):
        run(config(folders, **{key: folders / value if key == "compare" else value for key, value in changes.items()}))


def test_the_number_of_a_channel_is_no_part_of_a_name(tmp_path, capsys):
    for case in ("x_001", "x_002"):
        write(tmp_path / f"labelsTs/{case}.nii.gz")
        write(tmp_path / f"new/{case}.nii.gz")
        write(tmp_path / f"old/{case}_0000.nii.gz", shift=1)
    paths = {"references": tmp_path / "labelsTs", "predictions": tmp_path / "old", "output_dir": tmp_path / "first"}
    assert run(EvaluateConfig(**paths)) == 0
    paths |= {"predictions": tmp_path / "new", "output_dir": tmp_path / "second", "compare": tmp_path / "first"}
    assert run(EvaluateConfig(**paths)) == 0
    with (tmp_path / "first/metrics.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["x_001", "x_002"]
    # An evaluation of an earlier version, with the names of the results.
    table = (tmp_path / "first/metrics.csv").read_text().replace("x_001", "x_001_0000").replace("x_002", "x_002_0000")
    (tmp_path / "first/metrics.csv").write_text(table)
    assert run(EvaluateConfig(**paths)) == 0
    compared = json.loads((tmp_path / "second/comparison.json").read_text())
    assert compared["cases"] == ["x_001", "x_002"] and not compared["only_there"]


def test_cases_with_numbers_of_four_digits_are_different_cases(tmp_path):
    for number in range(3):
        write(tmp_path / f"labels/scan_{number:04}.nii.gz", shift=number)
        write(tmp_path / f"pred/scan_{number:04}.nii.gz", shift=number)
    assert run(EvaluateConfig(tmp_path / "pred", tmp_path / "labels", tmp_path / "eval")) == 0
    found = json.loads((tmp_path / "eval/summary.json").read_text())
    assert found["cases"] == 3 and found["mean"]["dice"] == 1


def test_what_could_be_a_label_map_and_is_not_compared_is_named(folders, capsys):
    for side in (folders / "PRED", folders / "OUT" / "labels"):
        (side / "c.mgz").write_bytes(b"x")
        write(side / "later" / "d.nii.gz")
        write(side / "a.mha")
    write_slice(folders / "PRED" / "e.dcm", np.zeros((4, 5), np.int16), sop_class=RTSTRUCT)
    series(folders / "PRED" / "f")
    assert run(config(folders)) == 1
    found = {entry["case"]: entry["reason"] for entry in summary_of(folders)["failures"]}
    assert set(found) == {"c", "later_d", "e", "f"} and summary_of(folders)["cases"] == 2
    for case, words in (("c", "FreeSurfer"), ("later_d", "in a folder below"), ("e", "DICOM"), ("f", "DICOM")):
        assert words in found[case]
    assert "Not scored: c: " in capsys.readouterr().out
    with pytest.raises(DatasetError, match=r"OUT: no \.nii\.gz.* file; expected label maps\. Name its folder labels"):
        run(config(folders, references=folders / "OUT"))
    for path in (folders / "PRED").glob("*.nii.gz"):
        path.rename(path.parent / "later" / path.name)
    (folders / "PRED/a.mha").unlink()
    with pytest.raises(DatasetError, match=r"no \.nii\.gz.* file; expected label maps\. .*c\.mgz: FreeSurfer"):
        run(config(folders))


def test_a_region_of_nnunet_is_scored_as_all_that_lies_in_it(tmp_path, capsys):
    """Tumour whole is 1, 2 and 3 together, whether the values in it agree or not, and whoever names the regions."""
    truth, array = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    truth[1:9, 1:9, 1:9], truth[2:8, 2:8, 2:8], truth[3:6, 3:6, 3:6] = 1, 2, 3
    array[1:9, 1:9, 1:9], array[2:8, 2:8, 2:4] = 1, 2
    write_volume(tmp_path / "raw" / "labelsTr" / "a.nii.gz", Volume(truth, np.eye(4)))
    write_volume(tmp_path / "PRED" / "a.nii.gz", Volume(array, np.eye(4)))
    table = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    dataset = {"labels": table, "regions_class_order": [1, 2, 3]}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(dataset))
    settings = config(tmp_path, references=tmp_path / "raw" / "labelsTr")
    names, predicted = {"1": "whole", "2": "core", "3": "enhancing"}, {"1": [1, 2, 3], "2": [2, 3], "3": [3]}
    expected = {"whole": 1, "core": 2 * 72 / (72 + 216), "enhancing": 0}

    def scores():
        assert run(settings) == 0
        return {name: row["dice"] for name, row in summary_of(tmp_path)["structures"].items()}

    assert scores() == pytest.approx(expected)
    assert "whole is a region, scored as the values 1 2 3 together" in " ".join(capsys.readouterr().out.split())
    # Results of `infer --labels whole` name one value, which all of the region has.
    (tmp_path / "PRED" / "run.json").write_text(json.dumps({"labels": {"1": "whole"}, "regions": {"1": [1, 2, 3]}}))
    assert scores() == {"whole": 1}
    (tmp_path / "PRED" / "run.json").write_text(json.dumps({"labels": names, "regions": predicted}))
    (tmp_path / "raw" / "dataset.json").unlink()
    assert scores() == pytest.approx(expected)
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(dataset | {"regions_class_order": [1, 2]}))
    with pytest.raises(DatasetError, match="3 regions with"):
        run(settings)
