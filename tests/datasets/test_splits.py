"""Splits that come with a dataset: what fits is taken, what does not is named; no case of no list is trained on."""

import json

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.splits import with_split_file
from mambahome_jax.datasets.structures import join_datasets
from mambahome_jax.errors import DatasetError

IDS = [f"x_{number}" for number in range(5)]


def scan(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)


def nnunet(root, ids=IDS, tests=()):
    for part, names in (("Tr", ids), ("Ts", tests)):
        for name in names:
            scan(root / f"images{part}/{name}_0000.nii.gz")
            scan(root / f"labels{part}/{name}.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def plain(root, ids=IDS):
    for name in ids:
        scan(root / f"images/{name}.nii.gz")
        scan(root / f"labels/{name}.nii.gz")
    return root


def decathlon(root, ids=IDS):
    for name in ids:
        scan(root / f"imagesTr/{name}.nii.gz")
        scan(root / f"labelsTr/{name}.nii.gz")
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "ball"}}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def with_split(root, content):
    (root / "splits_final.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_dataset(root)


def lists(dataset):
    """Ids to train on, to validate on, and in no list."""
    parts = [[case.id for case in dataset.cases if case.split == part] for part in ("train", "val")]
    return *parts, [case.id for case in dataset.cases if not case.in_split]


FORMS = {
    "plain": lambda name: name,
    "suffix": lambda name: f"{name}.nii.gz",
    "channel": lambda name: f"{name}_0000",
    "file": lambda name: f"imagesTr/{name}_0000.nii.gz",
    "windows": lambda name: f"D:\\data\\labelsTr\\{name}.nii.gz",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [nnunet, plain, decathlon])
def test_ids_in_any_form_are_those_of_the_cases(tmp_path, layout, form):
    names = list(map(FORMS[form], IDS))
    dataset = with_split(layout(tmp_path), [{"train": names[:3], "val": names[3:]}])
    assert lists(dataset) == (IDS[:3], IDS[3:], [])
    assert "split of splits_final.json: 3 cases to train on, 2 to validate on" in dataset.notes


def test_numbers_of_cases_are_not_taken_for_channels(tmp_path):
    ids = ["scan_0000", "scan_0001", "scan_0002"]
    dataset = with_split(plain(tmp_path, ids), {"train": ids[:2], "val": ids[2:]})
    assert lists(dataset) == (ids[:2], ids[2:], [])


@pytest.mark.parametrize(
    "content",
    [
        {"train": IDS[:3], "val": IDS[3:]},
        {"fold_0": {"train": IDS[:3], "val": IDS[3:]}, "fold_1": {"train": IDS[2:], "val": IDS[:2]}},
        [{"training": IDS[:3], "validation": IDS[3:]}],
    ],
)
def test_a_single_fold_and_folds_by_name_are_taken(tmp_path, content):
    assert lists(with_split(nnunet(tmp_path), content)) == (IDS[:3], IDS[3:], [])


def test_of_several_folds_the_first_is_taken_and_said_to_be(tmp_path):
    dataset = with_split(nnunet(tmp_path), [{"train": IDS[1:], "val": IDS[:1]}, {"train": IDS[:4], "val": IDS[4:]}])
    assert lists(dataset) == (IDS[1:], IDS[:1], [])
    assert "split of splits_final.json, the first of 2 folds: 4 cases to train on, 1 to validate on" in dataset.notes


def test_what_does_not_fit_is_named(tmp_path):
    content = [{"train": ["x_0", "x_1", "gone"], "val": ["x_1", "x_2", "t_0"]}]
    dataset = with_split(nnunet(tmp_path, tests=["t_0"]), content)
    assert lists(dataset) == (["x_0"], ["x_1", "x_2"], ["x_3", "x_4"])
    assert {case.id: case.split for case in dataset.cases}["t_0"] == "test"
    notes = " | ".join(dataset.notes)
    assert "ids of splits_final.json that are of no case here to train on (2): gone, t_0" in notes
    assert "cases in two lists of splits_final.json, not trained on (1): x_1" in notes
    assert "cases in no list of the dataset's split, not trained on (2): x_3, x_4" in notes


def test_a_list_of_validation_alone_leaves_the_others_to_train_on(tmp_path):
    assert lists(with_split(nnunet(tmp_path), [{"val": IDS[:2]}])) == (IDS[2:], IDS[:2], [])


def test_a_fold_without_a_case_to_validate_on_is_said(tmp_path):
    for val in ([], ["gone"]):
        dataset = with_split(nnunet(tmp_path), [{"train": IDS, "val": val}])
        assert lists(dataset) == (IDS, [], [])
        assert any("names no case here to validate on, so --hold_out chooses" in note for note in dataset.notes)


def test_ids_of_skipped_cases_fit(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "labelsTr/x_4.nii.gz").unlink()
    dataset = with_split(tmp_path, [{"train": IDS[:3], "val": IDS[3:]}])
    assert lists(dataset) == (IDS[:3], IDS[3:4], []) and not any("of no case" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"damaged \(no fold\)"),
        ("{}", r"damaged \(no fold\)"),
        ("3", "damaged"),
        ('["x_0"]', "a fold that is a text"),
        ('[{"train": "x_0"}]', "train holds 'x_0'"),
        ('[{"train": [0, 1], "val": [2]}]', "train holds 0"),
        ('[{"train": [], "val": []}]', "a fold of empty lists"),
        ('[{"a": ["x_0"]}]', "a fold of empty lists: a"),
        ('[{"train": ["y_0"], "val": ["y_1"]}]', "no id is that of a case here, such as y_0; expected ids such as x_0"),
    ],
)
@pytest.mark.parametrize("layout", [nnunet, plain])
def test_a_file_that_cannot_be_taken_is_named(tmp_path, layout, content, message):
    with pytest.raises(DatasetError, match=rf"splits_final\.json: .*{message}.*Correct it, or move it elsewhere"):
        with_split(layout(tmp_path), content)


@pytest.mark.parametrize("place", [".", "archive", "archive/data"])
def test_files_beside_the_folder_of_an_archive_are_its_own(tmp_path, place):
    plain(tmp_path / "archive/data")
    (tmp_path / place / "splits_final.json").write_text(json.dumps([{"train": IDS[:2], "val": IDS[2:]}]))
    rows = [f"{name},p{number // 2}" for number, name in enumerate(IDS)]
    (tmp_path / place / "patients.csv").write_text("\n".join(["id,patient", *rows]))
    dataset = load_dataset(tmp_path)
    assert lists(dataset) == (IDS[:2], IDS[2:], [])
    assert [case.patient for case in dataset.cases] == ["p0", "p0", "p1", "p1", "p2"]


def test_the_file_of_nnunet_1_is_named(tmp_path):
    (nnunet(tmp_path) / "splits_final.pkl").write_bytes(b"")
    assert any("splits_final.pkl is of nnU-Net 1 and is not read" in note for note in load_dataset(tmp_path).notes)


def table(root, splits):
    plain(root)
    rows = [f"images/{name}.nii.gz,labels/{name}.nii.gz,{split}" for name, split in zip(IDS, splits, strict=True)]
    (root / "cases.csv").write_text("\n".join(["image,label,split", *rows]))
    return load_dataset(root)


def test_rows_without_a_word_in_a_table_with_a_split(tmp_path):
    dataset = table(tmp_path, ["train", "train", "Val", "", "test"])
    assert lists(dataset) == (IDS[:2], IDS[2:3], ["x_3"])
    assert any("cases in no list of the dataset's split, not trained on (1): x_3" in note for note in dataset.notes)
    # Where the table marks only what is held out, the rest is to train on.
    assert lists(table(tmp_path, ["", "", "", "val", "test"]))[2] == []


def test_the_split_of_a_table_wins_over_a_split_file(tmp_path):
    with_split(plain(tmp_path), [{"train": IDS[2:4], "val": IDS[:2]}])
    dataset = table(tmp_path, ["train", "Train", "val", "test", ""])
    assert lists(dataset) == (IDS[:2], IDS[2:3], ["x_4"])
    assert "splits_final.json is not read, as the table says the split" in dataset.notes
    # A table that says nothing of a split leaves it to the file.
    assert lists(table(tmp_path, [""] * 5)) == (IDS[2:4], IDS[:2], ["x_4"])


def test_columns_that_are_not_read_are_named(tmp_path):
    plain(tmp_path)
    (tmp_path / "cases.csv").write_text("image,label,fold,age\nimages/x_0.nii.gz,labels/x_0.nii.gz,0,7")
    assert "columns of cases.csv that are not read: fold, age" in load_dataset(tmp_path).notes


def test_words_of_meta_csv_and_cases_that_it_lacks_or_names_alone(tmp_path):
    for name in ("s0001", "s0002", "s0003", "s0004"):
        scan(tmp_path / f"{name}/mri.nii.gz")
        scan(tmp_path / f"{name}/segmentations/liver.nii.gz")
    (tmp_path / "meta.csv").write_text("image_id;split\ns0001;train\ns0002;validation\ns0003;other\ns0009;train\n")
    dataset = load_dataset(tmp_path)
    assert lists(dataset) == (["s0001"], ["s0002"], ["s0003", "s0004"])
    assert "cases of meta.csv that are not here (1): s0009" in dataset.notes


def test_the_validation_list_of_a_decathlon_table(tmp_path):
    decathlon(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    for key, names in (("training", IDS[:3]), ("validation", IDS[3:])):
        content[key] = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert lists(load_dataset(tmp_path)) == (IDS[:3], IDS[3:], [])


def test_folds_in_a_decathlon_table_are_named(tmp_path):
    decathlon(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["training"] = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz", "fold": 0} for n in IDS]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert any("folds that dataset.json gives are not read" in note for note in load_dataset(tmp_path).notes)


def test_a_joined_dataset_without_a_split_is_trained_on(tmp_path):
    (tmp_path / "two").mkdir()
    split = with_split(nnunet(tmp_path / "one"), [{"train": IDS[:2], "val": IDS[2:3]}])
    other = plain(tmp_path / "two")
    (other / "dataset.json").write_text('{"labels": {"1": "ball"}}')
    joined = join_datasets([split, load_dataset(other)])
    assert lists(joined)[2] == ["one_x_3", "one_x_4"]


def prepared(root, **marks):
    grid = {"shape": (2, 2, 2), "spacing": (1.0, 1.0, 1.0)}
    files = {name: (f"images/{name}.nii.gz", f"labels/{name}.nii.gz") for name in IDS}
    cases = tuple(PreparedCase(name, *files[name], None, "ct", source=name, **grid, **marks) for name in IDS)
    return Prepared(root, "x", (1.0, 1.0, 1.0), "RAS", ("ct",), {1: "ball"}, cases)


def test_a_case_in_no_list_is_not_trained_on_and_keeps_its_mark(tmp_path):
    write_prepared(prepared(tmp_path, in_split=False))
    assert split_cases(read_prepared(tmp_path)) == ([], [])
    (tmp_path / "store").mkdir()
    assert not any(case.in_split for case in load_dataset(tmp_path, "prepared").cases)
    write_prepared(prepared(tmp_path))
    assert "in_split" not in (tmp_path / "dataset.json").read_text()
    assert all(case.in_split for case in read_prepared(tmp_path).cases)


def test_a_split_file_in_a_preprocessed_folder(tmp_path):
    content = [{"train": IDS[:2], "val": ["x_2.nii.gz"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(content))
    found, notes = with_split_file(prepared(tmp_path))
    assert split_cases(found) == (IDS[:2], IDS[2:3]) and len(notes) == 1
    write_prepared(prepared(tmp_path))
    assert lists(load_dataset(tmp_path, "prepared")) == (IDS[:2], IDS[2:3], IDS[3:])
    (tmp_path / "splits_final.json").unlink()
    assert with_split_file(prepared(tmp_path)) == (prepared(tmp_path), ())


def test_a_split_by_hand_that_is_none_is_named(tmp_path):
    write_prepared(prepared(tmp_path))
    file = tmp_path / "dataset.json"
    file.write_text(file.read_text().replace('"split": null', '"split": "validation"', 1))
    with pytest.raises(DatasetError, match=r"case 'x_0': split 'validation', none of train, val, test, null"):
        read_prepared(tmp_path)
