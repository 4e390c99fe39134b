"""Which scans were trained on: recorded by their voxels, told by infer and evaluate, left out by infer."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mambahome_jax.commands import evaluate, infer
from mambahome_jax.commands import preprocess as preprocess_command
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import EvaluateConfig, InferConfig, TrainConfig
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.intensity import voxel_digest
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from mambahome_jax.inference import batch
from mambahome_jax.training.checkpoints import checkpoint_settings, recorded_cases
from mambahome_jax.training.setup import make_setup
from tests.commands.scans import preprocess_config, write
from tests.commands.test_infer_options import PROPERTIES, labels_of
from tests.inference.models import Levels

CASES = ("trained", "held", "unseen")
AGAIN = "--split all segments every scan"


def voxels(number):
    image = np.array([-175, 37.5, 250], np.float32)[labels_of()]
    image[0, 0, 0], image[:, 17, 11 - number] = number, 250
    return image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three scans, and a network whose record has two of them."""
    (tmp_path / "in").mkdir()
    for number, case in enumerate(CASES):
        write(tmp_path / "in" / f"{case}.nii.gz", voxels(number))
    trained, held, _ = (((voxel_digest(voxels(number)),),) for number in range(3))
    use(monkeypatch, dataclasses.replace(PROPERTIES, trained_on=trained, held_out=held))
    return tmp_path


def use(monkeypatch, properties):
    model = Levels((0.0, 0.5, 1.0), metadata=properties)
    monkeypatch.setattr(batch, "load_model", lambda path, precision: model)


def settings(folder, **changes):
    return InferConfig(folder / "in", folder / "weights", folder / "out", **({"previews": False} | changes))


def report(folder):
    return json.loads((folder / "out" / "run.json").read_text())


def parts(folder):
    return {case["id"]: case.get("split") for case in report(folder)["cases"]}


def test_scans_that_were_trained_on_are_left_out_and_counted(folder, capsys):
    assert infer.run(settings(folder)) == 0
    assert parts(folder) == {"held": "val", "unseen": "test"}
    assert [(entry["id"], entry["split"]) for entry in report(folder)["left_out"]] == [("trained", "train")]
    assert not (folder / "out" / "trained.nii.gz").exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "Of 3 scans, 1 was trained on, by the checkpoint's record: trained" in printed
    assert f"1 scan is left out by --split auto; {AGAIN}" in printed
    assert "2 of 2 scans segmented" in printed


@pytest.mark.parametrize(
    ("split", "expected"),
    [("all", CASES), ("train", ("trained",)), ("val", ("held",)), ("test", ("unseen",))],
)
def test_split_names_the_scans(folder, capsys, split, expected):
    assert infer.run(settings(folder, split=split)) == 0
    assert {*parts(folder)} == {*expected}
    printed = " ".join(capsys.readouterr().out.split())
    assert ("Scores on scans that were trained on tell nothing" in printed) == ("trained" in expected)


def test_a_scan_is_known_by_its_voxels_whatever_its_name_file_and_orientation(folder):
    scan = read_volume(folder / "in" / "trained.nii.gz")
    shutil.rmtree(folder / "in")
    write_volume(folder / "in" / "unseen.nii", reorient(scan, "SPL"))
    write(folder / "in" / "double.nii.gz", scan.array.astype(np.float64))
    changed = scan.array.copy()
    changed[3, 3, 3] += 1
    write(folder / "in" / "trained.nii.gz", changed)
    assert infer.run(settings(folder)) == 0
    assert parts(folder) == {"trained": "test"}


def test_nothing_left_to_segment_is_exit_code_2_and_says_how(folder, capsys):
    for case in ("held", "unseen"):
        (folder / "in" / f"{case}.nii.gz").unlink()
    assert infer.run(settings(folder)) == 2
    assert AGAIN in " ".join(capsys.readouterr().out.split())


def test_weights_without_a_record_leave_nothing_out_and_say_so(folder, capsys, monkeypatch):
    use(monkeypatch, PROPERTIES)
    assert infer.run(settings(folder)) == 0
    assert parts(folder) == dict.fromkeys(CASES)
    assert "do not say which scans they were trained on" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="--split val: neither the weights nor the dataset say"):
        infer.run(settings(folder, split="val"))


def test_the_dataset_s_mark_counts_where_the_record_names_a_scan_in_no_part(folder):
    rows = ["id,image,label,split", *(f"{case},{case}.nii.gz,,test" for case in CASES)]
    (folder / "in" / "cases.csv").write_text("\n".join(rows) + "\n")
    assert infer.run(settings(folder, split="test")) == 0
    assert {*parts(folder)} == {"unseen"}


def test_a_record_that_does_not_name_all_calls_no_scan_unseen(folder, capsys, monkeypatch):
    trained = ((voxel_digest(voxels(0)),), ())
    use(monkeypatch, dataclasses.replace(PROPERTIES, trained_on=trained))
    assert infer.run(settings(folder)) == 0
    assert parts(folder) == {"held": None, "unseen": None}
    assert "does not name all scans that were trained on" in " ".join(capsys.readouterr().out.split())


def test_results_that_are_kept_know_their_part_without_being_read(folder, monkeypatch):
    assert infer.run(settings(folder, split="all")) == 0
    monkeypatch.setattr(batch, "read_volume", lambda *arguments, **options: pytest.fail("a scan was read"))
    assert infer.run(settings(folder, skip_existing=True)) == 0
    assert parts(folder) == {"held": "val", "unseen": "test"}
    assert [entry["id"] for entry in report(folder)["left_out"]] == ["trained"]


def provenance(folder, capsys, **changes):
    capsys.readouterr()
    flags = {"predictions": folder / "out", "references": folder / "references", "output_dir": folder / "EVAL"}
    evaluate.run(EvaluateConfig(**(flags | changes)))
    summary = json.loads((folder / "EVAL" / "summary.json").read_text())["provenance"]
    assert summary["summary"] in " ".join(capsys.readouterr().out.split())
    return summary


def test_evaluate_says_how_many_cases_were_trained_on(folder, capsys):
    assert infer.run(settings(folder, split="all")) == 0
    for case in CASES:
        write(folder / "references" / f"{case}.nii.gz", labels_of())
    summary = provenance(folder, capsys)
    assert summary["trained_on"] == summary["validated_on"] == summary["unseen"] == 1 and summary["unknown"] == 0
    assert summary["trained_on_cases"] == ["trained"]
    expected = "Of 3 cases, 1 was trained on (1 validated on in training, 1 unseen); scores on those tell nothing"
    assert summary["summary"].startswith(expected)


def test_references_of_cases_that_infer_left_out_are_no_failures(folder, capsys):
    assert infer.run(settings(folder)) == 0
    for case in CASES:
        write(folder / "references" / f"{case}.nii.gz", labels_of())
    flags = EvaluateConfig(folder / "out", folder / "references", folder / "EVAL")
    assert evaluate.run(flags) == 0
    summary = provenance(folder, capsys)
    assert summary["trained_on"] == 0 and summary["left_out"] == ["trained"]
    assert summary["summary"].endswith("Not among them: 1 that infer left out by --split")


def test_evaluate_goes_by_content_then_by_name_and_says_where_it_does_not_know(folder, capsys):
    assert infer.run(settings(folder, split="all")) == 0
    out = folder / "out"
    (out / "trained.nii.gz").rename(out / "renamed.nii.gz")
    labels = labels_of()
    labels[5] = 0
    write(out / "unseen.nii.gz", labels)
    (out / "held.nii.gz").unlink()
    for case in ("renamed", "unseen"):
        write(folder / "references" / f"{case}.nii.gz", labels_of())
    summary = provenance(folder, capsys)
    assert summary["trained_on_cases"] == ["renamed"] and summary["unseen"] == 1
    (out / "run.json").unlink()
    summary = provenance(folder, capsys)
    assert summary["unknown"] == 2 and summary["summary"].startswith("Nothing says which of the 2 cases")


def test_training_records_the_scans_before_and_after_resampling(tmp_path):
    flags = preprocess_config(tmp_path)
    assert preprocess_command.run(dataclasses.replace(flags, spacing=(2, 2, 3))) == 0
    prepared = read_prepared(tmp_path / "out")
    setup = make_setup(TrainConfig(tmp_path / "out", hold_out=3), prepared, None, 1)
    by_case = {
        case: {
            voxel_digest(read_volume(tmp_path / place / "images" / f"{case}.nii.gz").array) for place in ("in", "out")
        }
        for case in "abc"
    }
    recorded = zip(
        (*setup.train_cases, *setup.val_cases), (*setup.properties.trained_on, *setup.properties.held_out), strict=True
    )
    assert {case: {*digests} for case, digests in recorded} == by_case
    assert all(len(digests) == 2 for digests in by_case.values())


def test_fine_tuning_and_resuming_keep_what_the_weights_saw_before(tmp_path):
    flags = preprocess_config(tmp_path)
    assert preprocess_command.run(flags) == 0
    setup = make_setup(TrainConfig(tmp_path / "out"), read_prepared(tmp_path / "out"), None, 1)
    own = setup.properties.trained_on
    first = json.loads(json.dumps(checkpoint_settings(setup, (("earlier",), ()))))
    assert recorded_cases(first) == (*own, ("earlier",), ())
    assert recorded_cases(checkpoint_settings(setup, recorded_cases(first))) == (*own, ("earlier",), ())
    unknown = dataclasses.replace(setup, properties=dataclasses.replace(setup.properties, trained_on=None))
    assert recorded_cases(checkpoint_settings(unknown)) == ()
    assert recorded_cases(checkpoint_settings(unknown, (("earlier",),))) == ((), ("earlier",))


def test_the_digest_does_not_depend_on_the_order_of_voxels_in_memory():
    array = np.random.default_rng(0).normal(size=(40, 50, 60)).astype(np.float32)
    digest = voxel_digest(array)
    assert voxel_digest(np.asfortranarray(array)) == digest == voxel_digest(array[::-1].transpose(2, 0, 1))
    assert voxel_digest(array[..., None]) == digest != voxel_digest(array.reshape(50, 40, 60).reshape(20, 100, 60))
    assert voxel_digest(np.zeros((2, 2, 2))) == voxel_digest(-np.zeros((2, 2, 2)))
    assert voxel_digest(Volume(array, np.eye(4)).array + 1) != digest


def folds(monkeypatch, folder, count=3):
    """A run of folds, each of whose networks was trained on the first scan's others and marks another structure."""
    scans = [((voxel_digest(voxels(number)),)) for number in range(3)]
    for fold in range(count):
        (folder / "RUN" / f"fold_{fold}" / "checkpoints" / "best").mkdir(parents=True)
        (folder / "RUN" / f"fold_{fold}" / "run.json").write_text(json.dumps({"configuration": {"folds": 3}}))

    def load(path, precision):
        fold = int(path.name.removeprefix("fold_"))
        levels = [(0.0, 0.5, 1.0), (1.0, 0.5, 0.0), (0.0, 1.0, 0.0)][fold]
        trained = tuple(scan for number, scan in enumerate(scans[:2]) if number != fold)
        held_out = tuple(scan for number, scan in enumerate(scans[:2]) if number == fold)
        return Levels(levels, metadata=dataclasses.replace(PROPERTIES, trained_on=trained, held_out=held_out))

    monkeypatch.setattr(batch, "load_model", load)
    return dataclasses.replace(settings(folder), model_path=folder / "RUN")


def test_scans_of_a_cross_validation_are_segmented_by_the_network_that_did_not_see_them(folder, monkeypatch, capsys):
    flags = folds(monkeypatch, folder)
    assert infer.run(flags) == 0
    entries = {case["id"]: case for case in report(folder)["cases"]}
    run = folder / "RUN"
    assert {case: entry.get("networks") for case, entry in entries.items()} == {
        "trained": [str(run / "fold_0")],
        "held": [str(run / "fold_1")],
        "unseen": None,
    }
    assert parts(folder) == {"trained": "val", "held": "val", "unseen": "test"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "Of 3 scans, 0 were trained on" in printed
    assert "Of the others, 2 were trained on by some of the 3 networks" in printed
    for case, fold in (("trained", 0), ("held", 1)):
        alone = dataclasses.replace(flags, model_path=run / f"fold_{fold}", output_dir=folder / "alone", split="all")
        assert infer.run(alone) == 0
        ours, own = (read_volume(folder / place / f"{case}.nii.gz").array for place in ("out", "alone"))
        assert np.array_equal(ours, own)
    # A result that stays keeps the networks that made it.
    assert infer.run(dataclasses.replace(flags, skip_existing=True)) == 0
    assert {case["id"]: case.get("networks") for case in report(folder)["cases"]}["held"] == [str(run / "fold_1")]


def test_a_scan_that_all_networks_saw_is_left_out_and_what_the_run_lacks_is_said(folder, monkeypatch, capsys):
    """Without the first fold nobody is left who did not see its scan."""
    flags = folds(monkeypatch, folder)
    shutil.rmtree(folder / "RUN" / "fold_0")
    (folder / "RUN" / "fold_2" / "run.json").write_text(json.dumps({"status": "running"}))
    assert infer.run(flags) == 0
    assert [entry["id"] for entry in report(folder)["left_out"]] == ["trained"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Note: {folder / 'RUN'} holds 2 of 3 folds" in printed
    assert f"Note: the training of {folder / 'RUN' / 'fold_2'} has not ended (running)" in printed


def test_what_a_cross_validation_learned_is_done_unless_a_flag_says_otherwise(folder, monkeypatch, capsys):
    flags = folds(monkeypatch, folder)
    table = {"liver": {"kept": True}, "spleen": {"kept": False}}
    (folder / "RUN" / "cross_validation").mkdir()
    (folder / "RUN" / "cross_validation" / "summary.json").write_text(json.dumps({"largest_part": table}))
    assert infer.run(flags) == 0
    assert "Note: the largest part of liver is kept" in " ".join(capsys.readouterr().out.split())
    assert report(folder)["configuration"]["keep_largest"] == ["liver"]
    for changes, kept in (({"keep_largest": ("none",)}, ["none"]), ({"labels": ("spleen",)}, [])):
        assert infer.run(dataclasses.replace(flags, **changes)) == 0
        assert "the largest part of" not in capsys.readouterr().out
        assert report(folder)["configuration"]["keep_largest"] == kept
