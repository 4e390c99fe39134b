"""Options of infer, end to end on small scans: what is written, what is kept, what is refused."""

import csv
import json

import numpy as np
import pytest

from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume
from mambahome_jax.inference import batch, result_files
from mambahome_jax.inference.segment import segment
from tests.commands.scans import write
from tests.inference.models import Levels

EVERY_AXIS = ("LR", "AP", "IS")
PROPERTIES = DataProperties(
    spacing=None, labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32), mirror=EVERY_AXIS
)
MODELS = {
    "a": Levels((0.0, 0.5, 1.0), metadata=PROPERTIES),
    "b": Levels((0.0, 0.8, 1.0), metadata=PROPERTIES),
    "coarse": Levels((0.0, 0.5, 1.0), metadata=DataProperties(spacing=(4, 4, 4), labels=PROPERTIES.labels)),
}
VOXEL_ML = 0.006


@pytest.fixture(autouse=True)
def by_name(monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: MODELS[path.name])


def labels_of():
    labels = np.zeros((20, 18, 12), np.uint8)
    labels[3:8, 4:9, 2:8], labels[11:16, 8:15, 5:9], labels[18:20, 16:18, 1:3] = 1, 2, 2
    return labels


def config(folder, **changes):
    for case in ("one", "two"):
        if not (folder / "in" / f"{case}.nii.gz").exists():
            write(folder / "in" / f"{case}.nii.gz", np.array([-175, 37.5, 250], np.float32)[labels_of()])
    paths = {"data_path": folder / "in", "model_path": folder / "a", "output_dir": folder / "out", "previews": False}
    return InferConfig(**(paths | changes))


def table(folder):
    with (folder / "out" / "volumes.csv").open(newline="") as file:
        return {(row["case"], row["structure"]): float(row["volume_ml"]) for row in csv.DictReader(file)}


def test_volumes_are_tabled_in_a_file_and_on_the_screen(tmp_path, capsys):
    settings = config(tmp_path)
    write(tmp_path / "in" / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    assert infer.run(settings) == 1
    expected = {name: round((labels_of() == value).sum() * VOXEL_ML, 4) for value, name in PROPERTIES.labels}
    assert table(tmp_path) == {(case, name): ml for case in ("one", "two") for name, ml in expected.items()}
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "spleen" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["spleen", "2", *[f"{expected['spleen']:.4g}"] * 3]
    assert len([line for line in printed.splitlines() if line.startswith("Failed nan: ")]) == 1
    assert "2 of 3 scans segmented" in printed


def test_options_do_what_segment_does(tmp_path):
    options = {"tta": True, "keep_largest": ("all",), "labels": ("spleen",)}
    paths = tuple(tmp_path / name for name in "ab")
    assert infer.run(config(tmp_path, model_path=paths, save_probabilities=True, **options)) == 0
    models = [MODELS["a"], MODELS["b"]]
    scan = read_volume(tmp_path / "in" / "one.nii.gz")
    result = segment(models, scan, save_probabilities=tmp_path / "one.npz", **options)
    found = read_labels(tmp_path / "out" / "one.nii.gz")
    np.testing.assert_array_equal(found.array, result.array)
    largest = np.where(labels_of() == 2, 2, 0)
    largest[18:] = 0
    np.testing.assert_array_equal(found.array, largest)
    with np.load(tmp_path / "one.npz") as ours, np.load(tmp_path / "out" / "one.npz") as theirs:
        np.testing.assert_array_equal(ours["probabilities"], theirs["probabilities"])
        np.testing.assert_array_equal(ours["affine"], theirs["affine"])
        # In the network's orientation RAS, at the scan's own spacing.
        assert ours["probabilities"].shape == (20, 18, 12, 3)
        np.testing.assert_allclose(np.diag(ours["affine"]), [2, 1, 3, 1])
    assert set(table(tmp_path)) == {("one", "spleen"), ("two", "spleen")}
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["labels"] == {"2": "spleen"}
    assert report["configuration"]["model_path"] == [str(path) for path in paths]
    assert [axis for axis, _ in report["settings"]["mirrors"]] == [0, 1, 2]


def test_whole_results_are_skipped_and_counted(tmp_path, capsys):
    settings = config(tmp_path, skip_existing=True, save_probabilities=True)
    assert infer.run(settings) == 0
    volumes = table(tmp_path)
    files = {case: tmp_path / "out" / f"{case}.nii.gz" for case in ("one", "two")}
    whole = files["two"].read_bytes()
    times = files["one"].stat().st_mtime_ns
    files["two"].write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert infer.run(settings) == 0
    assert files["one"].stat().st_mtime_ns == times
    assert files["two"].read_bytes() == whole
    assert table(tmp_path) == volumes
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [(case["id"], case.get("kept", False)) for case in report["cases"]] == [("one", True), ("two", False)]
    printed = capsys.readouterr().out
    assert "1 results are there already and whole" in printed and "another" not in printed
    (tmp_path / "out" / "one.npz").unlink()
    assert infer.run(settings) == 0
    assert (tmp_path / "out" / "one.npz").exists()
    capsys.readouterr()
    assert infer.run(config(tmp_path, skip_existing=True, keep_largest=("all",), num_workers=2)) == 0
    assert "Note: some of those that are kept were made by another --keep_largest" in capsys.readouterr().out
    # Who made them is not forgotten by a run that only kept them.
    assert infer.run(config(tmp_path, skip_existing=True, keep_largest=("all",))) == 0
    assert "made by another --keep_largest" in capsys.readouterr().out
    assert infer.run(settings) == 0
    assert "made by another" not in capsys.readouterr().out
    for damaged in ("[]", "{", '{"configuration": 1}', '{"cases": 1}', '{"cases": [1, {"id": 1}, {"id": "one"}]}'):
        (tmp_path / "out" / "run.json").write_text(damaged)
        assert infer.run(config(tmp_path, skip_existing=True, keep_largest=("all",))) == 0


def test_results_of_other_programs_and_of_earlier_versions_are_found_by_either_name(tmp_path, capsys):
    settings = config(tmp_path, skip_existing=True)
    for case in ("one", "two"):
        (tmp_path / f"in/{case}.nii.gz").rename(tmp_path / f"in/{case}_0000.nii.gz")
    assert infer.run(settings) == 0
    (tmp_path / "out/one.nii.gz").rename(tmp_path / "out/one_0000.nii.gz")
    capsys.readouterr()
    assert infer.run(settings) == 0
    cases = json.loads((tmp_path / "out/run.json").read_text())["cases"]
    assert [(case["id"], case["output"], case.get("kept")) for case in cases] == [
        ("one", "one_0000.nii.gz", True),
        ("two", "two.nii.gz", True),
    ]
    assert not (tmp_path / "out/one.nii.gz").exists()


@pytest.mark.parametrize("change", ["shape", "affine"])
def test_a_result_on_another_grid_than_its_scan_is_not_kept(tmp_path, change):
    settings = config(tmp_path, skip_existing=True)
    assert infer.run(settings) == 0
    scan = tmp_path / "in" / "one.nii.gz"
    volume = read_volume(scan)
    shift = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]) if change == "affine" else 0
    array = volume.array[1:] if change == "shape" else volume.array
    write_volume(scan, Volume(array, volume.affine + shift))
    assert infer.run(settings) == 0
    result = read_labels(tmp_path / "out" / "one.nii.gz")
    assert result.shape == array.shape and np.allclose(result.affine, volume.affine + shift)
    cases = json.loads((tmp_path / "out/run.json").read_text())["cases"]
    assert [(case["id"], case.get("kept", False)) for case in cases] == [("one", False), ("two", True)]


def test_a_case_that_was_stopped_at_its_preview_is_not_kept_without_one(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(result_files, "write_preview", stopped)
        infer.run(config(tmp_path, previews=True))
    assert infer.run(config(tmp_path, previews=True, skip_existing=True)) == 0
    assert {path.stem for path in (tmp_path / "out/previews").iterdir()} == {"one", "two"}


def test_what_does_not_fit_is_refused_before_the_first_scan(tmp_path):
    with pytest.raises(
        ConfigError, match=r"coarse cannot be joined with .*a: spacing 4 x 4 x 4 mm against of the scan"
    ):
        infer.run(config(tmp_path, model_path=(tmp_path / "a", tmp_path / "coarse")))
    with pytest.raises(ConfigError, match=r"--labels heart: .* expected some of liver, spleen"):
        infer.run(config(tmp_path, labels=("heart",)))
    for changes in ({"num_workers": -2}, {"spacing": (-1.0, 1.0, 1.0)}, {"spacing": (np.nan, 1.0, 1.0)}):
        with pytest.raises(ConfigError, match=f"--{next(iter(changes))} .*expected"):
            infer.run(config(tmp_path, **changes))
    with pytest.raises(ConfigError, match="--keep_largest heart"):
        infer.run(config(tmp_path, keep_largest=("heart",)))
    assert not (tmp_path / "out").exists()


def test_axes_that_cannot_be_mirrored_are_named(tmp_path, monkeypatch, capsys):
    labels = ((1, "left atrium"), (2, "aorta"))
    properties = DataProperties(spacing=None, labels=labels, mirror=EVERY_AXIS, patch_size=(16, 16, 32))
    model = Levels((0.0, 0.5, 1.0), metadata=properties)
    monkeypatch.setattr(batch, "load_model", lambda path, precision: model)
    assert infer.run(config(tmp_path, tta=True)) == 0
    assert "Note: tta leaves the left-right axis out" in capsys.readouterr().out


def test_windows_are_spread_over_devices(tmp_path):
    assert infer.run(config(tmp_path, num_devices=1)) == 0
    one = [read_labels(tmp_path / "out" / f"{case}.nii.gz").array for case in ("one", "two")]
    assert infer.run(config(tmp_path, num_devices=2)) == 0
    for case, expected in zip(("one", "two"), one, strict=True):
        np.testing.assert_array_equal(read_labels(tmp_path / "out" / f"{case}.nii.gz").array, expected)
    with pytest.raises(ConfigError, match="--num_devices 99: this machine has"):
        infer.run(config(tmp_path, num_devices=99))
