"""Which scans infer takes from a folder, and by which modality it normalises each."""

import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.datasets.find_scans import find_scans, join_channels
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.preprocessing.dataset import prepare_dataset
from tests.commands.scans import preprocess_config
from tests.datasets import miniatures
from tests.datasets.drawn import draw, write


def test_each_scan_of_a_mixed_dataset_has_its_own_modality(tmp_path):
    home = miniatures.amos(tmp_path / "in").folder / "amos22"
    found = find_scans(home / "imagesVa")
    folder, scans, failures = found.folder, found.scans, found.failures
    assert (folder, failures) == (home / "imagesVa", [])
    assert [(scan.case, scan.modality) for scan in scans] == [("amos_0010", "ct"), ("amos_0551", "mr")]
    run(PreprocessConfig(tmp_path / "in", tmp_path / "out", spacing=(0, 0, 0), num_workers=1))
    scans = find_scans(tmp_path / "out").scans
    assert {scan.case: scan.modality for scan in scans}["amos_0507"] == "mr"


def test_the_arrays_of_a_preprocessed_folder_are_not_looked_at(tmp_path):
    scans = preprocess_config(tmp_path)
    prepare_dataset(load_dataset(scans.input_path), scans, store_only=True)
    found = find_scans(scans.output_path)
    assert [scan.path.parent.parent for scan in found.scans] == [scans.input_path] * 3
    assert (found.failures, found.notes) == ([], ())


def test_scans_in_a_folder_a_case_are_found(tmp_path):
    miniatures.totalsegmentator_mri(tmp_path)
    found = find_scans(tmp_path)
    folder, scans = found.folder, found.scans
    assert folder == tmp_path and [scan.case for scan in scans] == ["s0001", "s0002", "s0005", "s0026"]
    assert {scan.path.name for scan in scans} == {"mri.nii.gz"}
    # All of one modality: the model knows it.
    assert {scan.modality for scan in scans} == {None}


def test_a_plain_folder_need_not_be_a_dataset(tmp_path):
    write(tmp_path / "images/a.nii.gz", draw([1]))
    assert [(scan.case, scan.modality) for scan in find_scans(tmp_path).scans] == [("a", None)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no \.nii\.gz, \.nii, \.mha, \.mhd, \.nrrd or DICOM file"):
        find_scans(tmp_path / "empty")


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_scans_of_all_formats_are_found_by_name(tmp_path):
    touch(tmp_path, "a.nii", "b.nii.gz", "c.mha", "d.mhd", "d.raw", "e.nrrd", "notes.txt", "._c.mha", "f.mha", "f.nrrd")
    found = find_scans(tmp_path)
    scans, failures = found.scans, found.failures
    assert [(scan.case, scan.path.name) for scan in scans] == [
        *(("a", "a.nii"), ("b", "b.nii.gz"), ("c", "c.mha"), ("d", "d.mhd"), ("e", "e.nrrd"))
    ]
    assert [failure["id"] for failure in failures] == ["f"]
    assert "f.mha and f.nrrd" in failures[0]["reason"]


def test_a_folder_of_slices_is_a_scan_and_so_are_its_subfolders(tmp_path):
    touch(tmp_path / "study/one", "1.dcm", "2.dcm")
    touch(tmp_path / "study/two", "1.IMA")
    (touch(tmp_path / "study/three", "notes.txt") / "IM01").write_bytes(bytes(128) + b"DICM")
    touch(tmp_path / "study/four", "notes.txt")
    assert find_scans(tmp_path / "study/one").scans[0].case == "one"
    found = find_scans(tmp_path / "study")
    folder, scans = found.folder, found.scans
    assert folder == tmp_path / "study"
    assert [(scan.case, scan.path) for scan in scans] == [(name, folder / name) for name in ("one", "three", "two")]


def test_dicom_beside_other_scans_is_not_left_out_silently(tmp_path):
    touch(tmp_path / "in", "a.nii.gz", "c.nii.gz")
    touch(tmp_path / "in/b", "1.dcm", "2.dcm")
    touch(tmp_path / "in/c", "1.dcm")
    touch(tmp_path / "in/notes", "notes.txt")
    found = find_scans(tmp_path / "in")
    scans, failures = found.scans, found.failures
    assert {scan.case: scan.path.name for scan in scans} == {"a": "a.nii.gz", "b": "b"}
    assert [failure["id"] for failure in failures] == ["c"] and "c.nii.gz and c" in failures[0]["reason"]
    touch(tmp_path / "in", "1.dcm")
    found = find_scans(tmp_path / "in")
    scans, failures = found.scans, found.failures
    assert {scan.case: scan.path.name for scan in scans} == {"a": "a.nii.gz", "b": "b", "in": "in"}


def joined(data_path, channels):
    scans, failures = join_channels(data_path, find_scans(data_path).scans, channels)
    return {scan.case: [path.name for path in scan.channels] for scan in scans}, {
        failure["id"]: failure["reason"] for failure in failures
    }


def test_files_of_one_channel_each_are_joined_for_a_model_of_several(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.mha", "c_0001.nii", "d.nii.gz", "e_0000.nii")
    touch(tmp_path, *(f"e_000{number}.nii.gz" for number in (1, 2)), *(f"d_000{number}.nii" for number in (0, 1)))
    scans, reasons = joined(tmp_path, 2)
    assert scans == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "d": []}
    assert set(reasons) == {"b", "c", "d", "e"}
    assert "b_0001 not found; expected 2 channels" in reasons["b"] and "c_0000 not found" in reasons["c"]
    assert "also e_0002.nii.gz; expected 2 channels" in reasons["e"] and "lies beside its channels" in reasons["d"]
    assert joined(tmp_path / "a_0001.nii.gz", 2) == ({"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}, {})
    assert joined(tmp_path / "d.nii.gz", 2) == ({"d": []}, {})


def test_a_model_of_one_channel_takes_each_file_by_itself(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    assert joined(tmp_path, 1) == ({"a_0000": [], "a_0001": []}, {})
    assert joined(tmp_path / "a_0000.nii.gz", 1) == ({"a_0000": []}, {})


def test_the_number_of_the_only_channel_is_no_part_of_a_name(tmp_path):
    touch(tmp_path / "in", "x_001_0000.nii.gz", "x_002_0000.mha")
    assert joined(tmp_path / "in", 1) == ({"x_001": [], "x_002": []}, {})
    assert joined(tmp_path / "in/x_002_0000.mha", 1) == ({"x_002": []}, {})
    # Cases with numbers of their own, and a folder with a scan of another name.
    touch(tmp_path / "own", "scan_0000.nii.gz", "scan_0001.nii.gz")
    assert set(joined(tmp_path / "own", 1)[0]) == {"scan_0000", "scan_0001"}
    touch(tmp_path / "in", "y.nii.gz")
    assert set(joined(tmp_path / "in", 1)[0]) == {"x_001_0000", "x_002_0000", "y"}


def test_capitals_in_suffixes(tmp_path):
    for name in ("a.NII.GZ", "b.Nii", "c.MHA"):
        (tmp_path / name).touch()
    assert [scan.case for scan in find_scans(tmp_path).scans] == ["a", "b", "c"]
    assert find_scans(tmp_path / "a.NII.GZ").scans[0].case == "a"
