import json
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import mambahome_jax as mh
from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError, OutputError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging.volume import read_volume, write_volume
from mambahome_jax.inference import batch, result_files, tiled
from tests.commands.scans import write
from tests.conftest import golden_path
from tests.inference.models import Levels

PROPERTIES = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32))


@pytest.fixture
def levels(monkeypatch):
    """Puts a model whose classes are intensity levels in the place of what --model_path names."""
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))


def labels_of(seed):
    labels = np.zeros((20, 18, 12), np.uint8)
    labels[3 : 8 + seed, 4:9, 2:8] = 1
    labels[11:16, 8:15, 5:9] = 2
    return labels


def scans(folder, *cases):
    for seed, case in enumerate(cases):
        write(folder / f"{case}.nii.gz", np.array([-175, 37.5, 250], np.float32)[labels_of(seed)])
    return folder


def config(folder, **changes):
    paths = {"data_path": folder / "in", "model_path": folder / "model", "output_dir": folder / "out"}
    return InferConfig(**(paths | changes))


def report(folder):
    return json.loads((folder / "out" / "run.json").read_text())


def test_folder(tmp_path, levels, capsys):
    scans(tmp_path / "in", "a", "b_0000")
    (tmp_path / "in" / "._a.nii.gz").write_bytes(b"macOS")
    (tmp_path / "in" / "notes.txt").write_text("")
    assert infer.run(config(tmp_path)) == 0
    for seed, case in enumerate(("a", "b_0000")):
        result, scan = nib.load(tmp_path / f"out/{case}.nii.gz"), nib.load(tmp_path / f"in/{case}.nii.gz")
        np.testing.assert_array_equal(np.asarray(result.dataobj), labels_of(seed))
        assert result.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(result.affine, scan.affine)
        with Image.open(tmp_path / f"out/previews/{case}.png") as picture:
            assert picture.mode == "RGB"
    found = report(tmp_path)
    assert found["labels"] == {"1": "liver", "2": "spleen"}
    assert found["configuration"]["overlap"] == 0.5
    assert found["settings"]["roi_size"] == [16, 16, 32]
    assert found["versions"]["jax"] == jax.__version__
    assert "cpu" in found["device"]
    assert found["failures"] == []
    assert [case["id"] for case in found["cases"]] == ["a", "b_0000"]
    liver = found["cases"][0]["volume_ml"]["liver"]
    assert liver == pytest.approx(np.sum(labels_of(0) == 1) * 6 / 1000)
    assert found["cases"][0]["seconds"] > 0
    assert not list((tmp_path / "out").glob(".*"))
    assert "2 of 2 scans" in capsys.readouterr().out


def test_as_a_function(tmp_path, levels, capsys):
    folder = scans(tmp_path / "in", "a", "b")
    write(folder / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    out = tmp_path / "out"
    found = mh.infer(data_path=str(folder), model_path=str(tmp_path / "model"), output_dir=str(out), previews=False)
    assert found.results == {"a": out / "a.nii.gz", "b": out / "b.nii.gz"}
    assert all(path.is_file() for path in found.results.values())
    assert (found.report, found.volumes, found.exit_code) == (out / "run.json", out / "volumes.csv", 1)
    assert [failure["id"] for failure in found.failures] == ["nan"] and "NaN" in found.failures[0]["reason"]
    assert [len(values) for values in found.volumes_ml.values()] == [2, 2]
    with pytest.raises(DatasetError, match="no such file or folder"):
        mh.infer(data_path=tmp_path / "nowhere", model_path=tmp_path / "model")
    assert capsys.readouterr() == ("", "")


def test_single_file_without_preview(tmp_path, levels):
    scans(tmp_path / "in", "a", "b")
    file = tmp_path / "in" / "b.nii"
    write_volume(file, read_volume(tmp_path / "in" / "b.nii.gz"))
    assert infer.run(config(tmp_path, data_path=file, previews=False)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", "run.json", "volumes.csv"]


@pytest.mark.parametrize("name", ["imagesTs", "images"])
def test_folder_of_a_dataset(tmp_path, levels, capsys, name):
    scans(tmp_path / "in" / name, "a")
    assert infer.run(config(tmp_path)) == 0
    assert name in capsys.readouterr().out
    assert (tmp_path / "out" / "a.nii.gz").exists()


def test_broken_scans_are_reported_and_the_rest_is_done(tmp_path, levels, capsys):
    folder = scans(tmp_path / "in", "a", "b", "c", "d", "same")
    write(folder / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    write(folder / "time.nii.gz", np.zeros((8, 8, 8, 5), np.float32))
    whole = (folder / "a.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.nii.gz").write_bytes(b"not a scan")
    write_volume(folder / "same.nii", read_volume(folder / "a.nii.gz"))
    assert infer.run(config(tmp_path, num_workers=2)) == 1
    found = report(tmp_path)
    assert [case["id"] for case in found["cases"]] == ["a", "b", "c", "d"]
    reasons = {failure["id"]: failure["reason"] for failure in found["failures"]}
    assert set(reasons) == {"nan", "time", "truncated", "text", "same"}
    assert "NaN" in reasons["nan"]
    assert "nan.nii.gz" in reasons["nan"]
    assert "5 channels or time points" in reasons["time"]
    assert "truncated" in reasons["truncated"]
    assert "not a NIfTI file" in reasons["text"]
    assert "same.nii and same.nii.gz" in reasons["same"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{c}.nii.gz" for c in "abcd"]
    printed = capsys.readouterr().out
    assert all(f"Failed {case}" in printed for case in reasons)
    assert "Traceback" not in printed


def test_fifteen_of_twenty(tmp_path, levels, capsys):
    good = [f"case_{number:02d}" for number in range(15)]
    folder = scans(tmp_path / "in", *good)
    whole = (folder / "case_00.nii.gz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    singular = np.diag([2.0, 0.0, 3.0, 1.0])
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.nii.gz").write_bytes(bytes(damaged))
    (folder / "text.nii.gz").write_text("a note, not a scan")
    write(folder / "infinite.nii.gz", np.full((8, 8, 8), np.inf, np.float32))
    header = nib.load(folder / "case_00.nii.gz").header.copy()
    header.set_sform(singular, code=1)
    nib.save(nib.Nifti1Image(np.zeros((20, 18, 12), np.float32), None, header), folder / "flat.nii.gz")
    assert infer.run(config(tmp_path, num_workers=2)) == 1
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{case}.nii.gz" for case in good]
    said = {line.split(":")[0]: line for line in printed.splitlines() if line.startswith("Failed ")}
    expected = {
        "truncated": "truncated or damaged",
        "damaged": "truncated or damaged",
        "text": "not a NIfTI file",
        "infinite": "512 voxels are NaN or infinite",
        "flat": "singular affine",
    }
    assert set(said) == {f"Failed {case}" for case in expected}
    for case, reason in expected.items():
        assert reason in said[f"Failed {case}"] and f"{case}.nii.gz" in said[f"Failed {case}"]
    assert "15 of 20 scans segmented" in printed and "5 failed" in printed and "Traceback" not in printed
    assert len(report(tmp_path)["cases"]) == 15 and len(report(tmp_path)["failures"]) == 5


def test_nothing_could_be_done(tmp_path, levels):
    write(tmp_path / "in" / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    assert infer.run(config(tmp_path)) == 2


def test_a_full_disk_stops_the_run_with_a_report(tmp_path, levels, monkeypatch):
    scans(tmp_path / "in", "a", "b", "c", "d")
    written = []

    def write_one(path, volume, **settings):
        if written:
            raise OutputError(f"{path}: cannot be written: No space left on device")
        written.append(path)
        write_volume(path, volume, **settings)

    monkeypatch.setattr(result_files, "write_volume", write_one)
    assert infer.run(config(tmp_path)) == 1
    reasons = {failure["id"]: failure["reason"] for failure in report(tmp_path)["failures"]}
    assert set(reasons) == {"b", "c", "d"}
    assert "No space left" in reasons["b"]
    assert "not begun" in reasons["d"]


def test_what_is_written_counts_where_previews_and_report_do_not_fit(tmp_path, levels, monkeypatch, capsys):
    scans(tmp_path / "in", "a", "b")
    write_text, save = Path.write_text, Image.Image.save

    def full(path, *arguments, **settings):
        if ".run.json." in path.name:
            write_text(path, "cut short")
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **settings)

    def full_for_a(picture, path, **settings):
        if "a.png" in path.name:
            raise OSError(28, "No space left on device")
        save(picture, path, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Image.Image, "save", full_for_a)
    assert infer.run(config(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert "2 of 2 scans segmented" in shown
    assert "Note: a: without preview" in shown and "a.png: cannot be written: No space left on device" in shown
    assert "There is no report of this run" in shown and "Free some space or name another" in shown
    assert "failed;" not in shown
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left == ["a.nii.gz", "b.nii.gz", "previews/b.png", "volumes.csv"]
    monkeypatch.setattr(Path, "write_text", write_text)
    assert infer.run(config(tmp_path)) == 0
    assert [case["preview"] for case in report(tmp_path)["cases"]] == [None, "previews/b.png"]
    assert "without preview" in report(tmp_path)["cases"][0]["remarks"][0]


def test_device_that_is_too_small_is_one_case_failing(tmp_path, levels, monkeypatch):
    scans(tmp_path / "in", "a", "b")
    original, calls = batch.label, []

    def label(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes")
        return original(*arguments, **options)

    monkeypatch.setattr(batch, "label", label)
    assert infer.run(config(tmp_path)) == 1
    assert "smaller --roi_size" in report(tmp_path)["failures"][0]["reason"]


def test_a_device_without_memory_for_all_windows_takes_fewer(tmp_path, levels, monkeypatch, capsys):
    scans(tmp_path / "in", "a", "b")
    assert infer.run(config(tmp_path, sw_batch_size=1)) == 0
    alone = (tmp_path / "out" / "a.nii.gz").read_bytes()
    original = tiled.Tiles.add

    def add(self, predicted, corners):
        if len(predicted) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes")
        return original(self, predicted, corners)

    monkeypatch.setattr(tiled.Tiles, "add", add)
    assert infer.run(config(tmp_path, sw_batch_size=4)) == 0
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == alone
    said = "out of device memory with 4 windows in a call of the network; trying 2 in a call"
    assert f"Note: a: {said}" in " ".join(capsys.readouterr().out.split())
    assert [len(case["remarks"]) for case in report(tmp_path)["cases"]] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data_path": "nowhere"}, DatasetError, "no such file or folder"),
        ({"data_path": "empty"}, DatasetError, r"no \.nii\.gz, \.nii, .* or DICOM file"),
        ({"data_path": "notes.txt"}, DatasetError, "not a scan by its name"),
        ({"output_dir": "in"}, ConfigError, "holds the scans themselves"),
        ({"data_path": "in/a.nii.gz", "output_dir": "in"}, ConfigError, "holds the scans themselves"),
        ({"data_path": "dataset", "output_dir": "dataset"}, ConfigError, "holds the scans themselves"),
        ({"output_dir": "notes.txt"}, OutputError, "cannot be written"),
        ({"roi_size": (100, 96, 48)}, ConfigError, "such as 96 96 48"),
        ({"roi_size": (16, 16, 16)}, ConfigError, "at least one"),
        ({"overlap": 1.0}, ConfigError, "overlap is 1.0"),
        ({"sw_batch_size": 0}, ConfigError, "sw_batch_size 0"),
        ({"orientation": "RAX"}, ConfigError, "orientation 'RAX'"),
        ({"gpu": True}, ConfigError, "--gpu was given"),
    ],
)
def test_says_what_is_wrong(tmp_path, levels, changes, error, message):
    scans(tmp_path / "in", "a")
    scans(tmp_path / "dataset" / "images", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    paths = {key: tmp_path / value for key, value in changes.items() if key in ("data_path", "output_dir")}
    with pytest.raises(error, match=message):
        infer.run(config(tmp_path, **(changes | paths)))


def test_weights_that_are_not_there(tmp_path):
    scans(tmp_path / "in", "a")
    with pytest.raises(CheckpointError):
        infer.run(config(tmp_path))


@pytest.mark.slow
def test_published_weights(tmp_path):
    scans(tmp_path / "in", "a")
    weights = golden_path("mambahome_tiny.pth")
    options = {"roi_size": (32, 16, 16), "sw_batch_size": 1, "overlap": 0.0, "spacing": (0.0, 0.0, 0.0)}
    assert infer.run(config(tmp_path, model_path=weights, **options)) == 0
    result = read_volume(tmp_path / "out" / "a.nii.gz")
    assert result.shape == (20, 18, 12)
    assert result.array.max() <= 2
    assert report(tmp_path)["labels"] == {}
    assert report(tmp_path)["settings"]["chain"] == "published"


def test_scans_of_two_modalities_are_each_normalised_by_their_own(tmp_path, levels, capsys):
    folder = scans(tmp_path / "amos22/imagesVa", "amos_0001")
    # The z-score of the one structure is negative, that of the other positive, and zero stays zero.
    write(folder / "amos_0507.nii.gz", np.array([0, 200, 300], np.float32)[labels_of(1)])
    assert infer.run(config(tmp_path, data_path=folder)) == 0
    assert [(case["id"], case["modality"]) for case in report(tmp_path)["cases"]] == [
        ("amos_0001", "ct"),
        ("amos_0507", "mr"),
    ]
    found = [np.asarray(nib.load(tmp_path / f"out/amos_{case}.nii.gz").dataobj) for case in ("0001", "0507")]
    np.testing.assert_array_equal(found[0], labels_of(0))
    np.testing.assert_array_equal(found[1], np.where(labels_of(1) == 2, 2, 0))
    assert "each is normalised by its own" in capsys.readouterr().out
    (extension,) = nib.load(tmp_path / "out/amos_0001.nii.gz").header.extensions
    assert json.loads(bytes(extension.get_content()).rstrip(b"\0")) == {"labels": {"1": "liver", "2": "spleen"}}
    assert infer.run(config(tmp_path, data_path=folder, modality="ct")) == 0
    assert {case["modality"] for case in report(tmp_path)["cases"]} == {"ct"}
