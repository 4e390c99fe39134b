"""What left a dataset leaves the output of preprocess, and who reads such a folder goes by its dataset.json."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.datasets.find_scans import find_scans
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.evaluation.pairs import find_pairs
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.imaging.volume import read_volume, write_volume
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.dataset import prepare_dataset
from tests.commands.scans import description, preprocess_config, scan, write

CASES = {"a", "b", "c"}


@pytest.fixture
def config(tmp_path):
    """Settings of a folder that was preprocessed, with the cases a, b and c."""
    config = preprocess_config(tmp_path)
    assert run(config) == 0
    return config


def holds(config):
    """{folder: cases of which there is anything} of an output."""
    return {
        part: {path.name.removesuffix(".nii.gz") for path in (config.output_path / part).glob("*")} - {"index.json"}
        for part in ("images", "labels", "store")
    }


def everywhere(cases):
    return {part: cases for part in ("images", "labels", "store")}


def source(config, part, case):
    return config.input_path / part / f"{case}.nii.gz"


def remove(config, case):
    for part in ("images", "labels"):
        source(config, part, case).unlink()


def rename(config, old, new):
    for part in ("images", "labels"):
        source(config, part, old).rename(source(config, part, new))


@pytest.mark.parametrize("spacing", [(1, 1, 3), (2, 1, 3)], ids=["kept", "again"])
def test_a_case_that_is_gone_leaves_nothing(config, capsys, spacing):
    remove(config, "a")
    capsys.readouterr()
    assert run(replace(config, spacing=spacing)) == 0
    assert holds(config) == everywhere({"b", "c"})
    assert "Removed from the output: 1 case that this dataset no longer has: a\n" in capsys.readouterr().out
    assert [case["id"] for case in description(config)["cases"]] == ["b", "c"]
    assert run(replace(config, spacing=spacing)) == 0
    assert "Removed" not in capsys.readouterr().out


def test_a_case_that_was_renamed_leaves_its_old_name(config, capsys):
    rename(config, "b", "patient_17")
    assert run(config) == 0
    assert holds(config)["images"] == {"a", "c", "patient_17"} == holds(config)["store"]
    assert "no longer has: b\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_case_that_fails_now_leaves_nothing(config, capsys, part):
    source(config, part, "b").write_bytes(source(config, part, "b").read_bytes()[:100])
    assert run(config) == 1
    assert holds(config) == everywhere({"a", "c"})
    assert "1 case of an earlier run, failing now: b\n" in capsys.readouterr().out


def test_a_label_map_that_is_gone_leaves_its_case_unlabelled(config, capsys):
    source(config, "labels", "b").unlink()
    assert run(config) == 0
    assert holds(config) == {"images": CASES, "labels": {"a", "c"}, "store": CASES}
    assert "files no longer made of 1 case: b" in capsys.readouterr().out
    assert Store(config.output_path).entry("b").class_counts is None


def test_a_shorter_table_and_other_flags_leave_cases_out(tmp_path, capsys):
    config = preprocess_config(tmp_path)
    rows = [
        f"{case},images/{case}.nii.gz,labels/{case}.nii.gz,{modality}"
        for case, modality in zip("abc", ("ct", "ct", "mr"), strict=True)
    ]
    table = config.input_path / "cases.csv"
    table.write_text("\n".join(["id,image,label,modality", *rows]))
    config = replace(config, input_path=table)
    assert run(config) == 0 and holds(config)["images"] == CASES
    assert run(replace(config, only="ct")) == 0 and holds(config)["images"] == {"a", "b"}
    table.write_text("\n".join(["id,image,label,modality", rows[2]]))
    assert run(config) == 0 and holds(config)["images"] == {"c"} == holds(config)["store"]
    assert "2 cases that this dataset no longer has: a, b" in capsys.readouterr().out


def test_another_dataset_in_the_same_folder_replaces_the_first(config, tmp_path):
    for case in ("x", "y"):
        image, label = scan(seed=7)
        write(tmp_path / f"other/images/{case}.nii.gz", image)
        write(tmp_path / f"other/labels/{case}.nii.gz", label)
    assert run(replace(config, input_path=tmp_path / "other")) == 0
    assert holds(config) == everywhere({"x", "y"})


def test_a_store_alone_leaves_no_files_of_an_earlier_run(config):
    prepare_dataset(load_dataset(config.input_path), config, store_only=True)
    assert holds(config) == {"images": set(), "labels": set(), "store": CASES}


def test_numbered_label_maps_beside_a_store_alone_are_kept(tmp_path, capsys):
    config = preprocess_config(tmp_path)
    for case in "abc":
        write(source(config, "labels", case), scan()[1] * np.uint8(100))
    for _ in range(2):
        dataset = load_dataset(config.input_path)
        prepare_dataset(dataset, config, store_only=True, say=print)
        assert holds(config) == {"images": set(), "labels": CASES, "store": CASES}
    shown = capsys.readouterr().out
    assert "3 of 3 cases up to date" in shown and "Removed" not in shown and "did not write" not in shown


def test_what_preprocess_did_not_write_stays_and_is_named(config, capsys):
    mine = config.output_path / "images/mine.nii.gz"
    mine.write_bytes(b"a scan")
    notes = config.output_path / "notes.txt"
    notes.write_text("to do")
    remove(config, "a")
    capsys.readouterr()
    assert run(config) == 0
    shown = capsys.readouterr().out
    assert mine.read_bytes() == b"a scan" and notes.exists()
    assert "files that preprocess did not write stay in the output and are of no case: images/mine.nii.gz" in shown


def test_what_an_earlier_version_left_behind_goes_too(config):
    content = description(config)
    content["cases"] = content["cases"][:2]
    (config.output_path / "dataset.json").write_text(json.dumps(content))
    remove(config, "c")
    assert run(config) == 0
    assert holds(config) == everywhere({"a", "b"})


def test_a_name_in_dataset_json_that_leads_elsewhere_removes_nothing(config, tmp_path):
    (tmp_path / "victim.nii.gz").write_bytes(b"")
    content = description(config)
    content["cases"].append({"id": "../../victim"})
    (config.output_path / "dataset.json").write_text(json.dumps(content))
    assert run(config) == 0
    assert (tmp_path / "victim.nii.gz").exists()


def test_a_link_in_the_place_of_a_case_is_removed_and_not_what_it_leads_to(config, tmp_path):
    folder = config.output_path / "store/a"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    remove(config, "a")
    assert run(config) == 0
    assert not folder.is_symlink() and (tmp_path / "elsewhere/case.json").is_file()


def test_a_run_that_was_stopped_leaves_a_folder_that_no_command_reads(config, monkeypatch):
    monkeypatch.setattr(
        "mambahome_jax.preprocessing.dataset._work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, spacing=(2, 1, 3)))
    monkeypatch.undo()
    readers = (
        lambda: read_prepared(config.output_path),
        lambda: find_scans(config.output_path),
        lambda: find_scans(config.output_path / "images"),
        lambda: find_pairs(config.input_path / "labels", config.output_path / "labels"),
        lambda: load_dataset(config.output_path),
    )
    for read in readers:
        with pytest.raises(DatasetError, match=r"dataset.json: preprocessing did not reach its end. Run preprocess"):
            read()
    # What the stopped run was about to write is remembered: nothing of it stays when it is no case any more.
    remove(config, "a")
    write(config.output_path / "images/a.nii.gz", scan()[0])
    assert run(config) == 0
    assert holds(config)["images"] == {"b", "c"}


def test_the_dataset_json_of_a_download_is_not_replaced(tmp_path):
    config = preprocess_config(tmp_path)
    config.output_path.mkdir()
    (config.output_path / "dataset.json").write_text('{"labels": {"0": "background"}}')
    with pytest.raises(ConfigError, match=r"dataset.json: not written by preprocess.* another --output_path"):
        run(config)
    assert [path.name for path in config.output_path.iterdir()] == ["dataset.json"]


@pytest.mark.parametrize("part", ["images", "labels"])
def test_scans_of_a_download_are_not_replaced(tmp_path, part):
    config = preprocess_config(tmp_path)
    mine = write(config.output_path / f"{part}/b.nii.gz", scan()[0])
    content = mine.read_bytes()
    with pytest.raises(ConfigError, match=rf"{part}/b.nii.gz: not written by preprocess.* another --output_path"):
        run(config)
    assert mine.read_bytes() == content
    mine.rename(mine.with_name("other.nii.gz"))
    assert run(config) == 0


@pytest.fixture
def remaining(config):
    """A folder in which files of case a remain although dataset.json does not name it."""
    content = description(config)
    content["cases"] = content["cases"][1:]
    (config.output_path / "dataset.json").write_text(json.dumps(content))
    return config.output_path


@pytest.mark.parametrize("part", ["", "images"])
def test_infer_goes_by_dataset_json(remaining, part):
    found = find_scans(remaining / part)
    scans, failures = found.scans, found.failures
    assert [scan.case for scan in scans] == ["b", "c"]
    assert [failure["id"] for failure in failures] == ["a"]
    assert "images/a.nii.gz: of no case in" in failures[0]["reason"]


def test_infer_names_what_dataset_json_lists_and_is_not_there(config):
    (config.output_path / "images/b.nii.gz").unlink()
    found = find_scans(config.output_path)
    scans, failures = found.scans, found.failures
    assert [scan.case for scan in scans] == ["a", "c"]
    assert [(failure["id"], "b.nii.gz: not found" in failure["reason"]) for failure in failures] == [("b", True)]


def test_an_image_that_is_there_in_two_formats_is_not_said_to_be_missing(config):
    image = read_volume(config.output_path / "images/b.nii.gz")
    write_volume(config.output_path / "images/b.nrrd", image)
    found = find_scans(config.output_path)
    scans, failures = found.scans, found.failures
    assert [scan.case for scan in scans] == ["a", "c"]
    assert [failure["id"] for failure in failures] == ["b"] and "would have one name" in failures[0]["reason"]


def test_what_remains_is_named_where_the_folder_is_checked_or_preprocessed_once_more(remaining):
    note = "of no case in dataset.json, and left out: images/a.nii.gz, labels/a.nii.gz"
    (remaining / "images/readme.txt").touch()
    assert note in load_dataset(remaining).notes


def test_files_in_another_unicode_form_are_those_of_their_case(tmp_path, capsys):
    config = preprocess_config(tmp_path)
    rename(config, "b", "M\u00fcller")
    assert run(config) == 0
    composed, decomposed = "M\u00fcller", "Mu\u0308ller"
    for part, ending in (("images", ".nii.gz"), ("labels", ".nii.gz"), ("store", "")):
        folder = config.output_path / part
        (folder / f"{composed}{ending}").rename(folder / f"{decomposed}{ending}")
    assert [scan.case for scan in find_scans(config.output_path).scans] == ["M\u00fcller", "a", "c"]
    capsys.readouterr()
    assert run(config) == 0
    shown = capsys.readouterr().out
    assert "Removed" not in shown and "did not write" not in shown
    remove(config, "M\u00fcller")
    assert run(config) == 0
    assert holds(config) == everywhere({"a", "c"})


@pytest.mark.parametrize("ours", [True, False])
def test_evaluate_and_report_go_by_dataset_json(remaining, config, ours):
    folders = (config.input_path / "labels", remaining / "labels")
    pairs, alone = find_pairs(*(folders if ours else folders[::-1]))
    assert [pair.case for pair in pairs] == ["b", "c"]
    assert len(alone) == 1 and alone[0][0] == "a" and "labels/a.nii.gz: of no case in" in alone[0][1]


def test_readers_find_the_description_through_a_link(remaining, tmp_path):
    (tmp_path / "references").symlink_to(remaining / "labels")
    assert [pair.case for pair in find_pairs(config_labels(remaining), tmp_path / "references")[0]] == ["b", "c"]


def config_labels(output):
    return output.parent / "in/labels"


def test_folders_of_other_programs_are_read_as_they_are(tmp_path):
    for part in ("images", "labels"):
        write(tmp_path / f"{part}/x.nii.gz", np.zeros((2, 2, 2), np.uint8))
    assert [scan.case for scan in find_scans(tmp_path / "images").scans] == ["x"]
    assert PreprocessConfig(tmp_path, tmp_path / "out").output_path.name == "out"
