"""preprocess and every kind of bad case, folder and process: what is said, and that the rest goes on."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.errors import ConfigError, DatasetError, OutputError
from mambahome_jax.patches import store
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing import case as prepare_module
from mambahome_jax.preprocessing import dataset
from mambahome_jax.support import processes
from mambahome_jax.support.processes import WorkerDied
from tests.commands.scans import AFFINE, description, preprocess_config, reasons, scan, write


@pytest.fixture
def config(tmp_path):
    return preprocess_config(tmp_path)


def truncated(folder: Path) -> None:
    path = folder / "images/b.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def too_few_voxels(folder: Path) -> None:
    path = folder / "images/b.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40]))


def nan(folder: Path) -> None:
    image = scan()[0].astype(np.float32)
    image[1, 2, 3] = np.nan
    write(folder / "images/b.nii.gz", image)


def four_dimensions(folder: Path) -> None:
    write(folder / "images/b.nii.gz", np.stack([scan()[0]] * 2, axis=-1))


def other_shape(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", scan((12, 16, 9))[1])


def shifted(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[2, 3] += 1.5
    write(folder / "labels/b.nii.gz", scan()[1], affine)


def unknown_values(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "spleen"}}))
    label = scan()[1]
    label[0, 0, :2] = 9, 200
    write(folder / "labels/b.nii.gz", label)


def values_above_65535(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", scan()[1].astype(np.int32) * 90000)


def negative_values(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", -scan()[1].astype(np.int16))


def nan_in_label(folder: Path) -> None:
    label = scan()[1]
    write(folder / "labels/b.nii.gz", np.where(label == 0, np.nan, label).astype(np.float32))


def image_as_label(folder: Path) -> None:
    image = write(folder / "images/b.nii.gz", np.clip(scan()[0], 0, 255).astype(np.int16))
    write(folder / "labels/b.nii.gz", np.asarray(nib.load(image).dataobj))


def fractional_label(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", scan()[1].astype(np.float32) * 0.5)


def label_without_image(folder: Path) -> None:
    (folder / "images/b.nii.gz").unlink()


@pytest.mark.parametrize(
    ("break_case", "words"),
    [
        (truncated, ("images/b.nii.gz", "truncated")),
        (too_few_voxels, ("images/b.nii.gz", "truncated")),
        (nan, ("images/b.nii.gz", "1 voxel is NaN")),
        (four_dimensions, ("images/b.nii.gz", "(12, 16, 8, 2)", "3D")),
        (other_shape, ("labels/b.nii.gz", "grid of 12 x 16 x 9 voxels; expected 12 x 16 x 8 as in the image")),
        (shifted, ("labels/b.nii.gz", "up to 1.5 mm (0.5 voxels) off the image's")),
        (unknown_values, ("labels/b.nii.gz", "unknown label values 9, 200; expected 1 liver, 2 spleen")),
        (values_above_65535, ("labels/b.nii.gz", "label values from 0 to 180000; expected 0 to 65535", "--label_map")),
        (negative_values, ("labels/b.nii.gz", "label values from -2 to 0; expected 0 to 65535", "--label_map")),
        (nan_in_label, ("labels/b.nii.gz", "are NaN or infinite", "Write 0, the background")),
        (image_as_label, ("labels/b.nii.gz", "every voxel is as in its image; expected a label map")),
        (fractional_label, ("labels/b.nii.gz", "label value 0.5; expected whole numbers")),
        (label_without_image, ("labels/b.nii.gz has no image; expected images/b.nii.gz",)),
    ],
)
def test_a_bad_case_is_reported_and_the_rest_goes_on(config, capsys, break_case, words):
    break_case(config.input_path)
    assert run(config) == 1
    assert [case["id"] for case in description(config)["cases"]] == ["a", "c"]
    assert Store(config.output_path).cases == ("a", "c")
    shown = capsys.readouterr().out
    for word in words:
        assert word in reasons(config)["b"] and word in shown
    assert "2 done, 0 kept, 1 failed" in shown
    left = [path.name for path in config.output_path.rglob("*") if path.name.startswith((".", "b"))]
    assert left == []


def test_memory_is_judged_past_a_scan_whose_grid_is_refused(config):
    for name, voxels in zip(("images", "labels"), scan(), strict=True):
        write(config.input_path / name / "b.nii.gz", voxels, np.diag([1000.0, 1000.0, 1000.0, 1.0]))
    assert run(replace(config, num_workers=2, spacing_scale=1)) == 1
    assert [case["id"] for case in description(config)["cases"]] == ["a", "c"]
    assert "images/b.nii.gz" in reasons(config)["b"] and "at most 512 times as many" in reasons(config)["b"]


def test_grids_that_agree_up_to_rounding_are_one_grid(config):
    affine = AFFINE.copy()
    affine[:3, 3] += 0.05
    write(config.input_path / "labels/b.nii.gz", scan()[1], affine)
    assert run(config) == 0
    paths = [config.output_path / f"{kind}/b.nii.gz" for kind in ("images", "labels")]
    np.testing.assert_array_equal(nib.load(paths[0]).affine, nib.load(paths[1]).affine)


def test_nothing_usable_is_exit_code_2(config):
    for path in config.input_path.glob("images/*"):
        path.write_bytes(b"no scan")
    assert run(config) == 2
    assert description(config)["cases"] == [] and len(reasons(config)) == 3


def test_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written.*name another --output_path"):
        run(replace(config, output_path=tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        run(replace(config, output_path=tmp_path / "file/below"))


@pytest.mark.parametrize(("good", "code"), [(1, 1), (0, None)])
def test_full_disk_keeps_what_is_done_and_stops(config, monkeypatch, capsys, good, code):
    written = []

    def write_volume(path, *args, **kwargs):
        written.append(path)
        if len(written) > 2 * good:
            raise OutputError(f"{path.parent}: cannot write {path.name}: No space left on device")
        return prepare_module_write(path, *args, **kwargs)

    prepare_module_write = prepare_module.write_volume
    monkeypatch.setattr(prepare_module, "write_volume", write_volume)
    if code is None:
        with pytest.raises(OutputError, match="No space left on device"):
            run(config)
        return
    assert run(config) == code
    assert [case["id"] for case in description(config)["cases"]] == ["a"]
    assert "No space left on device" in reasons(config)["b"]
    assert "cannot be written" in reasons(config)["c"]
    monkeypatch.undo()
    assert run(config) == 0
    assert "2 done, 1 kept" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["image", "label", "foreground.npz"])
def test_a_case_that_does_not_fit_leaves_no_file_and_one_line(config, monkeypatch, capsys, part):
    write_array, savez = store._write_array, np.savez

    def full(path, *_):
        if path.name == part:
            raise OSError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [errno=ENOSPC 28]")
        write_array(path, *_)

    def full_savez(path, **arrays):
        if path.name == part:
            raise OSError(28, "No space left on device")
        savez(path, **arrays)

    monkeypatch.setattr(store, "_write_array", full)
    monkeypatch.setattr(np, "savez", full_savez)
    with pytest.raises(OutputError) as caught:
        run(config)
    found = config.output_path / "store/a"
    assert str(caught.value) == (
        f"{found}: cannot be written: No space left on device. Free some space or name another output folder"
    )
    assert "No space" not in capsys.readouterr().out
    assert [path for path in config.output_path.rglob("*") if path.is_file()] == []
    assert list(config.output_path.glob("store/*")) == []


def test_case_whose_process_died_or_ran_out_of_memory(config, monkeypatch):
    def run_jobs(function, jobs, workers, threads):
        results = {"a": WorkerDied("its process was killed"), "b": MemoryError("3 GiB")}
        for job in jobs:
            yield job, results.get(job.case.id) or function(job)

    monkeypatch.setattr(dataset, "run_jobs", run_jobs)
    assert run(config) == 1
    assert "its process was killed" in reasons(config)["a"]
    assert "out of memory (3 GiB). Try fewer --num_workers" in reasons(config)["b"]


def test_a_fault_of_ours_shows_its_traceback_and_the_rest_goes_on(config, monkeypatch, capsys):
    def fail_for_b(job):
        if job.case.id == "b":
            raise ZeroDivisionError("ours")
        return prepare_module.prepare_case(job)

    monkeypatch.setattr(dataset, "prepare_case", fail_for_b)
    assert run(config) == 1
    assert reasons(config) == {"b": "ZeroDivisionError: ours"}
    assert "Traceback" in capsys.readouterr().out


def test_fewer_processes_where_memory_is_short(config, monkeypatch, capsys):
    monkeypatch.setattr(processes, "available_memory", lambda: 2**10)
    assert run(replace(config, num_workers=3)) == 0
    assert "1 process instead of 3" in capsys.readouterr().out


def test_wrong_configuration(config):
    with pytest.raises(ConfigError, match="same folder"):
        run(replace(config, output_path=config.input_path))
    with pytest.raises(ConfigError, match="orientation"):
        run(replace(config, orientation="RRS"))
    with pytest.raises(ConfigError, match="num_workers"):
        run(replace(config, num_workers=-1))
    with pytest.raises(DatasetError, match="no such folder"):
        run(replace(config, input_path=config.input_path / "nowhere"))
    assert not config.output_path.exists() or not list(config.output_path.glob("images/*"))
