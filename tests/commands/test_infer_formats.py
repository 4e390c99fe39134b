"""Scans of every format in, label maps of every format out, on the grid of the scan."""

import dataclasses
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.find_scans import Scan, ScanFolder
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging import dicomseg, itk
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume
from mambahome_jax.inference import batch
from tests.imaging.dicom_files import PATIENT, write_slice
from tests.inference.models import Levels

PROPERTIES = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32))
TURN = nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([1.0, -1, 1])
# Stored axes are turned, flipped and permuted against RAS.
AFFINE = nib.affines.from_matvec(TURN[:, [2, 0, 1]] @ np.diag([2.0, 0.7, 1.1]), [-30, 14, 99])


@pytest.fixture
def levels(monkeypatch):
    """Puts a model whose classes are intensity levels in the place of what --model_path names; channels in a dict."""
    made = {"in_chans": 1}
    model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES, **made)  # noqa: E731
    monkeypatch.setattr(batch, "load_model", model)
    return made


def labels_of():
    labels = np.zeros((12, 20, 18), np.uint8)
    labels[2:8, 3:9, 4:9] = 1
    labels[5:9, 11:16, 8:15] = 2
    return labels


def scan():
    return Volume(np.array([-175, 37.5, 250], np.float32)[labels_of()], AFFINE)


def config(folder, **changes):
    paths = {"data_path": folder / "in", "model_path": folder / "model", "output_dir": folder / "out"}
    return InferConfig(**(paths | changes))


def report(folder):
    return json.loads((folder / "out" / "run.json").read_text())


def write_dicom(folder):
    """The scan as slices along its last axis; the affine as they should be read."""
    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :3] / spacing
    values = np.array([-175, 37, 250])[labels_of()] + 1024
    for k in range(values.shape[2]):
        position, direction = lps[:3, 3] + k * lps[:3, 2], cosines[:, :2].T.ravel()
        pixels, between = values[:, :, k].T.astype(np.int16), (spacing[1], spacing[0])
        write_slice(folder / f"IM{k:03}", pixels, position, direction, between, number=k, rescale=("1", "-1024"))


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "mha", "nrrd"])
def test_every_format_gives_the_same_labels_on_its_own_grid(tmp_path, levels, ending):
    for suffix in ("nii.gz", "mha", "nrrd"):
        write_volume(tmp_path / f"in/from_{suffix[:3]}.{suffix}", scan())
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "in/from_mha.mha")), str(tmp_path / "in/from_mhd.mhd"))
    assert infer.run(config(tmp_path, output_format=ending)) == 0
    for case in ("from_nii", "from_mha", "from_mhd", "from_nrr"):
        result = read_labels(tmp_path / f"out/{case}.{ending}")
        np.testing.assert_array_equal(result.array, labels_of())
        np.testing.assert_allclose(result.affine, AFFINE, atol=1e-5)
    assert [case["output"] for case in report(tmp_path)["cases"]] == [
        f"from_{name}.{ending}" for name in ("mha", "mhd", "nii", "nrr")
    ]


def test_dicom_slices_to_a_label_map_without_a_word_of_the_patient(tmp_path, levels, capsys):
    write_dicom(tmp_path / "in/case")
    assert infer.run(config(tmp_path, data_path=tmp_path / "in/case", output_format="nii")) == 0
    result = read_labels(tmp_path / "out/case.nii")
    same = read_volume(tmp_path / "in/case")
    np.testing.assert_array_equal(result.affine.astype(np.float32), same.affine.astype(np.float32))
    # Slices are sorted along their normal, here against the order in which they were written.
    np.testing.assert_array_equal(result.array, labels_of()[:, :, ::-1])
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert PATIENT.encode() not in path.read_bytes()
    assert PATIENT not in capsys.readouterr().out


def test_broken_scans_of_other_formats_are_reported_and_the_rest_is_done(tmp_path, levels, capfd):
    write_dicom(tmp_path / "in/whole")
    write_dicom(tmp_path / "in/gap")
    (tmp_path / "in/gap/IM007").unlink()
    assert infer.run(config(tmp_path)) == 1
    reasons = {failure["id"]: failure["reason"] for failure in report(tmp_path)["failures"]}
    assert set(reasons) == {"gap"}
    assert "between IM006 and IM008" in reasons["gap"] or "between IM008 and IM006" in reasons["gap"]
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["whole.nii.gz"]


def test_each_series_of_a_folder_has_a_result(tmp_path, levels, capsys):
    write_dicom(tmp_path / "in/p/study")
    write_slice(tmp_path / "in/p/study/other", np.full((8, 8), 7, np.int16), series="1.2.9")
    assert infer.run(config(tmp_path)) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["p_study_4.nii.gz", "p_study_9.nii.gz"]
    assert read_labels(tmp_path / "out/p_study_9.nii.gz").shape == (8, 8, 1)
    whole = read_labels(tmp_path / "out/p_study_4.nii.gz")
    np.testing.assert_array_equal(whole.array, labels_of()[:, :, ::-1])
    # A DICOM SEG refers to the slices of its own series, and is found whole by them.
    seg = config(tmp_path, output_format="dcm", output_dir=tmp_path / "seg", series=("1.2.3.4",), skip_existing=True)
    assert infer.run(seg) == 0
    assert [path.name for path in (tmp_path / "seg").glob("*.dcm")] == ["p_study_4.dcm"]
    assert "1 other series left out by --series" in capsys.readouterr().out
    assert infer.run(seg) == 0
    assert "1 results are there already and whole" in capsys.readouterr().out
    with pytest.raises(DatasetError, match=r"no series 1\.2\.8; expected one of 1\.2\.3\.4, 1\.2\.9"):
        infer.run(config(tmp_path, series=("1.2.8",)))


def test_what_is_not_read_is_in_the_report(tmp_path, levels, capsys):
    write_dicom(tmp_path / "in/p1")
    (tmp_path / "in/p2/mri").mkdir(parents=True)
    (tmp_path / "in/p2/mri/brain.mgz").write_bytes(b"x")
    assert infer.run(config(tmp_path)) == 1
    failure = report(tmp_path)["failures"][0]
    assert failure["id"] == "p2_mri_brain" and "p2/mri/brain.mgz: FreeSurfer's format" in failure["reason"]
    assert failure["reason"] in capsys.readouterr().out
    # Nothing else is there: the reason is all that is said, and the report is written.
    (tmp_path / "in/p1").rename(tmp_path / "elsewhere")
    assert infer.run(config(tmp_path)) == 2 and report(tmp_path)["failures"][0] == failure


def test_channels_in_files_of_their_own(tmp_path, levels):
    levels["in_chans"] = 2
    write_volume(tmp_path / "in/a_0000.nii.gz", scan())
    write_volume(tmp_path / "in/a_0001.mha", Volume(scan().array * 2, AFFINE))
    write_volume(tmp_path / "in/b.nii.gz", Volume(np.stack([scan().array] * 2, 3), AFFINE))
    write_volume(tmp_path / "in/c_0000.nii.gz", scan())
    write_volume(tmp_path / "in/d_0000.nii.gz", scan())
    write_volume(tmp_path / "in/d_0001.nii.gz", Volume(scan().array, np.eye(4)))
    assert infer.run(config(tmp_path)) == 1
    found = report(tmp_path)
    assert [case["id"] for case in found["cases"]] == ["a", "b"]
    assert found["cases"][0]["input"] == ["a_0000.nii.gz", "a_0001.mha"]
    reasons = {failure["id"]: failure["reason"] for failure in found["failures"]}
    assert "c_0001 not found" in reasons["c"]
    assert "d_0001.nii.gz" in reasons["d"] and "Bring it onto the grid of d_0000.nii.gz" in reasons["d"]
    for case in "ab":
        np.testing.assert_array_equal(read_labels(tmp_path / f"out/{case}.nii.gz").array, labels_of())
    single = config(tmp_path, data_path=tmp_path / "in/a_0001.mha", output_dir=tmp_path / "single")
    assert infer.run(single) == 0
    assert (tmp_path / "single/a.nii.gz").read_bytes() == (tmp_path / "out/a.nii.gz").read_bytes()


def test_dicom_seg_holds_structures_by_their_stored_values(tmp_path, monkeypatch):
    data = dataclasses.replace(PROPERTIES, values=((1, 205), (2, 850)))
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=data))
    write_dicom(tmp_path / "in/case")
    assert infer.run(config(tmp_path, output_format="dcm")) == 0
    labels = dicomseg.read(tmp_path / "out/case.dcm", tmp_path / "in/case", {205: "liver", 850: "spleen"})
    np.testing.assert_array_equal(labels.array, np.array([0, 205, 850])[labels_of()[:, :, ::-1]])
    assert infer.run(config(tmp_path, output_format="dcm", skip_existing=True)) == 0
    assert report(tmp_path)["cases"][0]["kept"]


def test_dicom_seg_for_dicom_slices(tmp_path, levels, capsys):
    write_dicom(tmp_path / "in/case")
    write_dicom(tmp_path / "in/other")
    assert infer.run(config(tmp_path, output_format="dcm", keep_largest=("all",), save_probabilities=True)) == 0
    labels = dicomseg.read(tmp_path / "out/case.dcm", tmp_path / "in/case", {1: "liver", 2: "spleen"})
    np.testing.assert_array_equal(labels.array, labels_of()[:, :, ::-1])
    found = report(tmp_path)
    assert [case["output"] for case in found["cases"]] == ["case.dcm", "other.dcm"]
    # Only the SEG says whose it is.
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert (PATIENT.encode() in path.read_bytes()) == (path.suffix == ".dcm"), path
    assert PATIENT not in capsys.readouterr().out
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.dcm")}
    (tmp_path / "out/other.dcm").write_bytes(content["other.dcm"][:-9])
    again = config(tmp_path, output_format="dcm", skip_existing=True, keep_largest=("all",))
    assert infer.run(again) == 0
    kept, made = report(tmp_path)["cases"]
    assert kept["kept"] and kept["volume_ml"] == found["cases"][0]["volume_ml"] and "kept" not in made
    assert (tmp_path / "out/case.dcm").read_bytes() == content["case.dcm"] != content["other.dcm"]
    # A folder of results is no folder of scans.
    with pytest.raises(DatasetError, match="without DICOM slices"):
        read_volume(tmp_path / "out")


def test_dicom_seg_of_other_scans_is_refused_before_any_work(tmp_path, levels, monkeypatch):
    write_volume(tmp_path / "in/a.nii.gz", scan())
    with pytest.raises(
        ConfigError, match=r"a\.nii\.gz: --output_format dcm is DICOM SEG, which refers to DICOM slices"
    ):
        infer.run(config(tmp_path, output_format="dcm"))
    with monkeypatch.context() as without:
        without.setattr(dicomseg, "installed", lambda: False)
        with pytest.raises(ConfigError, match=r'needs highdicom .*Run: pip install "mambahome-jax\[dicomseg\]"'):
            infer.run(config(tmp_path, output_format="dcm"))
    assert not (tmp_path / "out").exists()
    # Scans of a dataset may be of both kinds.
    write_dicom(tmp_path / "dicom")
    scans = [Scan("a", tmp_path / "in/a.nii.gz"), Scan("b", tmp_path / "dicom")]
    monkeypatch.setattr(batch, "find_scans", lambda path, *_, **__: ScanFolder(path, scans, []))
    assert infer.run(config(tmp_path, output_format="dcm")) == 1
    found = report(tmp_path)
    assert [case["output"] for case in found["cases"]] == ["b.dcm"]
    assert "this scan has none" in found["failures"][0]["reason"]


def test_without_simpleitk(tmp_path, levels, monkeypatch):
    write_volume(tmp_path / "in/a.mha", scan())
    write_volume(tmp_path / "in/b.nii.gz", scan())
    # For the process that reads a.mha too.
    (tmp_path / "SimpleITK.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "SimpleITK", raising=False)
    monkeypatch.setattr(itk, "installed", lambda: False)
    with pytest.raises(
        ConfigError, match=r'--output_format nrrd needs SimpleITK. Run: pip install "mambahome-jax\[formats'
    ):
        infer.run(config(tmp_path, output_format="nrrd"))
    assert infer.run(config(tmp_path)) == 1
    assert [case["id"] for case in report(tmp_path)["cases"]] == ["b"]
    assert 'pip install "mambahome-jax[formats]"' in report(tmp_path)["failures"][0]["reason"]
