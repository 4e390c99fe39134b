"""Datasets as archives, spreadsheets and other systems leave them: read all the same."""

import json

import pytest

from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import join_datasets
from mambahome_jax.imaging.volume import read_volume
from tests.datasets import miniatures
from tests.datasets.drawn import draw, write
from tests.datasets.test_layouts import touch

STUDY = "100000_00001"


def test_capitals_in_suffixes_and_folders(tmp_path):
    write(tmp_path / "Images/a.NII.GZ", draw([1]))
    touch(tmp_path, "Images/b.Nii", "LABELS/a.nii.gz", "LABELS/b.NII", "LABELS/b.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.image.name, case.label.name) for case in dataset.cases] == [
        ("a", "a.NII.GZ", "a.nii.gz"),
        ("b", "b.Nii", "b.nii.gz"),
    ]
    assert read_volume(dataset.cases[0].image).array.max() == 1


def test_json_with_the_mark_of_utf_8(tmp_path):
    miniatures.decathlon(tmp_path)
    file = tmp_path / "dataset.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_dataset(tmp_path).cases) == 3


def test_paths_of_windows_in_a_decathlon_task(tmp_path):
    miniatures.decathlon(tmp_path)
    file = tmp_path / "dataset.json"
    content = json.loads(file.read_text())
    content["training"] = [{"image": entry["image"].replace("/", "\\")} for entry in content["training"]]
    file.write_text(json.dumps(content))
    dataset = load_dataset(tmp_path)
    assert [case.split for case in dataset.cases] == ["train", "train", "test"] and not dataset.skipped


def test_columns_of_meta_csv_in_another_spelling(tmp_path):
    miniatures.totalsegmentator_mri(tmp_path)
    file = tmp_path / "meta.csv"
    file.write_text(file.read_text().replace("image_id", "Image_ID ").replace("split", " Split"))
    assert {case.split for case in load_dataset(tmp_path).cases} == {"train", "test"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_of_a_spreadsheet(tmp_path, encoding, separator):
    touch(tmp_path, "scans/Müller 1.nii.gz", "truth/Müller 1.NII.GZ")
    rows = [("Image", "Label", "SPLIT"), ("..\\scans\\Müller 1.nii.gz", '"..\\truth\\Müller 1.NII.GZ"', "Val")]
    (tmp_path / "lists").mkdir()
    text = "".join(separator.join(row) + "\r\n" for row in [*rows, ("", "", "")])
    (tmp_path / "lists/mine.CSV").write_bytes(text.encode(encoding))
    (case,) = load_dataset(tmp_path / "lists/mine.CSV").cases
    assert (case.id, case.split, case.image.is_file(), case.label.is_file()) == ("Müller 1", "val", True, True)


def test_panorama_batches_each_in_a_folder_of_its_own(tmp_path):
    for batch in ("batch_1", "batch_2"):
        touch(tmp_path, f"images/{batch}/{batch}/10000{batch[-1]}_00001_0000.nii.gz")
    touch(tmp_path, "panorama_labels/manual_labels/100001_00001.nii.gz")
    dataset = load_dataset(tmp_path)
    assert dataset.layout == "panorama"
    assert [(case.id, case.has_label) for case in dataset.cases] == [("100001_00001", True), ("100002_00001", False)]


def test_commit_of_panorama_labels_among_packed_references(tmp_path):
    touch(tmp_path, f"batch_1/{STUDY}_0000.nii.gz", f"panorama_labels/manual_labels/{STUDY}.nii.gz")
    git = tmp_path / "panorama_labels/.git"
    git.mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert not any("commit" in note for note in load_dataset(tmp_path).notes)
    (git / "packed-refs").write_text("# pack-refs with: peeled\n0123abcd refs/heads/main\n4567cdef refs/heads/other\n")
    assert "labels of commit 0123abcd" in load_dataset(tmp_path).notes


def test_parts_of_one_dataset_share_their_patients_and_what_each_lacks(tmp_path):
    touch(tmp_path, f"batch_1/{STUDY}_0000.nii.gz", "batch_2/100000_00002_0000.nii.gz")
    for study in (STUDY, "100000_00002", "100009_00001"):
        touch(tmp_path, f"panorama_labels/automatic_labels/{study}.nii.gz")
    joined = join_datasets([load_dataset(tmp_path / "batch_1"), load_dataset(tmp_path / "batch_2")])
    assert {case.patient for case in joined.cases} == {"panorama_100000"}
    assert [case for case, _ in joined.skipped] == ["batch_1_100009_00001", "batch_2_100009_00001"]


def test_folders_of_anybodys_data_do_not_share_their_patients(tmp_path):
    for name in ("one", "two"):
        touch(tmp_path / name, "images/a.nii.gz", "labels/a.nii.gz")
        (tmp_path / name / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    joined = join_datasets([load_dataset(tmp_path / "one"), load_dataset(tmp_path / "two")])
    assert [case.patient for case in joined.cases] == ["one_a", "two_a"]


def test_what_macos_leaves_beside_the_files_is_not_seen(tmp_path):
    miniatures.totalsegmentator_mri(tmp_path / "TotalsegmentatorMRI")
    for home in (tmp_path, tmp_path / "TotalsegmentatorMRI"):
        touch(home, ".DS_Store", "__MACOSX/s0001/._mri.nii.gz", "._s0001")
    touch(tmp_path / "TotalsegmentatorMRI/s0001", "._mri.nii.gz", "segmentations/._spleen.nii.gz")
    seen = load_dataset(tmp_path)
    assert seen.layout == "totalsegmentator_mri" and [case.id for case in seen.cases][:2] == ["s0001", "s0002"]
    assert all(path.name[0] != "." for case in seen.cases for path in case.label_files)
