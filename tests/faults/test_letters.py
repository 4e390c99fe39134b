"""Names with letters beyond ASCII: one name in either Unicode form, and by name where they are no UTF-8."""

import csv
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import mambahome_jax as mh
from mambahome_jax.commands import evaluate, infer, preprocess, report
from mambahome_jax.datasets import files
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import structure_key
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import EvaluateConfig, InferConfig, PreprocessConfig, ReportConfig
from mambahome_jax.inference import batch
from mambahome_jax.patches.store import Store
from mambahome_jax.support import paths
from tests.commands.scans import scan, write
from tests.faults.fuzz_worker import PROPERTIES
from tests.inference.models import Levels

NFC = "Müller Łódź 한"
NFD = unicodedata.normalize("NFD", NFC)
LATIN = os.fsdecode(b"M\xfcller")


@pytest.fixture(autouse=True)
def _levels(monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))


def pair(home: Path, image: str, label: str) -> Path:
    for path, array in zip((image, label), scan(), strict=True):
        write(home / path, array)
    return home


def plain(home: Path) -> Path:
    return pair(home, f"images/{NFC}.nii.gz", f"labels/{NFD}.nii.gz")


def nnunet(home: Path) -> Path:
    pair(home, f"imagesTr/{NFD}_0000.nii.gz", f"labelsTr/{NFC}.nii.gz")
    pair(home, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1, "y": 2}, "file_ending": ".nii.gz"}
    (home / "dataset.json").write_text(json.dumps(table))
    (home / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": [NFD]}]))
    return home


def nnunet_named(home: Path) -> Path:
    nnunet(home)
    entry = {"images": [f"./imagesTr/{NFC}_0000.nii.gz"], "label": f"./labelsTr/{NFD}.nii.gz"}
    other = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
    table = json.loads((home / "dataset.json").read_text()) | {"dataset": {NFD: entry, "a": other}}
    (home / "dataset.json").write_text(json.dumps(table))
    return home


def decathlon(home: Path) -> Path:
    pair(home, f"imagesTr/{NFD}.nii.gz", f"labelsTr/{NFC}.nii.gz")
    table = {
        "modality": {"0": "CT"},
        "labels": {"1": "x", "2": "y"},
        "training": [{"image": f"./imagesTr/{NFC}.nii.gz", "label": f"./labelsTr/{NFC}.nii.gz"}],
    }
    (home / "dataset.json").write_text(json.dumps(table))
    return home


def table(home: Path) -> Path:
    pair(home, f"x/{NFD}.nii.gz", f"y/{NFC}.nii.gz")
    (home / "cases.csv").write_text(f"id,image,label\n{NFD},x/{NFC}.nii.gz,../{home.name}/y/{NFD}.nii.gz\n", "utf-8")
    return home


@pytest.mark.parametrize("layout", [plain, nnunet, nnunet_named, decathlon, table])
def test_either_form_is_one_case(layout, tmp_path):
    dataset = load_dataset(layout(tmp_path / "in"))
    case = next(case for case in dataset.cases if case.id != "a")
    assert case.id == NFC and case.image.is_file() and case.label.is_file() and not dataset.skipped
    assert "nnunet" not in layout.__name__ or case.split == "val"


def test_from_the_scans_to_the_scores_in_whatever_form_files_are(tmp_path):
    data, ready, predicted = plain(tmp_path / "in"), tmp_path / "ready", tmp_path / "predicted"
    assert preprocess.run(PreprocessConfig(data, ready, spacing=(0, 0, 0), modality="ct")) == 0
    assert [path.name for path in (ready / "images").iterdir()] == [f"{NFC}.nii.gz"]
    settings = InferConfig(data, Path("model"), predicted, skip_existing=True, previews=False)
    assert infer.run(settings) == 0
    # As after a copy by way of a system that decomposes letters.
    for folder, ending in ((ready / "images", ".nii.gz"), (ready / "store", ""), (predicted, ".nii.gz")):
        (folder / f"{NFC}{ending}").rename(folder / f"{NFD}{ending}")
    prepared = read_prepared(ready)
    assert prepared.image_path(prepared.cases[0]).is_file()
    assert Store(ready).read_image(NFC).shape == (12, 16, 8, 1) and Store(ready).class_positions(NFC, 1).size
    assert infer.run(settings) == 0
    assert [case.get("kept") for case in json.loads((predicted / "run.json").read_text())["cases"]] == [True]
    for number, compare in enumerate((None, tmp_path / "scored0")):
        scored = tmp_path / f"scored{number}"
        assert evaluate.run(EvaluateConfig(predicted, data / "labels", scored, compare)) == 0
        with (scored / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["case"] for row in rows} == {NFC}
        text = (scored / "metrics.csv").read_text("utf-8").replace(NFC, NFD)
        (scored / "metrics.csv").write_text(text, "utf-8")
    assert not json.loads((tmp_path / "scored1/comparison.json").read_text())["only_here"]


def test_both_forms_side_by_side_are_named(tmp_path):
    home = plain(tmp_path / "in")
    for part in ("images", "labels"):
        here, other = sorted((home / part / f"{name}.nii.gz" for name in (NFC, NFD)), key=Path.exists, reverse=True)
        shutil.copy(here, other)
    dataset = load_dataset(home)
    assert [case.id for case in dataset.cases] == [NFC]
    assert len(dataset.skipped) == 1 and "a second case of this id" in dataset.skipped[0][1]
    assert infer.run(InferConfig(home / "images", Path("model"), tmp_path / "out")) == 2
    [failure] = json.loads((tmp_path / "out/run.json").read_text())["failures"]
    assert failure["id"] == NFC and "would have one name" in failure["reason"]


def test_names_of_structures_are_compared_in_one_form():
    assert structure_key(unicodedata.normalize("NFD", "Arteria mésentérique")) == structure_key("arteria_mésentérique")


def test_a_name_that_is_no_utf8_is_called_that_by_every_command(tmp_path, capsys):
    home = pair(tmp_path / "in", "images/a.nii.gz", "labels/a.nii.gz")
    pair(home, f"images/{LATIN}.nii.gz", f"labels/{LATIN}.nii.gz")
    assert preprocess.run(PreprocessConfig(home, tmp_path / "ready", spacing=(0, 0, 0), modality="ct")) == 1
    assert infer.run(InferConfig(home, Path("model"), tmp_path / "predicted")) == 1
    shutil.copy(tmp_path / "predicted/a.nii.gz", tmp_path / f"predicted/{LATIN}.nii.gz")
    assert evaluate.run(EvaluateConfig(tmp_path / "predicted", home / "labels", tmp_path / "scored")) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "M\\udcfcller: " in line]
    assert len(said) == 3 and all("a name that is no UTF-8" in line and "line breaks" not in line for line in said)


@pytest.mark.parametrize(
    ("encoding", "name"), [("ascii", LATIN), ("ascii", "Müller"), ("iso8859-1", "0æ¼¢\x97"), ("iso8859-1", "Müller")]
)
def test_a_name_is_not_blamed_for_the_locale(encoding, name, monkeypatch):
    monkeypatch.setattr(paths.sys, "getfilesystemencoding", lambda: encoding)
    assert f"{encoding}; set PYTHONUTF8=1" in files.fault_of_name(name)
    assert files.fault_of_name("Muller") == ""


def test_bytes_behind_the_end_of_a_gzip_are_no_damage(tmp_path):
    home = pair(tmp_path / "in", "images/a.nii.gz", "labels/a.nii.gz")
    for file in home.rglob("*.gz"):
        file.write_bytes(file.read_bytes() + b"EXTRA")
    assert preprocess.run(PreprocessConfig(home, tmp_path / "ready", spacing=(0, 0, 0), modality="ct")) == 0
    assert np.array_equal(Store(tmp_path / "ready").read_label("a"), np.flip(scan()[1], (0, 1)))


def test_a_folder_that_libraries_cannot_open_is_named_before_the_work(tmp_path):
    home = pair(tmp_path / "in", "images/a.nii.gz", "labels/a.nii.gz")
    odd = tmp_path / LATIN
    with pytest.raises(ConfigError, match=r"M\\udcfcller.*no UTF-8"):
        preprocess.run(PreprocessConfig(home, odd, spacing=(0, 0, 0), modality="ct"))
    odd.mkdir()
    for call in (Store, mh.load_model):
        with pytest.raises(ConfigError, match=r"M\\udcfcller.*no UTF-8"):
            call(odd)
    volume = mh.Volume(np.zeros((3, 4, 5), np.int16), np.eye(4))
    for ending in ("mha", "nrrd"):
        # ITK would end the process.
        with pytest.raises(mh.OutputError, match=r"M\\udcfcller.*no UTF-8"):
            mh.write_volume(odd / f"a.{ending}", volume)
        mh.write_volume(tmp_path / f"a.{ending}", volume)
        (tmp_path / f"a.{ending}").rename(odd / f"a.{ending}")
        with pytest.raises(mh.DatasetError, match=r"M\\udcfcller.*no UTF-8"):
            mh.read_volume(odd / f"a.{ending}")
    mh.write_volume(odd / "a.nii.gz", volume)
    assert mh.read_volume(odd / "a.nii.gz").shape == volume.shape


def test_weights_are_read_from_any_folder_or_it_is_named(tmp_path):
    odd = tmp_path / LATIN
    odd.mkdir()
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(odd / "w.safetensors")
    with pytest.raises(mh.MambaHomeError, match="ller"):
        mh.load_model(odd / "w.safetensors")


def test_a_report_of_folders_whose_names_are_no_utf8(tmp_path):
    pair(tmp_path / LATIN, "labels/a.nii.gz", "labels/b.nii.gz")
    shutil.copytree(tmp_path / LATIN / "labels", tmp_path / "predicted")
    (tmp_path / "predicted/b.nii.gz").unlink()
    for path in (tmp_path / LATIN / "labels/a.nii.gz", tmp_path / "predicted/a.nii.gz"):
        write(path, scan()[1])
    assert evaluate.run(EvaluateConfig(tmp_path / "predicted", tmp_path / LATIN / "labels", tmp_path / "scored")) == 1
    assert report.run(ReportConfig(tmp_path / "scored")) == 0
    assert (tmp_path / "scored/report.html").read_text("utf-8")
