"""Scans that cannot be what they are taken for: what preprocess, infer and segment say of them."""

import json
import struct
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands import infer, preprocess
from mambahome_jax.commands.train_setup import make_setup
from mambahome_jax.config import DataProperties, InferConfig, ScanRanges, StructureRange, TrainConfig
from mambahome_jax.datasets.prepared import read_prepared
from tests.commands.scans import AFFINE, description, preprocess_config, scan, write
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
    monkeypatch.setattr(infer, "load_model", lambda path, precision: model)
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
    prepared = read_prepared(config.output_path)
    setup = make_setup(TrainConfig(config.output_path, model="MambaHoME_tiny", steps=3, hold_out=0), prepared, None, 1)
    (found,) = setup.properties.ranges
    assert (found.cases, [item.name for item in found.structures]) == (3, ["label_1", "label_2"])
    assert found.extent_mm == ((23, 23), (16, 16), (24, 24))
    (low, high) = found.percentiles[0][0]
    assert low < -990 and 0 < high < 60
    assert found.structures[0].least == pytest.approx(4 * 6 * 3 * 6 / 1000, rel=0.5)
