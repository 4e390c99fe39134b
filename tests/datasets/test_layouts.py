"""Which cases are found in each layout, and what is said of files that make no case."""

import json
from pathlib import Path

import pytest

from mambahome_jax.datasets.base import label_names, modality_of
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def decathlon(folder: Path, **changes) -> Path:
    touch(folder, "imagesTr/a_1.nii.gz", "imagesTr/._a_1.nii.gz", "imagesTr/a_2.nii.gz", "labelsTr/a_1.nii.gz")
    touch(folder, "labelsTr/._a_1.nii.gz", "labelsTr/a_2.nii.gz", "imagesTs/a_3.nii.gz", "imagesTs/._a_3.nii.gz")
    description = {
        "name": "Liver",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "10": "vessel", "2": "cancer"},
        "training": [{"image": f"./imagesTr/a_{i}.nii.gz", "label": f"./labelsTr/a_{i}.nii.gz"} for i in (1, 2)],
        "test": ["./imagesTs/a_3.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description | changes))
    return folder


def test_images_labels_pairs_by_name(tmp_path):
    touch(
        tmp_path, "images/b.nii.gz", "images/a.nii.gz", "images/._a.nii.gz", "images/.hidden.nii.gz", "images/note.txt"
    )
    touch(tmp_path, "labels/a.nii.gz", "labels/b.nii")
    dataset = load_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[1].image == tmp_path / "images/b.nii.gz"
    assert dataset.cases[1].label == tmp_path / "labels/b.nii"
    assert (dataset.channels, dataset.labels, dataset.skipped) == (("image",), {}, ())
    assert all(case.modality is None and case.split is None and case.patient == case.id for case in dataset.cases)


def test_images_labels_pairs_names_with_usual_endings(tmp_path):
    touch(tmp_path, "images/p1_0000.nii.gz", "images/p2_image.nii.gz", "labels/p1.nii.gz", "labels/p2_label.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.label and case.label.name) for case in dataset.cases] == [
        ("p1_0000", "p1.nii.gz"),
        ("p2_image", "p2_label.nii.gz"),
    ]


def test_label_without_image_is_skipped_and_image_without_label_is_noted(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/c.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.label is None) for case in dataset.cases] == [("a", False), ("c", True)]
    assert dataset.skipped == (("b", "labels/b.nii.gz has no image; expected images/b.nii.gz"),)
    assert "1 images have no label and are kept as unlabelled: c" in dataset.notes[0]


@pytest.mark.parametrize("table", [{"1": "liver", "2": "spleen"}, {"background": 0, "spleen": 2, "liver": 1}])
def test_images_labels_takes_names_from_dataset_json(tmp_path, table):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": table}))
    assert load_dataset(tmp_path).labels == {1: "liver", 2: "spleen"}


def test_images_labels_takes_channels_from_dataset_json(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"channels": ["T1w", "FLAIR"]}))
    dataset = load_dataset(tmp_path)
    assert (dataset.channels, dataset.cases[0].modality) == (("T1w", "FLAIR"), "mr")
    (tmp_path / "dataset.json").write_text(json.dumps({"channels": "T1w"}))
    with pytest.raises(DatasetError, match=r"\"channels\" is 'T1w'; expected a list of names"):
        load_dataset(tmp_path)


def test_decathlon(tmp_path):
    dataset = load_dataset(decathlon(tmp_path))
    assert dataset.name == "Liver"
    assert [(case.id, case.split, case.modality) for case in dataset.cases] == [
        ("a_1", "train", "ct"),
        ("a_2", "train", "ct"),
        ("a_3", "test", "ct"),
    ]
    assert dataset.cases[2].label is None
    assert list(dataset.labels.items()) == [(1, "liver"), (2, "cancer"), (10, "vessel")]
    assert (dataset.channels, dataset.skipped) == (("CT",), ())


def test_decathlon_channels_and_magnetic_resonance(tmp_path):
    table = {"1": "T1w", "0": "FLAIR", "2": "t1gd", "3": "T2w"}
    dataset = load_dataset(decathlon(tmp_path, modality=table))
    assert dataset.channels == ("FLAIR", "T1w", "t1gd", "T2w")
    assert {case.modality for case in dataset.cases} == {"mr"}


def test_decathlon_reports_listed_files_that_are_missing_and_files_that_are_not_listed(tmp_path):
    decathlon(tmp_path)
    (tmp_path / "labelsTr/a_2.nii.gz").unlink()
    touch(tmp_path, "imagesTr/extra.nii.gz")
    dataset = load_dataset(tmp_path)
    assert dataset.skipped == (("a_2", "labelsTr/a_2.nii.gz not found"),)
    assert "1 file of imagesTr left out, as dataset.json does not list them: extra" in dataset.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": {}}, r'"modality" is \{\}; expected "modality": \{"0": "CT"\}'),
        ({"labels": ["liver"]}, 'no table "labels"'),
        ({"labels": {"liver": "red"}}, "label entry 'liver': 'red'"),
        ({"training": [{"label": "x"}]}, '"training" has entries without an image'),
    ],
)
def test_damaged_decathlon_description(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset(decathlon(tmp_path, **changes))


def test_decathlon_without_description(tmp_path):
    decathlon(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json: no such file"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        load_dataset(tmp_path)


def test_published_layout(tmp_path):
    touch(tmp_path, "BDMAP_1/ct.nii.gz", "BDMAP_1/combined_labels.nii.gz", "BDMAP_1/segmentations/duct.nii.gz")
    touch(tmp_path, "BDMAP_2/scan_ct.nii.gz", "BDMAP_2/scan_labels.nii.gz")
    touch(tmp_path, "many/x_ct.nii.gz", "many/x_labels.nii.gz", "many/y_ct.nii.gz", "many/y_labels.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.image.name, case.label.name) for case in dataset.cases] == [
        ("BDMAP_1", "ct.nii.gz", "combined_labels.nii.gz"),
        ("BDMAP_2", "scan_ct.nii.gz", "scan_labels.nii.gz"),
        ("many_x", "x_ct.nii.gz", "x_labels.nii.gz"),
        ("many_y", "y_ct.nii.gz", "y_labels.nii.gz"),
    ]
    assert {case.modality for case in dataset.cases} == {"ct"}
    assert dataset.skipped == ()


def test_published_layout_does_not_shift_pairs_after_a_missing_file(tmp_path):
    touch(tmp_path, "a/ct.nii.gz", "b/ct.nii.gz", "b/labels.nii.gz", "c/ct.nii.gz", "c/labels.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.label.parent.name) for case in dataset.cases] == [("b", "b"), ("c", "c")]
    assert dataset.skipped[0][0] == "a"
    assert "a/ holds ct.nii.gz; expected one *ct*.nii.gz and one *labels*.nii.gz" in dataset.skipped[0][1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "the folder is empty"),
        (("scan.nii.gz",), r"unknown layout \(it holds scan.nii.gz\)"),
        (("images/a.nii.gz",), "labels: the folder is missing"),
        (("labels/a.nii.gz",), "images: the folder is missing"),
        (("images/a.txt", "labels/a.nii.gz"), "images: the folder holds no scan"),
        (("a/ct.nii.gz",), "no scan with its labels"),
    ],
)
def test_folders_without_cases(tmp_path, names, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset(touch(tmp_path, *names))


def test_unknown_layout_lists_what_was_looked_for(tmp_path):
    with pytest.raises(DatasetError) as caught:
        load_dataset(touch(tmp_path, "scan.nii.gz"))
    for part in ("images/<case>.nii.gz", "Decathlon", "*ct*.nii.gz", "preprocess.py"):
        assert part in str(caught.value)


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="a file, not a folder"):
        load_dataset(touch(tmp_path, "file.nii.gz") / "file.nii.gz")


def test_label_table_sorts_as_integers_and_refuses_values_that_do_not_fit(tmp_path):
    assert list(label_names({"10": "j", "2": "b", "0": "background"}, tmp_path)) == [2, 10]
    for table in ({"1": "a", "b": 1}, {"65536": "a"}, {"-1": "a"}, {"1": 2}):
        with pytest.raises(DatasetError):
            label_names(table, tmp_path)


def test_modality_of_channel_names():
    assert modality_of(["CT"]) == "ct"
    assert modality_of(["MRI"]) == modality_of(["T2", "ADC"]) == "mr"
    assert modality_of(["ultrasound"]) == "us"
    assert modality_of(["image"]) is modality_of(["CT", "MRI"]) is None


def test_a_file_in_both_forms_is_used_once_and_noted(tmp_path):
    for name in ("images/a.nii.gz", "images/b.nii", "images/b.nii.gz", "labels/a.nii", "labels/b.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = load_dataset(tmp_path)
    assert [case.image.name for case in dataset.cases] == ["a.nii.gz", "b.nii.gz"]
    used = tmp_path / "images/b.nii.gz"
    assert dataset.notes == (f"a file is there in two formats: {used} is used, b.nii is not",)
