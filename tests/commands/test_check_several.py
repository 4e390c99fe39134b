"""check on several folders at once, as preprocess joins them."""

import json
import shutil

import pytest

from mambahome_jax.cli import parse, run_command
from mambahome_jax.commands.check import run
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import CheckConfig
from tests.datasets import miniatures


def report(folders, **settings) -> dict:
    file = folders[0].parent / "report.json"
    code = run(CheckConfig(folders, json=file, num_workers=1, **settings))
    content = json.loads(file.read_text())
    assert content["exit_code"] == code
    return content


def found(content: dict, kind: str) -> dict[str, str]:
    return {item["case"]: item["found"] for item in content["findings"] if item["kind"] == kind}


def test_the_same_scan_in_two_datasets(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    miniatures.abdomenatlas(tmp_path / "atlas")
    miniatures.totalsegmentator_mri(tmp_path / "total")
    shutil.copy(tmp_path / "total/s0005/mri.nii.gz", tmp_path / "atlas/BDMAP_00000002/ct.nii.gz")
    for mask in (tmp_path / "atlas/BDMAP_00000002/segmentations").iterdir():
        shutil.copy(tmp_path / "total/s0005/segmentations/liver.nii.gz", mask)
    content = report((tmp_path / "atlas", tmp_path / "total"))
    assert content["folder"] == [str(tmp_path / "atlas"), str(tmp_path / "total")]
    assert content["layout"] == "abdomenatlas+totalsegmentator_mri"
    assert "atlas_BDMAP_00000002, which is in no split and this one in test" in found(content, "leak")["total_s0005"]
    assert "total/s0005/mri.nii.gz" in capsys.readouterr().out


def test_a_patient_in_two_parts_of_one_dataset(tmp_path):
    miniatures.totalsegmentator_mri(tmp_path / "v1", version=1)
    miniatures.totalsegmentator_mri(tmp_path / "v2")
    content = report((tmp_path / "v1", tmp_path / "v2"))
    leak = "patient totalsegmentator_mri_s0005 in test: v1_s0005; train: v2_s0005"
    assert leak not in found(content, "leak").values()
    meta = tmp_path / "v2/meta.csv"
    meta.write_text(meta.read_text().replace("test", "train"))
    assert leak in found(report((tmp_path / "v1", tmp_path / "v2")), "leak").values()


def test_structures_that_one_dataset_never_labels_are_no_finding(tmp_path):
    miniatures.feta(tmp_path / "feta")
    miniatures.mvseg(tmp_path / "mvseg")
    content = report((tmp_path / "feta", tmp_path / "mvseg"))
    assert found(content, "structure") == {} and len(content["summary"]["structures"]) == 9


def test_flags(tmp_path):
    miniatures.mvseg(tmp_path / "one")
    miniatures.feta(tmp_path / "two")
    folders = (tmp_path / "one", tmp_path / "two")
    words = [str(folder) for folder in folders]
    assert run_command("check", [*words, "--num_workers", "1"], "check") == 1
    for asked in (["--dataset", "mvseg", *words, "--dataset", "feta"], [*words, "--dataset=mvseg", "--dataset=feta"]):
        settings = parse("check", [*asked, "--fast"])
        assert (settings.folder, settings.dataset, settings.fast) == (folders, ("mvseg", "feta"), True)
    assert parse("check", ["--dataset", "mvseg", words[0]]).dataset == ("mvseg",)
    with pytest.raises(ConfigError, match="3 names for 2 folders"):
        run(CheckConfig(folders, dataset=("mvseg", "feta", "amos")))
    with pytest.raises(DatasetError, match="no such folder"):
        run(CheckConfig((tmp_path / "one", tmp_path / "three")))
    assert run_command("check", ["--fast"], "check") == 2
