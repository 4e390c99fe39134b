"""What headers say of a patient, and where files lie, is in no output."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.commands import check, evaluate, infer, preprocess, report, train
from mambahome_jax.flags import CheckConfig, EvaluateConfig, InferConfig, PreprocessConfig, ReportConfig, TrainConfig
from mambahome_jax.imaging import itk
from mambahome_jax.inference import batch
from mambahome_jax.patches.store import Store
from mambahome_jax.training import train as training
from tests.commands.scans import AFFINE, scan, write
from tests.commands.test_train import StandIn
from tests.faults.fuzz_worker import PROPERTIES
from tests.imaging.dicom_files import PATIENT, write_slice
from tests.inference.models import Levels

MARK = "Zebulon-Secret"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))
    monkeypatch.setattr(training, "make_network", StandIn)


def marked(path: Path, array: np.ndarray) -> None:
    """A NIfTI file with the mark in every field of its header that takes text."""
    image = nib.Nifti1Image(array, AFFINE)
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[field] = MARK[:9].encode()
    for code in (2, 4, 6):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code if code != 2 else 6, MARK.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def holding(folder: Path, *marks: str) -> list[str]:
    """Files below the folder with one of the marks in their name, bytes or unpacked bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        if path.suffix == ".gz":
            content += gzip.decompress(path.read_bytes())
        found += [f"{path}: {mark}" for mark in marks if mark.encode() in content]
    return found


def test_nothing_of_a_nifti_header_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Path("in")
    for number in range(2):
        image, label = scan((20, 18, 16), seed=number)
        marked(data / f"images/c{number}.nii.gz", image)
        marked(data / f"labels/c{number}.nii.gz", label)
    (data / "images/c9.nii.gz").write_bytes((data / "images/c0.nii.gz").read_bytes()[:-20])
    out = tmp_path / "out"
    out.mkdir()
    check.run(CheckConfig(data, json=out / "check.json"))
    assert preprocess.run(PreprocessConfig(data, out / "ready", spacing=(0, 0, 0), modality="ct", num_workers=1)) == 1
    sizes = {"model": "MambaHoME_tiny", "patch_size": (32, 16, 16), "steps": 1, "batch_size": 1, "given": ("recipe",)}
    assert train.run(TrainConfig(Path("out/ready"), output_dir=out / "run", **sizes)) == 0
    assert infer.run(InferConfig(data, Path("model"), out / "predicted", save_probabilities=True)) == 1
    assert evaluate.run(EvaluateConfig(out / "predicted", data / "labels", out / "scored")) == 0
    flags = {"predictions": out / "predicted", "references": data / "labels", "images": data / "images"}
    assert report.run(ReportConfig(out / "scored", **flags)) == 0
    said = capsys.readouterr()
    marks = (MARK, MARK[:9])
    assert holding(out, *marks) == [] and not any(mark in said.out + said.err for mark in marks)
    # Where it lies is in no output but as it was given, here by relative paths.
    assert holding(out, str(tmp_path / "in")) == []
    assert Store(out / "ready").read_image("c0").shape[:3] == (20, 18, 16)


@pytest.mark.skipif(not itk.installed(), reason="SimpleITK is not installed")
def test_nothing_of_a_dicom_or_other_header_goes_on(tmp_path, capsys):
    data = tmp_path / "in"
    sitk = itk.simpleitk(data)
    for k in range(4):
        pixels = np.full((8, 10), 100 * k, np.int16)
        write_slice(data / "p1" / f"{k}.dcm", pixels, position=(0, 0, 2.5 * k), number=k + 1)
        write_slice(data / "p2" / f"{k}.dcm", pixels, position=(0, 0, 2.5 * k * k), number=k + 1)
    infer.run(InferConfig(data, Path("model"), tmp_path / "out/dicom", output_format="nrrd"))
    for suffix in (".mha", ".nrrd"):
        image = sitk.GetImageFromArray(scan()[0].transpose(2, 1, 0))
        image.SetMetaData("PatientName", PATIENT)
        sitk.WriteImage(image, str(tmp_path / f"meta{suffix}"))
        where = tmp_path / f"out/{suffix[1:]}"
        infer.run(InferConfig(tmp_path / f"meta{suffix}", Path("model"), where, output_format="mha"))
    said = capsys.readouterr()
    assert PATIENT.encode() in (data / "p1/0.dcm").read_bytes()
    assert holding(tmp_path / "out", PATIENT, "Doe", "1.2.3.4") == [] and "Doe" not in said.out + said.err
    run = json.loads((tmp_path / "out/dicom/run.json").read_text())
    assert [case["id"] for case in run["cases"]] == ["p1"] and "uneven" in run["failures"][0]["reason"]


def test_the_page_runs_and_loads_nothing_that_data_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "<img src=x onerror=alert(1)>"
    names = {"1": f"</script><script>{hostile}", "2": '" onmouseover="x'}
    for kind, array in zip(("images", "labels"), scan(), strict=True):
        write(Path(f"in/{kind}/<b>a&b'.nii.gz"), array)
    Path("in/dataset.json").write_text(json.dumps({"labels": names}))
    evaluate.run(EvaluateConfig(Path("in/labels"), Path("in/labels"), Path("scored")))
    flags = {"predictions": Path("in/labels"), "references": Path("in/labels"), "images": Path("in/images")}
    report.run(ReportConfig(Path("scored"), **flags))
    page = Path("scored/report.html").read_text()
    for text in (hostile, "<b>a&b", '" onmouseover="x', f"</script><script>{hostile}"):
        assert text not in page
    assert "&lt;img src=x" in page
    for loading in ('src="http', "src='http", 'href="http', "url(http", "@import", "stylesheet", "<iframe", "fetch("):
        assert loading not in page
