"""MetaImage, NRRD and DICOM give preprocess, check and evaluate what the same scans as NIfTI give them."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.commands import check, evaluate, preprocess
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.flags import CheckConfig, EvaluateConfig, PreprocessConfig
from mambahome_jax.imaging.volume import Volume, read_grid, read_volume, write_volume
from mambahome_jax.patches.store import Store
from tests.commands import test_infer_formats
from tests.commands.test_infer_formats import labels_of, scan, write_dicom

# Axes permuted and flipped. Oblique ones would differ after resampling: NIfTI's are rounded to float32, and by MONAI's
# rule, which preprocess keeps to, the new grid of axes that are not quite at right angles begins elsewhere.
AFFINE = np.array([[0, 0, -1.25, 30.5], [-2, 0, 0, -14], [0, 0.75, 0, 99.25], [0, 0, 0, 1]])
CASES = {"a": "mha", "b": "mhd", "c": "nrrd", "d": "dicom"}


def write_image(folder, case, kind):
    if kind == "dicom":
        write_dicom(folder / case)
    elif kind == "mhd":  # which is not written here
        write_image(folder, case, "mha")
        sitk.WriteImage(sitk.ReadImage(str(folder / f"{case}.mha")), str(folder / f"{case}.mhd"))
        (folder / f"{case}.mha").unlink()
    else:
        write_volume(folder / f"{case}.{kind}", Volume(np.rint(scan().array).astype(np.int16), scan().affine))


@pytest.fixture
def both(tmp_path, monkeypatch):
    """The same cases in `other` formats and as `nifti`, with labels as .nrrd, .mha and .nii.gz."""
    monkeypatch.setattr(test_infer_formats, "AFFINE", AFFINE)
    for number, (case, kind) in enumerate(CASES.items()):
        write_image(tmp_path / "other/images", case, kind)
        image = read_volume(tmp_path / f"other/images/{case}{'' if kind == 'dicom' else '.' + kind}")
        # Slices come in the order of their positions, which is not that of the files.
        labels = Volume(labels_of()[:, :, ::-1] if kind == "dicom" else labels_of(), image.affine)
        write_volume(tmp_path / f"other/labels/{case}.{('nrrd', 'mha', 'nii.gz', 'nrrd')[number]}", labels)
        write_volume(tmp_path / f"nifti/images/{case}.nii.gz", image)
        write_volume(tmp_path / f"nifti/labels/{case}.nii.gz", labels)
    for name in ("other", "nifti"):
        (tmp_path / name / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "spleen"}}))
    return tmp_path


def test_preprocess(both):
    for name in ("other", "nifti"):
        config = PreprocessConfig(both / name, both / f"{name}_ready", spacing=(1, 1, 2), modality="ct", num_workers=2)
        assert preprocess.run(config) == 0
    ours, theirs = (Store(both / f"{name}_ready") for name in ("other", "nifti"))
    for case in CASES:
        np.testing.assert_allclose(ours.read_image(case), theirs.read_image(case), atol=1e-3)
        np.testing.assert_array_equal(ours.read_label(case), theirs.read_label(case))
        assert np.count_nonzero(ours.read_label(case)) > 100


def test_preprocess_keeps_what_is_done_and_sees_a_slice_that_changed(both, capsys):
    config = PreprocessConfig(both / "other", both / "ready", spacing=(1, 1, 2), modality="ct", num_workers=1)
    assert preprocess.run(config) == 0
    assert preprocess.run(config) == 0
    assert "4 of 4 cases up to date" in capsys.readouterr().out
    for file in (both / "other/images/d/IM003", both / "other/images/b.raw"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert preprocess.run(config) == 0
    assert "2 of 4 cases up to date" in capsys.readouterr().out
    (both / "other/images/d/IM003").unlink()
    assert preprocess.run(config) == 1
    assert "missing or uneven slices" in capsys.readouterr().out


def test_check(both, capsys):
    assert check.run(CheckConfig(both / "other", json=both / "check.json")) == check.run(CheckConfig(both / "nifti"))
    assert "4 cases" in capsys.readouterr().out
    content = json.loads((both / "check.json").read_text())
    assert "unreadable" not in str(content) and "'error': 0" in str(content)
    assert check.run(CheckConfig(both / "other", fast=True)) in (0, 1)


def test_evaluate(both):
    (both / "other/labels/b.mha").rename(both / "b.mha")
    write_volume(both / "other/labels/b.nrrd", Volume(np.roll(labels_of(), 1, 0), scan().affine))
    config = EvaluateConfig(both / "other/labels", both / "nifti/labels", both / "scored")
    assert evaluate.run(config) == 0
    summary = json.loads((both / "scored/summary.json").read_text())
    assert summary["cases"] == 4
    rows = (both / "scored/metrics.csv").read_text().splitlines()
    assert rows[1].startswith("a,liver,1,0,0,1,") and not rows[3].startswith("b,liver,1,")
    # A single pair, in two formats.
    assert evaluate.run(EvaluateConfig(both / "b.mha", both / "nifti/labels/b.nii.gz", both / "one")) == 0
    assert json.loads((both / "one/summary.json").read_text())["mean"]["dice"] == 1


def test_geometry_comes_from_headers(both):
    for case, kind in CASES.items():
        path = both / f"other/images/{case}{'' if kind == 'dicom' else '.' + kind}"
        grid = read_grid(path)
        assert grid.array.shape == read_volume(path).array.shape
        np.testing.assert_array_equal(grid.affine, read_volume(path).affine)
    write_volume(both / "several.mha", Volume(np.zeros((3, 4, 5, 2), np.int16), np.eye(4)))
    assert read_grid(both / "several.mha").array.shape == (3, 4, 5, 2)


def test_other_layouts(tmp_path):
    write_image(tmp_path / "slices", "p1", "dicom")
    write_image(tmp_path / "slices", "p2", "nrrd")
    write_volume(tmp_path / "p1.seg.nrrd", Volume(labels_of(), scan().affine))
    (tmp_path / "cases.csv").write_text("image,label\nslices/p1,p1.seg.nrrd\nslices/p2.nrrd,p1.seg.nrrd\nslices,\n")
    dataset = load_dataset(tmp_path / "cases.csv")
    assert [(case.id, case.image.name) for case in dataset.cases] == [("p1", "p1"), ("p2", "p2.nrrd")]
    assert "slices is no scan by its name" in dataset.skipped[0][1]
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".mha"}
    write_image(tmp_path / "raw/imagesTr", "x_0000", "mha")
    write_volume(tmp_path / "raw/labelsTr/x.mha", Volume(labels_of(), scan().affine))
    (tmp_path / "raw/dataset.json").write_text(json.dumps(content | {"numTraining": 1}))
    case = load_dataset(tmp_path / "raw").cases[0]
    assert (case.id, case.image.name, case.label.name) == ("x", "x_0000.mha", "x.mha")
