"""Scans that cannot be what they are taken for: what preprocess, infer and segment say of them."""

import json
import struct
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands import check, infer, preprocess
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.flags import CheckConfig, InferConfig, TrainConfig
from mambahome_jax.inference import batch
from mambahome_jax.ranges import ScanRanges, StructureRange
from mambahome_jax.training.setup import make_setup
from tests.commands.scans import AFFINE, description, preprocess_config, scan, write
from tests.imaging.dicom_files import CT, MR, write_slice
from tests.inference.models import Levels

NAMES = ((1, "liver"), (2, "spleen"))
PROPERTIES = DataProperties(spacing=None, labels=NAMES, patch_size=(16, 16, 32))
SIZE = ((24, 24), (16, 16), (24, 24))


def ct(seed=0):
    """HU of a body of 40 with two structures, in air; int16."""
    _, labels = scan(seed=seed)
    body = np.zeros(labels.shape, bool)
    body[1:11, 2:15, 1:7] = True
    hu = np.where(body, 40, -1000) + 100 * labels
    return (hu + np.random.default_rng(seed).normal(0, 8, hu.shape)).astype(np.int16)


def network(**changes):
    return Levels((0.0, 0.5, 1.0), metadata=replace(PROPERTIES, **changes))


def run_infer(monkeypatch, folder, model, **flags):
    """Remarks in run.json by case, of the scans in folder/in."""
    monkeypatch.setattr(batch, "load_model", lambda path, precision: model)
    config = InferConfig(folder / "in", folder / "model", output_dir=folder / "out", previews=False, **flags)
    assert infer.run(config) == 0
    cases = json.loads((folder / "out/run.json").read_text())["cases"]
    return {case["id"]: case.get("remarks", []) for case in cases}


def test_infer_names_the_scan_whose_values_cannot_be(tmp_path, monkeypatch, capsys):
    image = ct()
    write(tmp_path / "in/fine.nii.gz", image)
    write(tmp_path / "in/high.nii.gz", (image + 1024).clip(0).astype(np.uint16))
    write(tmp_path / "in/scaled.nii.gz", ((image + 1024) / 4095).astype(np.float32))
    found = run_infer(monkeypatch, tmp_path, network())
    assert found["fine"] == [] and len(found["high"]) == len(found["scaled"]) == 1
    assert "expected Hounsfield units" in found["high"][0] and "expected Hounsfield units" in found["scaled"][0]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Note: high: values from" in shown and "Note: scaled: values from" in shown and "Note: fine" not in shown


def test_what_is_odd_about_a_scan_is_said_again_where_its_result_is_kept(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in/fine.nii.gz", ct())
    write(tmp_path / "in/high.nii.gz", (ct() + 1024).clip(0).astype(np.uint16))
    first = run_infer(monkeypatch, tmp_path, network())
    capsys.readouterr()
    assert run_infer(monkeypatch, tmp_path, network(), skip_existing=True) == first and len(first["high"]) == 1
    shown = capsys.readouterr().out
    assert "2 results are there already" in shown and shown.count("Note: high: values from") == 1


def test_infer_names_a_ct_given_to_a_model_of_mr(tmp_path, monkeypatch):
    image = ct()
    write(tmp_path / "in/ct.nii.gz", image)
    write(tmp_path / "in/mr.nii.gz", (image + 1100).clip(0).astype(np.uint16))
    found = run_infer(monkeypatch, tmp_path, network(modality="mr"))
    assert found["mr"] == [] and "expected intensities of MR" in found["ct"][0]


def test_a_scan_stored_with_an_offset_in_its_header_is_as_good(tmp_path, monkeypatch):
    image = ct()
    path = write(tmp_path / "in/a.nii", (image + 1024).clip(0).astype(np.uint16))
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", 1, -1024)
    path.write_bytes(content)
    assert nib.load(path).dataobj.inter == -1024
    assert run_infer(monkeypatch, tmp_path, network()) == {"a": []}


@pytest.mark.parametrize(
    ("structures", "words"),
    [
        ((StructureRange("liver", 3, 3, 0.1, 0.8), StructureRange("spleen", 3, 3, 0.1, 0.8)), None),
        ((StructureRange("spleen", 3, 3, 90, 200),), "found spleen 0.324 ml; expected about 90 to 200 ml"),
        ((StructureRange("liver", 3, 3, 0.01, 0.02),), "found liver"),
        ((StructureRange("spleen", 3, 1, 90, 200),), None),
    ],
)
def test_infer_names_a_result_far_from_training(tmp_path, monkeypatch, structures, words):
    labels = scan()[1]
    write(tmp_path / "in/a.nii.gz", np.array([-175, 37.5, 250], np.float32)[labels])
    model = network(ranges=(ScanRanges("ct", 3, SIZE, (), structures),))
    (found,) = run_infer(monkeypatch, tmp_path, model).values()
    assert (words is None and not found) or words in found[0]


def test_infer_names_a_scan_of_another_size_and_kept_structures_alone_count(tmp_path, monkeypatch):
    write(tmp_path / "in/a.nii.gz", ct())
    structures = (StructureRange("liver", 3, 3, 90, 200), StructureRange("spleen", 3, 3, 0.001, 200))
    model = network(ranges=(ScanRanges("ct", 3, SIZE, (), structures),))
    assert run_infer(monkeypatch, tmp_path, model, labels=("spleen",)) == {"a": []}
    model = network(ranges=(ScanRanges("ct", 3, ((60, 70), *SIZE[1:])),))
    assert "far off along R-L; expected about 60 to 70 x 16 x 24 mm" in run_infer(monkeypatch, tmp_path, model)["a"][0]


def test_infer_names_a_scan_of_a_modality_that_the_network_never_saw(tmp_path, monkeypatch):
    write(tmp_path / "in/a.nii.gz", ct())
    trained = network(modality="mr", ranges=(ScanRanges("mr", 3, SIZE, ()),))
    (found,) = run_infer(monkeypatch, tmp_path, trained, modality="ct")["a"]
    assert found == "taken for CT; expected MR, as in training. It needs another modality or model."
    both = network(ranges=tuple(ScanRanges(name, 3, SIZE, ()) for name in ("ct", "mr")))
    assert run_infer(monkeypatch, tmp_path, both, modality="ct") == {"a": []}


def test_segment_warns(tmp_path):
    image = ct()
    fine, high = (mh.Volume((image + offset).astype(float), AFFINE) for offset in (0, 1024))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mh.segment(network(), fine)
        # A function may be for anything.
        mh.segment(lambda windows: windows, high, spacing=(2, 1, 3), roi_size=(16, 16, 16))
        with pytest.raises(mh.ScanWarning, match="expected Hounsfield units"):
            mh.segment(network(), high)
        with pytest.raises(mh.ScanWarning, match="expected intensities of MR"):
            mh.segment(network(), fine, modality="mr")
    assert issubclass(mh.ScanWarning, UserWarning)


def test_preprocess_names_the_scan_and_training_keeps_the_ranges(tmp_path, capsys):
    config = replace(preprocess_config(tmp_path), modality="ct")
    for seed, name in enumerate("ac"):
        write(tmp_path / f"in/images/{name}.nii.gz", ct(seed))
    write(tmp_path / "in/images/b.nii.gz", (ct(1) + 1024).clip(0).astype(np.uint16))
    assert preprocess.run(config) == 0
    remarks = {case["id"]: case.get("remarks", []) for case in description(config)["cases"]}
    assert remarks["a"] == remarks["c"] == [] and "expected Hounsfield units" in remarks["b"][0]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Note: b: values from" in shown and "Note: a" not in shown
    assert preprocess.run(config) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 cases up to date and kept" in shown and shown.count("Note: b: values from") == 1
    prepared = read_prepared(config.output_path)
    setup = make_setup(TrainConfig(config.output_path, model="MambaHoME_tiny", steps=3, hold_out=0), prepared, None, 1)
    (found,) = setup.properties.ranges
    assert (found.cases, [item.name for item in found.structures]) == (3, ["label_1", "label_2"])
    assert found.extent_mm == ((23, 23), (16, 16), (24, 24))
    (low, high) = found.percentiles[0][0]
    assert low < -990 and 0 < high < 60
    assert found.structures[0].least == pytest.approx(4 * 6 * 3 * 6 / 1000, rel=0.5)


def check_report(folder, **flags):
    """Exit code, {case: found} of the findings about intensities, and all findings, of check on a folder."""
    file = folder.parent / "check.json"
    code = check.run(CheckConfig(folder, json=file, num_workers=1, **flags))
    content = json.loads(file.read_text())
    assert content["layout"] == "scans" and content["exit_code"] == code and content["summary"]["plan"] is None
    return code, {f["case"]: f["found"] for f in content["findings"] if f["kind"] == "intensity"}, content["findings"]


@pytest.mark.parametrize("flags", [{}, {"modality": "ct"}])
def test_check_takes_a_folder_of_scans_without_labels(tmp_path, capsys, flags):
    write(tmp_path / "in/fine.nii.gz", ct())
    assert check_report(tmp_path / "in", **flags)[::2] == (0, [])
    shown = capsys.readouterr().out
    assert "1 of 1 scans can be read; nothing found" in shown and ("Modality: ct, guessed" in shown) == (not flags)
    write(tmp_path / "in/high.nii.gz", (ct(1) + 1024).clip(0).astype(np.uint16))
    code, found, findings = check_report(tmp_path / "in", **flags)
    assert (code, list(found), len(findings)) == (1, ["high"], 1) and "most of the body near" in found["high"]
    (tmp_path / "in/cut.nii.gz").write_bytes((tmp_path / "in/fine.nii.gz").read_bytes()[:400])
    code, found, findings = check_report(tmp_path / "in", **flags)
    assert code == 1 and list(found) == ["high"]
    assert [(f["severity"], f["case"]) for f in findings if f["kind"] != "intensity"] == [("error", "cut")]


def test_check_names_a_ct_among_mr_and_the_reverse(tmp_path):
    for name in "abc":
        write(tmp_path / f"in/{name}.nii.gz", (ct(ord(name)) + 1100).clip(0).astype(np.uint16))
    assert check_report(tmp_path / "in")[:2] == (0, {})
    write(tmp_path / "in/d.nii.gz", ct())
    assert list(check_report(tmp_path / "in")[1]) == ["d"]
    assert list(check_report(tmp_path / "in", modality="ct")[1]) == ["a", "b", "c"]


def test_check_takes_scans_of_other_forms(tmp_path):
    pytest.importorskip("SimpleITK")
    mh.write_volume(tmp_path / "in/a.mha", mh.Volume(ct(), AFFINE))
    mh.write_volume(tmp_path / "in/b.nrrd", mh.Volume((ct() / 1000).astype(np.float32), AFFINE))
    assert list(check_report(tmp_path / "in")[1]) == ["b"]
    assert check_report(tmp_path / "in/a.mha")[0] == 0


def test_check_takes_images_alone_and_keeps_the_reason_of_a_broken_dataset(tmp_path):
    write(tmp_path / "one/images/a.nii.gz", ct())
    assert check_report(tmp_path / "one")[0] == 0
    write(tmp_path / "two/images/a.nii.gz", ct())
    (tmp_path / "two/labels").mkdir()
    with pytest.raises(mh.DatasetError, match="the folder holds no scan"):
        check.run(CheckConfig(tmp_path / "two"))
    (tmp_path / "three").mkdir()
    with pytest.raises(mh.DatasetError, match="the folder is empty"):
        check.run(CheckConfig(tmp_path / "three"))


def test_check_takes_scans_of_several_channels(tmp_path):
    write(tmp_path / "in/a.nii.gz", np.stack([ct(), ct(1)], axis=-1))
    write(tmp_path / "in/b.nii.gz", np.stack([ct(), ct(1) / 1000], axis=-1).astype(np.float32))
    code, found, _ = check_report(tmp_path / "in")
    assert code == 1 and list(found) == ["b"] and found["b"].startswith("channel 1: values from")
    for name, factor in (("c", 1), ("d", 1000)):
        write(tmp_path / f"files/{name}_0000.nii.gz", ct())
        write(tmp_path / f"files/{name}_0001.nii.gz", (ct(1) / factor).astype(np.float32))
    code, found, _ = check_report(tmp_path / "files")
    assert code == 1 and list(found) == ["d"] and found["d"].startswith("channel 1: values from")


def test_check_goes_by_what_dicom_slices_say_that_they_are(tmp_path):
    pytest.importorskip("SimpleITK")
    image = ct()
    for name, offset, kind, series in (("high", 0, CT, "1.2.3"), ("fine", -1024, CT, "1.2.4"), ("mr", 0, MR, "1.2.5")):
        for k in range(image.shape[2]):
            pixels = (image[:, :, k].T + 1024).clip(0).astype(np.int16)
            file = tmp_path / f"in/{name}/{k:03}.dcm"
            write_slice(
                file, pixels, (0, 0, 3.0 * k), sop_class=kind, series=series, number=k + 1, rescale=("1", str(offset))
            )
    assert list(check_report(tmp_path / "in")[1]) == ["high"]
