"""preprocess from files to files: numbers, what is kept on a second run."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.imaging.volume import read_volume
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.dataset import prepare_dataset
from tests.commands.scans import AFFINE, description, preprocess_config, reasons, scan, write


@pytest.fixture
def config(tmp_path):
    return preprocess_config(tmp_path)


def test_writes_resampled_files_and_store(config, capsys):
    assert run(config) == 0
    content = description(config)
    assert content["version"] == 1 and content["name"] == "in" and content["spacing"] == [1, 1, 3]
    assert content["labels"] == {"1": "label_1", "2": "label_2"} and content["skipped"] == []
    assert [case["id"] for case in content["cases"]] == ["a", "b", "c"]
    assert content["cases"][0] == {
        "id": "a",
        "image": "images/a.nii.gz",
        "label": "labels/a.nii.gz",
        "split": None,
        "modality": "ct",
        "shape": [23, 16, 8],
        "spacing": [1.0, 1.0, 3.0],
        "source": "images/a.nii.gz",
    }
    image, label = (nib.load(config.output_path / content["cases"][0][key]) for key in ("image", "label"))
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.float32, np.uint8)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(label.affine, image.affine)

    store = Store(config.output_path)
    np.testing.assert_array_equal(store.read_image("a")[..., 0], image.get_fdata())
    np.testing.assert_array_equal(store.read_label("a"), np.asarray(label.dataobj))
    entry = store.entry("a")
    assert (entry.shape, entry.spacing, entry.modality) == ((23, 16, 8), (1.0, 1.0, 3.0), "ct")
    np.testing.assert_allclose(entry.affine, image.affine)
    values, counts = np.unique(label.dataobj, return_counts=True)
    assert entry.class_counts == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert entry.statistics.minimum == (image.get_fdata().min(),)
    inside = np.argwhere(image.get_fdata() > -175)
    assert entry.body_box == (tuple(inside.min(axis=0)), tuple(inside.max(axis=0) + 1))

    shown = capsys.readouterr().out
    assert "Modality: ct, guessed from the lowest values of 3 scans" in shown and "--modality" in shown
    assert "3 done, 0 kept, 0 failed" in shown and "label_1: " in shown
    assert f"Next: mambahome train --data_train {config.output_path}" in shown


def test_resampled_voxels_lie_where_their_affine_says(config):
    index = np.stack(np.meshgrid(*map(np.arange, (12, 16, 8)), indexing="ij"), axis=-1)
    world = index @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    ramp = world @ [1.0, 10.0, 100.0]
    write(config.input_path / "images/a.nii.gz", ramp.astype(np.float32))
    assert run(replace(config, spacing=(0.7, 0, 2), orientation="PIR")) == 0
    found = read_volume(config.output_path / "images/a.nii.gz")
    np.testing.assert_allclose(found.spacing, (0.7, 3.0, 2.0), atol=1e-6)
    index = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1)
    expected = (index @ found.affine[:3, :3].T + found.affine[:3, 3]) @ [1.0, 10.0, 100.0]
    # The last new voxel may lie beyond the old grid, where the edge value goes on.
    np.testing.assert_allclose(found.array[:-1, :, :-1], expected[:-1, :, :-1], rtol=1e-5, atol=1e-2)


def test_second_run_keeps_what_is_up_to_date(config, capsys):
    run(config)
    before = {path: path.stat().st_mtime_ns for path in config.output_path.rglob("*.nii.gz")}
    capsys.readouterr()
    assert run(config) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 cases up to date and kept" in shown and "0 done, 3 kept, 0 failed" in shown
    assert {path: path.stat().st_mtime_ns for path in config.output_path.rglob("*.nii.gz")} == before
    assert len(description(config)["cases"]) == 3
    assert run(replace(config, overwrite=True)) == 0
    assert "3 done, 0 kept" in capsys.readouterr().out


def test_changed_source_settings_and_lost_results_are_done_again(config, capsys):
    run(config)
    image, _ = scan(seed=9)
    write(config.input_path / "images/b.nii.gz", image)
    os.utime(config.input_path / "images/b.nii.gz", ns=(1, 1))
    capsys.readouterr()
    run(config)
    assert "1 done, 2 kept" in capsys.readouterr().out
    (config.output_path / "labels/c.nii.gz").unlink()
    run(config)
    assert "1 done, 2 kept" in capsys.readouterr().out
    (config.input_path / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "spleen"}}))
    run(config)
    assert "3 done, 0 kept" in capsys.readouterr().out
    assert description(config)["labels"] == {"1": "liver", "2": "spleen"}
    run(replace(config, spacing=(2, 1, 3)))
    assert "3 done, 0 kept" in capsys.readouterr().out
    assert description(config)["cases"][0]["shape"] == [12, 16, 8]


def test_other_content_of_the_same_size_and_time_is_done_again(config, capsys):
    source = config.input_path / "images/b.nii"
    for name, seed in (("b", 1), ("c", 2)):
        (config.input_path / f"images/{name}.nii.gz").unlink()
        write(config.input_path / f"images/{name}.nii", scan(seed=seed)[0])
    run(config)
    before, times = Store(config.output_path).read_image("b"), source.stat()
    write(source, scan(seed=9)[0])
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.stat().st_size == times.st_size
    capsys.readouterr()
    run(config)
    assert "1 done, 2 kept" in capsys.readouterr().out
    assert not np.array_equal(Store(config.output_path).read_image("b"), before)


def test_a_dataset_that_was_moved_or_copied_is_kept(config, tmp_path, capsys):
    run(config)
    shutil.copytree(config.input_path, tmp_path / "copy")
    moved = replace(config, input_path=config.input_path.rename(tmp_path / "moved"))
    capsys.readouterr()
    for path in (moved.input_path, tmp_path / "copy"):
        run(replace(config, input_path=path))
        assert "0 done, 3 kept" in capsys.readouterr().out


def test_what_an_earlier_version_made_is_kept_as_it_kept_it(config, capsys):
    run(config)
    for case in "abc":
        file = config.output_path / f"store/{case}/case.json"
        entry = json.loads(file.read_text())
        paths = [config.input_path / f"{part}/{case}.nii.gz" for part in ("images", "labels")]
        places = [hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest() for path in paths]
        times = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        entry["fingerprint"]["sources"] = [[place, *time] for place, time in zip(places, times, strict=True)]
        file.write_text(json.dumps(entry))
    os.utime(config.input_path / "images/b.nii.gz", ns=(1, 1))
    capsys.readouterr()
    run(config)
    assert "1 done, 2 kept" in capsys.readouterr().out


def test_removed_and_newly_bad_cases_leave_the_index(config):
    run(config)
    (config.input_path / "images/a.nii.gz").unlink()
    (config.input_path / "labels/a.nii.gz").unlink()
    path = config.input_path / "images/b.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    assert run(config) == 1
    assert [case["id"] for case in description(config)["cases"]] == ["c"]
    assert Store(config.output_path).cases == ("c",)
    assert list(reasons(config)) == ["b"]


def test_images_without_labels_are_kept_unlabelled(config, capsys):
    (config.input_path / "labels/b.nii.gz").unlink()
    assert run(config) == 0
    assert "1 images have no label" in capsys.readouterr().out
    assert [case["label"] is None for case in description(config)["cases"]] == [False, True, False]
    assert Store(config.output_path).entry("b").class_counts is None
    assert not (config.output_path / "labels/b.nii.gz").exists()


def test_modality_by_request_or_by_values(config, capsys):
    assert run(replace(config, modality="us")) == 0
    assert Store(config.output_path).entry("a").modality == "us"
    assert "us, as asked for by --modality" in capsys.readouterr().out
    for name in "abc":
        write(config.input_path / f"images/{name}.nii.gz", scan()[0] + np.int16(1000))
    assert run(config) == 0
    assert Store(config.output_path).entry("a").modality == "mr"
    assert "no Hounsfield units of air" in capsys.readouterr().out


def test_decathlon_with_channels_and_test_cases(tmp_path, capsys):
    source = tmp_path / "Task01"
    for folder, name in (("imagesTr", "a"), ("imagesTs", "t")):
        image = np.stack([scan(seed=1)[0] + np.int16(1000), scan(seed=2)[0]], axis=-1)
        write(source / folder / f"{name}.nii.gz", image)
    write(source / "labelsTr/a.nii.gz", scan(seed=1)[1])
    (source / "imagesTr/._a.nii.gz").write_bytes(b"macOS")
    content = {"name": "Brain", "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "x", "2": "y"}}
    content["training"] = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    (source / "dataset.json").write_text(json.dumps(content))
    config = PreprocessConfig(source, tmp_path / "out", spacing=(-1, 2, 3), num_workers=1)
    assert run(config) == 0
    found = description(config)
    assert (found["name"], found["channels"], found["labels"]) == ("Brain", ["T2", "ADC"], {"1": "x", "2": "y"})
    assert [(c["id"], c["split"], c["label"] is None) for c in found["cases"]] == [
        ("a", "train", False),
        ("t", "test", True),
    ]
    store = Store(config.output_path)
    assert store.read_image("a").shape == (12, 8, 8, 2) == store.read_image("t").shape
    assert len(store.entry("a").statistics.mean) == 2
    assert nib.load(config.output_path / "images/a.nii.gz").shape == (12, 8, 8, 2)
    assert "Modality: mr, as the dataset says" in capsys.readouterr().out


def test_store_alone_from_the_published_layout(tmp_path):
    image, label = scan()
    write(tmp_path / "in/p1/ct.nii.gz", image)
    write(tmp_path / "in/p1/labels.nii.gz", label)
    config = PreprocessConfig(tmp_path / "in", tmp_path / "out", num_workers=1)
    summary = prepare_dataset(load_dataset(config.input_path), config, store_only=True)
    assert (summary.exit_code, summary.done) == (0, ("p1",))
    assert not (tmp_path / "out/images").exists()
    found = read_prepared(tmp_path / "out")
    assert (found.spacing, found.orientation) == (None, "RAS")
    assert found.image_path(found.cases[0]) == (tmp_path / "in/p1/ct.nii.gz").resolve()
    # From LPS to RAS: two axes turn round, no value changes.
    np.testing.assert_array_equal(Store(tmp_path / "out").read_image("p1")[..., 0], image[::-1, ::-1])
    np.testing.assert_array_equal(Store(tmp_path / "out").read_label("p1"), label[::-1, ::-1])
    again = prepare_dataset(load_dataset(config.input_path), config, store_only=True)
    assert (again.done, again.kept) == ((), ("p1",))


def test_several_processes_give_the_same_files(config, tmp_path):
    (config.input_path / "images/b.nii.gz").write_bytes(b"no scan")
    alone, together = (replace(config, output_path=tmp_path / name, num_workers=n) for name, n in (("x", 1), ("y", 2)))
    assert (run(alone), run(together)) == (1, 1)
    for name in ("images/a.nii.gz", "labels/c.nii.gz", "dataset.json", "store/index.json"):
        assert (alone.output_path / name).read_bytes() == (together.output_path / name).read_bytes()


def test_cases_of_one_image_are_one_patient(config, capsys):
    """Under two names, one of them would be held out while the other is trained on."""
    image, label = scan()
    write(config.input_path / "images" / "x.nii.gz", image)
    write(config.input_path / "labels" / "x.nii.gz", label)
    run(config)
    out = " ".join(capsys.readouterr().out.split())
    assert "Note: x and a are the same image, and count as one patient" in out
    patients = {case.id: case.patient for case in read_prepared(config.output_path).cases}
    assert patients["x"] == patients["a"] and len({*patients.values()}) == 3
