"""Scans whose headers say their place in several ways, or in a wrong unit, through every command."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.commands import check, evaluate, infer, preprocess, report, train
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.base import Case
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import CheckConfig, EvaluateConfig, InferConfig, PreprocessConfig, ReportConfig, TrainConfig
from mambahome_jax.imaging.volume import read_labels, read_volume
from mambahome_jax.inference import batch
from mambahome_jax.preprocessing.case import CaseJob, prepare_case
from tests.imaging.dicom_files import write_slice
from tests.imaging.nifti_headers import MOVED, OBLIQUE, STRAIGHT, apart, in_itk, save, sheared
from tests.inference.models import Levels

PROPERTIES = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32))
LABELS = np.zeros((20, 18, 14), np.uint8)
LABELS[3:9, 4:9, 2:8], LABELS[11:16, 8:15, 5:9] = 1, 2
CT = np.array([-1000, 37, 250], np.int16)[LABELS]
# sform and its code, qform and its code, unit
HEADERS = {
    "alike": (OBLIQUE, 1, OBLIQUE, 1, 2),
    "registered": (STRAIGHT, 4, MOVED, 1, 2),
    "aligned": (OBLIQUE, 2, STRAIGHT, 2, 0),
    "neither": (STRAIGHT, 0, STRAIGHT, 0, 2),
    "micrometres": (sheared(0.015), 1, STRAIGHT, 1, 2),
    "metre": (STRAIGHT, 1, MOVED, 1, 1),
    "micron": (STRAIGHT, 0, OBLIQUE, 1, 3),
}


@pytest.fixture
def levels(monkeypatch):
    """A model whose classes are levels of intensity instead of what --model_path names."""
    model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES)  # noqa: E731
    monkeypatch.setattr(batch, "load_model", model)


@pytest.fixture
def scans(tmp_path):
    """images/ of every header, and labels/ drawn over them in an ITK program, in several formats."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    drawn = sitk.GetImageFromArray(LABELS.transpose(2, 1, 0))
    for (name, header), ending in zip(HEADERS.items(), ("nii.gz", "mha", "nrrd") * 3, strict=False):
        path = save(tmp_path / f"images/{name}.nii", *header, array=CT)
        drawn.CopyInformation(sitk.ReadImage(str(path)))
        sitk.WriteImage(drawn, str(tmp_path / f"labels/{name}.{ending}"))
    return tmp_path


def inference(folder, **changes):
    paths = {"data_path": folder / "images", "model_path": folder / "model", "output_dir": folder / "out"}
    return InferConfig(**(paths | {"previews": False} | changes))


def run_report(folder):
    return json.loads((folder / "out/run.json").read_text())


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd"])
def test_results_lie_on_their_scans_and_score_against_label_maps_drawn_there(scans, levels, ending):
    assert infer.run(inference(scans, output_format=ending)) == 0
    for name in HEADERS:
        path, result = scans / f"images/{name}.nii", scans / f"out/{name}.{ending}"
        assert apart(in_itk(path), in_itk(result), LABELS.shape) < 0.01, name
        # The network's grid is not sheared, which moves some border of the one that is.
        assert np.count_nonzero(read_labels(result).array != LABELS) <= (20 if name == "micrometres" else 0)
        if ending == "nii.gz":
            assert apart(nib.load(path).affine, nib.load(result).affine, LABELS.shape) < 0.01, name
    assert not any("remarks" in case for case in run_report(scans)["cases"])
    assert infer.run(inference(scans, output_format=ending, skip_existing=True)) == 0
    assert all(case["kept"] for case in run_report(scans)["cases"])

    folders = {"predictions": scans / "out", "references": scans / "labels"}
    assert evaluate.run(EvaluateConfig(**folders, output_dir=scans / "eval")) == 0
    summary = json.loads((scans / "eval/summary.json").read_text())
    assert summary["cases"] == len(HEADERS) and summary["mean"]["dice"] > 0.99
    assert report.run(ReportConfig(scans / "eval", **folders, images=scans / "images", worst=9)) == 0


def test_preprocess_takes_label_maps_drawn_there_and_writes_where_the_scan_is(scans):
    config = PreprocessConfig(scans, scans / "ready", spacing=(3, 1.5, 2), modality="ct", num_workers=1)
    assert preprocess.run(config) == 0
    for name in HEADERS:
        scan, image = scans / f"images/{name}.nii", scans / f"ready/images/{name}.nii.gz"
        seen, found = in_itk(scan), in_itk(image)
        made = read_volume(image)
        moved = np.linalg.inv(read_volume(scan).affine) @ made.affine
        np.testing.assert_allclose(made.spacing, [3, 1.5, 2], atol=1e-3)
        # Resampling removes the shear; of micrometres ITK sees as much of a difference.
        assert apart(seen @ moved, found, made.shape) < (0.2 if name == "micrometres" else 0.01), name
        labels = scans / f"ready/labels/{name}.nii.gz"
        np.testing.assert_allclose(in_itk(labels), found)
        assert set(np.unique(read_labels(labels).array)) == {0, 1, 2}
        # All who read the folder count in mm.
        assert nib.load(image).header.get_xyzt_units()[0] == "mm" or name == "aligned"
    cases = json.loads((scans / "ready/dataset.json").read_text())["cases"]
    assert [case["id"] for case in cases if case.get("remarks")] == ["micrometres"]
    assert preprocess.run(config) == 0


def test_of_an_earlier_version_what_is_the_same_now_is_kept(scans, capsys):
    config = PreprocessConfig(scans, scans / "ready", spacing=(3, 1.5, 2), modality="ct", num_workers=1)
    assert preprocess.run(config) == 0
    for file in (scans / "ready/store").glob("*/case.json"):
        entry = json.loads(file.read_text())
        del entry["fingerprint"]["spacing_scale"]
        entry["fingerprint"]["version"] = 1
        file.write_text(json.dumps(entry))
    capsys.readouterr()
    assert preprocess.run(config) == 0
    # Only the one whose forms agree and whose lengths are mm.
    assert "6 done, 1 kept" in capsys.readouterr().out


def test_check_takes_them_too(scans, capsys):
    check.run(CheckConfig(scans, json=scans / "check.json", num_workers=1))
    content = json.loads((scans / "check.json").read_text())
    assert content["usable"] == len(HEADERS) and content["counts"]["error"] == 0
    assert not [finding for finding in content["findings"] if finding["kind"] in ("grid", "shift", "spacing")]
    np.testing.assert_allclose(content["summary"]["spacing_mm"]["max"], [1.5, 1.5, 2], rtol=0.01)


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd"])
def test_a_tilted_gantry_is_noted_where_the_format_cannot_say_it(tmp_path, levels, capsys, ending):
    for k in range(CT.shape[2]):
        position = (-20, -15 + 0.6 * k, 2.0 * k)
        write_slice(tmp_path / f"images/ct/IM{k}", CT[:, :, k].T, position, spacing=(1.5, 1.5), number=k)
    assert infer.run(inference(tmp_path, output_format=ending)) == 0
    remarks, shown = run_report(tmp_path)["cases"][0].get("remarks"), capsys.readouterr().out
    seen = in_itk(tmp_path / f"out/ct.{ending}")
    if ending == "nrrd":
        assert remarks is None and apart(read_volume(tmp_path / "images/ct").affine, seen, CT.shape) < 0.01
    else:
        assert seen is None and "--output_format nrrd" in remarks[0] and "--output_format nrrd" in shown


@pytest.fixture(params=["nii.gz", "mha", "nrrd"])
def wrong(request, tmp_path):
    """A scan and its label map that say mm and mean metres."""
    for kind, array in (("images", CT), ("labels", LABELS)):
        (tmp_path / kind).mkdir()
        image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        image.SetSpacing((0.0015, 0.0015, 0.002))
        image.SetOrigin((0.01, 0.02, 0.03))
        sitk.WriteImage(image, str(tmp_path / f"{kind}/a.{request.param}"))
    return tmp_path


def test_a_wrong_unit_is_named_and_mended_by_every_command(wrong, levels, capsys):
    scan = next((wrong / "images").iterdir())
    ready = PreprocessConfig(wrong, wrong / "ready", spacing=(1.5, 1.5, 2), modality="ct", num_workers=1)
    folders = {"predictions": wrong / "out", "references": wrong / "labels"}
    commands = (
        (preprocess, ready, 2),
        (check, CheckConfig(wrong, num_workers=1), 2),
        (infer, inference(wrong), 2),
        (evaluate, EvaluateConfig(**folders, output_dir=wrong / "eval"), 2),
    )
    for command, config, code in commands:
        if command is evaluate:
            assert infer.run(inference(wrong, spacing_scale=1000)) == 0
        capsys.readouterr()
        assert command.run(config) == code
        assert "--spacing_scale 1000" in capsys.readouterr().out.replace("\n", " ")
        assert command.run(replace(config, spacing_scale=1000)) in (0, 1)
        with pytest.raises(ConfigError, match="--spacing_scale -1"):
            command.run(replace(config, spacing_scale=-1.0))
    entry = json.loads((wrong / "ready/dataset.json").read_text())["cases"][0]
    assert entry["shape"] == list(CT.shape) and np.allclose(entry["spacing"], [1.5, 1.5, 2])
    np.testing.assert_allclose(read_volume(wrong / "ready/images/a.nii.gz").spacing, [1.5, 1.5, 2], rtol=1e-5)
    # The result lies on the scan as its header has it, and counts in what was said of it.
    assert apart(in_itk(scan), in_itk(wrong / "out/a.nii.gz"), CT.shape) < 0.01
    assert run_report(wrong)["cases"][0]["volume_ml"]["liver"] == pytest.approx(6 * 5 * 6 * 4.5e-3)
    assert json.loads((wrong / "eval/summary.json").read_text())["mean"]["dice"] == 1
    assert report.run(ReportConfig(wrong / "eval", **folders, images=wrong / "images")) == 0
    assert infer.run(inference(wrong, spacing_scale=1)) == 0


def test_training_on_scans_of_no_size_names_the_command_that_takes_the_flag(wrong, tmp_path):
    with pytest.raises(DatasetError, match=r"Run preprocess.py on it with the flags that the reasons above name"):
        train.run(TrainConfig(data_train=wrong, output_dir=tmp_path / "run", steps=1))


def test_a_preprocessed_case_is_made_again_for_another_scale(wrong):
    config = PreprocessConfig(wrong, wrong / "ready", spacing=(1.5, 1.5, 2), modality="ct", num_workers=1)
    assert preprocess.run(replace(config, spacing_scale=1000)) == 0
    assert preprocess.run(replace(config, spacing_scale=2000)) == 0
    assert json.loads((wrong / "ready/dataset.json").read_text())["cases"][0]["shape"] == [39, 35, 27]


def test_vectors_in_nifti_are_channels_of_every_command(tmp_path, monkeypatch):
    model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES, in_chans=2)  # noqa: E731
    monkeypatch.setattr(batch, "load_model", model)
    for ending in ("nii", "nrrd"):
        home = tmp_path / ending
        (home / "images").mkdir(parents=True)
        (home / "labels").mkdir()
        image = sitk.GetImageFromArray(np.stack([CT, CT + 1], -1).transpose(2, 1, 0, 3), isVector=True)
        sitk.WriteImage(image, str(home / f"images/a.{ending}"))
        sitk.WriteImage(sitk.GetImageFromArray(LABELS.transpose(2, 1, 0)), str(home / f"labels/a.{ending}"))
        description = {"channels": ["one", "two"], "labels": {"1": "liver", "2": "spleen"}}
        (home / "dataset.json").write_text(json.dumps(description))
        assert infer.run(inference(home)) == 0
        config = PreprocessConfig(home, home / "ready", spacing=(1, 1, 1), modality="ct", num_workers=1)
        assert preprocess.run(config) == 0
        assert check.run(CheckConfig(home, num_workers=1, modality="ct")) == 0
    results, images = (
        [read_volume(tmp_path / ending / file).array for ending in ("nii", "nrrd")]
        for file in ("out/a.nii.gz", "ready/images/a.nii.gz")
    )
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(*images)
    assert images[0].shape == (*CT.shape, 2)


def test_structures_that_resampling_loses_are_named(tmp_path, levels, capsys):
    """A header ten times too small, of 6 mm still."""
    for kind, array in (("images", CT), ("labels", LABELS)):
        (tmp_path / kind).mkdir()
        nib.save(nib.Nifti1Image(array, np.diag([0.3, 0.3, 0.3, 1])), tmp_path / f"{kind}/a.nii.gz")
    config = PreprocessConfig(tmp_path, tmp_path / "ready", spacing=(3, 3, 3), modality="ct", num_workers=1)
    assert preprocess.run(config) == 0
    remarks = json.loads((tmp_path / "ready/dataset.json").read_text())["cases"][0]["remarks"]
    shown = capsys.readouterr().out
    for words in ("no voxel is left of", "leaves 3 x 3 x 2", "--spacing_scale"):
        assert any(words in remark for remark in remarks) and words in shown
    assert preprocess.run(replace(config, spacing_scale=10)) == 0
    assert "remarks" not in json.loads((tmp_path / "ready/dataset.json").read_text())["cases"][0]
    assert infer.run(inference(tmp_path, spacing=(3, 3, 3))) == 0
    assert "leaves 3 x 3 x 2" in run_report(tmp_path)["cases"][0]["remarks"][0]


def test_masks_that_resampling_loses_are_named_too(tmp_path):
    affine = np.diag([0.3, 0.3, 0.3, 1])
    nib.save(nib.Nifti1Image(CT, affine), tmp_path / "a.nii.gz")
    masks = tuple((value, tmp_path / f"{value}.nii.gz") for value in (1, 2))
    for value, path in masks:
        nib.save(nib.Nifti1Image(np.equal(LABELS, value).astype(np.uint8), affine), path)
    case = Case("a", tmp_path / "a.nii.gz", masks=masks)
    job = CaseJob(case, tmp_path / "out", 1, {1: "liver", 2: "spleen"}, (3, 3, 3), "RAS", "ct", nifti=False)
    assert "no voxel is left of liver, spleen after resampling to 3 x 3 x 3 mm" in prepare_case(job).remarks
