"""Which scans infer takes from a folder, and by which modality it normalises each."""

import pytest

from mambahome_jax.commands.find_scans import find_scans
from mambahome_jax.commands.preprocess import run
from mambahome_jax.config import PreprocessConfig
from mambahome_jax.errors import DatasetError
from tests.datasets import miniatures


def test_each_scan_of_a_mixed_dataset_has_its_own_modality(tmp_path):
    home = miniatures.amos(tmp_path / "in").folder / "amos22"
    folder, scans, failures = find_scans(home / "imagesVa")
    assert (folder, failures) == (home / "imagesVa", [])
    assert [(scan.case, scan.modality) for scan in scans] == [("amos_0010", "ct"), ("amos_0551", "mr")]
    run(PreprocessConfig(tmp_path / "in", tmp_path / "out", spacing=(0, 0, 0), num_workers=1))
    scans = find_scans(tmp_path / "out")[1]
    assert {scan.case: scan.modality for scan in scans}["amos_0507"] == "mr"


def test_scans_in_a_folder_a_case_are_found(tmp_path):
    miniatures.totalsegmentator_mri(tmp_path)
    folder, scans, _ = find_scans(tmp_path)
    assert folder == tmp_path and [scan.case for scan in scans] == ["s0001", "s0002", "s0005", "s0026"]
    assert {scan.path.name for scan in scans} == {"mri.nii.gz"}
    # All of one modality: the model knows it.
    assert {scan.modality for scan in scans} == {None}


def test_a_plain_folder_need_not_be_a_dataset(tmp_path):
    miniatures.write(tmp_path / "images/a.nii.gz", miniatures.draw([1]))
    assert [(scan.case, scan.modality) for scan in find_scans(tmp_path)[1]] == [("a", None)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no \.nii or \.nii\.gz file"):
        find_scans(tmp_path / "empty")
