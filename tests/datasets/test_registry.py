"""Which layout a folder has, what is said where that is not clear, and the faults of each layout's own files."""

import json
from pathlib import Path

import pytest

from mambahome_jax.datasets.base import region_names
from mambahome_jax.datasets.layouts.totalsegmentator_mri import STRUCTURES, table_of
from mambahome_jax.datasets.registry import LAYOUTS, detect_layouts, load_dataset
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.preprocessing.open_dataset import open_dataset
from tests.datasets import miniatures
from tests.datasets.test_layouts import touch
from tests.imaging.test_dicom_series import series


def test_the_more_specific_layout_wins(tmp_path):
    miniatures.abdomenatlas(tmp_path)
    assert LAYOUTS["published"].detect(tmp_path) and detect_layouts(tmp_path) == ["abdomenatlas"]
    assert load_dataset(tmp_path, "published").layout == "published"


def test_two_layouts_at_once_are_named(tmp_path):
    touch(tmp_path, "s0001/mri.nii.gz", "images/a.nii.gz", "labels/a.nii.gz")
    with pytest.raises(DatasetError) as caught:
        load_dataset(tmp_path)
    text = str(caught.value)
    assert "several layouts at once" in text and "s####/mri.nii.gz" in text and "images/<case>.nii.gz" in text
    assert "--dataset totalsegmentator_mri or --dataset images_labels" in text
    assert [case.id for case in load_dataset(tmp_path, "images_labels").cases] == ["a"]


def test_unknown_folder_lists_every_layout_and_unknown_name_every_name(tmp_path):
    with pytest.raises(DatasetError) as caught:
        load_dataset(touch(tmp_path, "x.txt"))
    assert all(f"  - {name}: {layout.LOOKS_FOR}" in str(caught.value) for name, layout in LAYOUTS.items())
    with pytest.raises(ConfigError, match="--dataset acdc: no such layout; expected one of prepared, abdomenatlas"):
        load_dataset(tmp_path, "acdc")


def test_the_folder_of_an_archive_is_found(tmp_path):
    miniatures.mvseg(tmp_path / "MVSeg/MVSeg")
    assert load_dataset(tmp_path).layout == "mvseg"


def test_an_id_comes_once(tmp_path):
    for home in ("Zurich", "Vienna"):
        touch(tmp_path / home, "sub-001/anat/sub-001_T2w.nii.gz", "sub-001/anat/sub-001_dseg.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [case.image.parts[-4] for case in dataset.cases] == ["Vienna"]
    assert "Zurich" in dataset.skipped[0][1] and "a second case of this id" in dataset.skipped[0][1]


def test_abdomenatlas_scan_and_masks_in_different_parts(tmp_path):
    touch(tmp_path, "part1/BDMAP_00005196/segmentations/liver.nii.gz", "part2/BDMAP_00005196/ct.nii.gz")
    touch(tmp_path, "part1/BDMAP_00005196/segmentations/wart.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, [value for value, _ in case.masks], case.labelled) for case in dataset.cases] == [
        ("BDMAP_00005196", [5], (5,))
    ]
    assert "left out: wart" in dataset.notes[0]


def test_abdomenatlas_1_0_has_nine_structures(tmp_path):
    from mambahome_jax.datasets.layouts.abdomenatlas import OF_VERSION_1_0

    touch(tmp_path, "BDMAP_00000001/ct.nii.gz", "BDMAP_00000001/combined_labels.nii.gz")
    touch(tmp_path, *(f"BDMAP_00000001/segmentations/{name}.nii.gz" for name in OF_VERSION_1_0))
    assert list(load_dataset(tmp_path).labels.values()) == list(OF_VERSION_1_0)


def test_totalsegmentator_tables():
    assert table_of({"liver"}) == STRUCTURES
    first = table_of({"thigh_left", "fibula", "femur_left", "liver"})
    assert first == (*STRUCTURES[:31], "femur_left", "fibula", "thigh_left")


def test_totalsegmentator_without_the_columns_of_its_table(tmp_path):
    touch(tmp_path, "s0001/mri.nii.gz", "s0001/segmentations/liver.nii.gz")
    assert "the official split is not known" in load_dataset(tmp_path).notes[0]
    (tmp_path / "meta.csv").write_text("id;part\n")
    with pytest.raises(DatasetError, match=r"columns 'id;part'; expected image_id and split"):
        load_dataset(tmp_path)


def test_panorama_without_its_labels(tmp_path):
    touch(tmp_path, "batch_1/100000_00001_0000.nii.gz")
    with pytest.raises(DatasetError, match=r"1 scan and 0 labels.*Clone github.com/DIAGNijmegen/panorama_labels"):
        load_dataset(tmp_path)


def nnunet(folder: Path, **changes) -> Path:
    touch(folder, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


def test_regions_of_another_meaning_are_none_of_ours(tmp_path):
    content = {"labels": {"1": "lung"}, "regions": {"thorax": ["lung"], "site": "A"}}
    assert region_names(content, tmp_path / "dataset.json") == ({1: "lung"}, {})
    assert region_names(content | {"regions": {"1": [1, 2]}}, tmp_path / "run.json") == ({1: "lung"}, {1: (1, 2)})


def test_nnunet_regions_and_ignore(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset = load_dataset(nnunet(tmp_path, labels=labels, regions_class_order=[1, 2]))
    assert dataset.labels == {1: "whole", 2: "core"} and "last region" in dataset.notes[0]
    assert 'Value 3 is nnU-Net\'s "ignore"' in dataset.hint
    with pytest.raises(DatasetError, match='2 regions with "regions_class_order" None'):
        load_dataset(nnunet(tmp_path, labels=labels))


def test_nnunet_faults(tmp_path):
    with pytest.raises(DatasetError, match=r"\"file_ending\" is '.tif'; expected .nii.gz, .*Convert"):
        load_dataset(nnunet(tmp_path, file_ending=".tif"))
    with pytest.raises(DatasetError, match='"channel_names" is'):
        load_dataset(nnunet(tmp_path, channel_names={"1": "CT"}))
    (nnunet(tmp_path) / "splits_final.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"splits_final\.json: damaged"):
        load_dataset(tmp_path)


def test_nnunet_version_1_and_explicit_paths(tmp_path):
    nnunet(tmp_path / "one", modality={"0": "CT"})
    content = json.loads((tmp_path / "one/dataset.json").read_text())
    del content["channel_names"], content["file_ending"]
    (tmp_path / "one/dataset.json").write_text(json.dumps(content))
    assert (load_dataset(tmp_path / "one").layout, load_dataset(tmp_path / "one").cases[0].id) == ("nnunet_raw", "a")
    touch(tmp_path / "two", "elsewhere/x.nii.gz", "elsewhere/y.nii.gz", "imagesTr/none.txt")
    table = {"c": {"images": ["elsewhere/x.nii.gz"], "label": "elsewhere/y.nii.gz"}}
    case = load_dataset(nnunet(tmp_path / "two", dataset=table)).cases[0]
    assert (case.id, case.image.name, case.label.name) == ("c", "x.nii.gz", "y.nii.gz")


def test_csv_rows(tmp_path):
    touch(tmp_path, "in/a.nii.gz", "in/b.nii.gz", "out.nii.gz", "in/l.nii.gz")
    rows = ["Image, ID, label, modality", "a.nii.gz;b.nii.gz,two,l.nii.gz,MR", "a.nii.gz,two,,", "../out.nii.gz,,,"]
    rows += ["a.nii.gz,x/y,,", "a.dcm,d,,", ",e,,", "a.nii.gz,f,,pet"]
    (tmp_path / "in/list.csv").write_text("\ufeff" + "\n".join(rows) + "\n")
    dataset = load_dataset(tmp_path / "in/list.csv")
    assert [(case.id, len(case.image_files), case.modality) for case in dataset.cases] == [
        ("two", 2, "mr"),
        ("out", 1, None),
    ]
    assert dataset.channels == ("channel_0", "channel_1")
    assert any("1 file lies outside of " in note for note in dataset.notes)
    reasons = [reason for _, reason in dataset.skipped]
    for words, reason in zip(
        ("second time", "id 'x/y'", "no scan by its name", "no image", "modality 'pet'"), reasons, strict=True
    ):
        assert words in reason
    (tmp_path / "in/list.csv").write_text("scan,label\n")
    with pytest.raises(DatasetError, match="columns 'scan,label'; expected a first line"):
        load_dataset(tmp_path / "in/list.csv")


def test_flags_that_contradict_each_other(tmp_path):
    miniatures.mvseg(tmp_path / "in")
    config = {"input_path": tmp_path / "in", "output_path": tmp_path / "out"}
    with pytest.raises(ConfigError, match="give one of them"):
        open_dataset(PreprocessConfig(**config, labels=("a",), label_map=tmp_path / "m.toml"))
    with pytest.raises(ConfigError, match="2 names for 1 folders"):
        open_dataset(PreprocessConfig(**config, dataset=("mvseg", "feta")))
    with pytest.raises(DatasetError, match="--only ct: no such case; the dataset says us"):
        open_dataset(PreprocessConfig(**config, only="ct"))


@pytest.mark.parametrize("name", ["ct_0{}", "subject{}", "case{}_ct", "actrec{}", "labels{}", "s000{}", "p{}-US"])
@pytest.mark.parametrize("folders", [("images", "labels"), ("Images", "Labels")])
def test_images_and_labels_are_the_plain_layout_whatever_their_files_are_called(tmp_path, name, folders):
    names = [name.format(number) for number in (1, 2)]
    touch(tmp_path, *(f"{folder}/{stem}.nii.gz" for folder in folders for stem in names))
    assert detect_layouts(tmp_path) == ["images_labels"]
    assert [(case.id, case.label.name) for case in load_dataset(tmp_path).cases] == [
        (stem, f"{stem}.nii.gz") for stem in names
    ]


def test_names_of_published_datasets_in_the_plain_layout(tmp_path):
    touch(tmp_path, "images/100000_00001_0000.nii.gz", "labels/100000_00001.nii.gz")
    assert detect_layouts(tmp_path) == ["images_labels"]
    touch(tmp_path / "us", "images/1-US.nii.gz", "labels/1-label.nii.gz")
    assert [case.label.name for case in load_dataset(tmp_path / "us").cases] == ["1-label.nii.gz"]
    # The scans of PANORAMA itself may lie in images/.
    touch(tmp_path / "p", "images/batch_1/100000_00001_0000.nii.gz", "panorama_labels/x/100000_00001.nii.gz")
    assert load_dataset(tmp_path / "p").layout == "panorama"


@pytest.mark.parametrize("name", ["ct_0{}", "subject{}", "duct{}_ct"])
def test_letters_in_the_names_of_a_decathlon_task_claim_no_other_layout(tmp_path, name):
    names = [name.format(number) for number in (1, 2)]
    touch(tmp_path, *(f"{part}/{stem}.nii.gz" for part in ("imagesTr", "labelsTr") for stem in names))
    content = {"modality": {"0": "CT"}, "labels": {"1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert detect_layouts(tmp_path) == ["decathlon"]


def test_four_digits_that_number_the_cases_are_no_channel(tmp_path):
    touch(tmp_path, *(f"{part}/scan_000{n}.nii.gz" for part in ("imagesTr", "labelsTr") for n in range(2)))
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {"1": "liver"}}))
    assert load_dataset(tmp_path).layout == "decathlon"
    assert [case.id for case in load_dataset(tmp_path).cases] == ["scan_0000", "scan_0001"]


def test_ct_is_a_word_of_a_name_in_the_published_layout(tmp_path):
    touch(tmp_path, "a/subject1_t2.nii.gz", "a/subject1_ct.nii.gz", "a/subject1_labels.nii.gz")
    touch(tmp_path, "b/CT01.nii.gz", "b/labels01.nii.gz", "c/scanCT.nii.gz", "c/scan_labels.nii.gz")
    touch(tmp_path, *(f"d/subject{n}_{role}.nii.gz" for n in (1, 2) for role in ("ct", "labels")))
    dataset = load_dataset(tmp_path)
    assert {case.id: case.image.name for case in dataset.cases} == {
        "a": "subject1_ct.nii.gz",
        "b": "CT01.nii.gz",
        "c": "scanCT.nii.gz",
        "d_subject1": "subject1_ct.nii.gz",
        "d_subject2": "subject2_ct.nii.gz",
    }
    touch(tmp_path / "other", "study/actrec.nii.gz", "study/object.nii.gz")
    assert detect_layouts(tmp_path / "other") == []


@pytest.mark.parametrize("name", ["100000_00001_0000", "BDMAP_00000001", "sub-001_T2w", "x-US", "s0001", "case_ct"])
def test_folders_of_slices_make_the_plain_layout_too(tmp_path, name):
    series(tmp_path / "images" / name)
    touch(tmp_path, f"labels/{name}.nii.gz", "extra/p_ct.nii.gz")
    dataset = load_dataset(tmp_path)
    assert dataset.layout == "images_labels" and [case.id for case in dataset.cases] == [name]


@pytest.mark.parametrize("name", ["p1_CTA", "p1_cbct", "ctscan", "PETCT"])
def test_ct_in_longer_words_of_its_own_is_an_image_of_the_published_layout(tmp_path, name):
    touch(tmp_path, f"p1/{name}.nii.gz", "p1/p1_labels.nii.gz", "p2/p2_ctrl.nii.gz", "p2/p2_labels.nii.gz")
    dataset = load_dataset(tmp_path)
    assert dataset.layout == "published" and [case.id for case in dataset.cases] == ["p1"]
