"""Folds of a cross-validation: by patient, each case once, what occurs spread evenly, the same from the same seed."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.splits import divide, held_out_folds, in_fold, with_split_file
from mambahome_jax.errors import ConfigError, DatasetError
from tests.datasets.test_splits import IDS, nnunet

PATIENTS = st.lists(st.tuples(st.integers(0, 30), st.sets(st.sampled_from("abcde"))), min_size=2, max_size=60)


def dataset(root, cases=()):
    """cases: fields that differ."""
    listed = [
        PreparedCase(name, f"images/{name}.nii.gz", "l.nii.gz", None, "ct", (8, 8, 8), (1.0, 1.0, 1.0), name)
        for name in IDS
    ]
    listed = [dataclasses.replace(case, **dict(cases).get(case.id, {})) for case in listed]
    return Prepared(root, "x", (1.0, 1.0, 1.0), "RAS", ("ct",), {1: "ball"}, tuple(listed))


@given(PATIENTS, st.integers(2, 6), st.integers(0, 3))
def test_each_case_is_held_out_once_with_its_patient(drawn, folds, seed):
    patients = {f"case{number}": f"p{patient}" for number, (patient, _) in enumerate(drawn)}
    traits = {f"case{number}": present for number, (_, present) in enumerate(drawn)}
    if len({*patients.values()}) < folds:
        return
    parts = divide(patients, folds, seed, traits)
    assert Counter(case for part in parts for case in part) == Counter([*patients]) and all(parts)
    for patient in {*patients.values()}:
        assert sum(patient in {patients[case] for case in part} for part in parts) == 1
    # The order in which the cases are listed does not matter.
    turned = divide(dict(reversed(patients.items())), folds, seed, traits)
    assert [{*part} for part in turned] == [{*part} for part in parts]


@given(st.integers(0, 20))
def test_what_is_rare_is_in_as_many_folds_as_can_be(seed):
    patients = {f"c{number}": f"c{number}" for number in range(53)}
    traits = {
        case: ["common", *(["rare"] if number < 5 else []), *(["pair"] if 4 <= number < 14 else [])]
        for number, case in enumerate(patients)
    }
    parts = divide(patients, 5, seed, traits)
    assert sorted(map(len, parts)) == [10, 10, 11, 11, 11]
    for trait, each in (("rare", {1}), ("pair", {2})):
        assert {sum(trait in traits[case] for case in part) for part in parts} == each


def test_another_seed_gives_other_folds():
    patients = {f"c{number}": f"c{number}" for number in range(20)}
    assert len({str(divide(patients, 5, seed, {})) for seed in range(4)}) == 4


def test_of_a_fold_the_cases_are_marked_and_those_of_the_test_part_stay(tmp_path):
    prepared = dataset(tmp_path, {"x_0": {"split": "test"}, "x_1": {"split": "val"}, "x_2": {"label": None}})
    parts = held_out_folds(prepared, 3, 0, {})
    assert sorted(case for part in parts for case in part) == ["x_1", "x_3", "x_4"]
    for part in parts:
        marked = in_fold(prepared, part)
        train, held_out = split_cases(marked)
        assert held_out == [*part] and sorted([*train, *held_out]) == ["x_1", "x_3", "x_4"]
        assert marked.cases[0].split == "test" and marked.cases[2].split is None
    with pytest.raises(ConfigError, match="--folds 4; expected at most 3, the number of patients with labels"):
        held_out_folds(prepared, 4, 0, {})
    alone = dataclasses.replace(prepared, cases=prepared.cases[3:4])
    with pytest.raises(ConfigError, match="--folds 2; expected 2 patients or more with labels"):
        held_out_folds(alone, 2, 0, {})


FOLDS = [IDS[:2], IDS[2:4], IDS[4:]]
SPLITS = [{"train": [case for case in IDS if case not in part], "val": part} for part in FOLDS]


@pytest.mark.parametrize("where", ["dataset", "prepared"])
def test_the_folds_of_a_split_file_are_taken(tmp_path, where):
    if where == "dataset":
        nnunet(tmp_path)
        (tmp_path / "splits_final.json").write_text(json.dumps(SPLITS))
        own = {case.id: {"fold": case.fold} for case in load_dataset(tmp_path).cases}
        write_prepared(dataset(tmp_path, own))
        (tmp_path / "splits_final.json").unlink()
    else:
        write_prepared(dataset(tmp_path))
        (tmp_path / "splits_final.json").write_text(json.dumps(SPLITS))
    prepared, _ = with_split_file(read_prepared(tmp_path))
    assert [*map(list, held_out_folds(prepared, 3, 0, {}))] == FOLDS
    with pytest.raises(ConfigError, match=r"--folds 5, but the dataset's own folds .* are 0, 1, 2\. Pass --folds 3"):
        held_out_folds(prepared, 5, 0, {})


def test_cases_that_all_folds_keep_for_testing_are_in_none(tmp_path):
    write_prepared(dataset(tmp_path))
    test, *others = IDS
    splits = [{"train": others[2:], "val": others[:2]}, {"train": others[:2], "val": others[2:]}]
    (tmp_path / "splits_final.json").write_text(json.dumps([split | {"test": [test]} for split in splits]))
    prepared, _ = with_split_file(read_prepared(tmp_path))
    assert [*map(list, held_out_folds(prepared, 2, 0, {}))] == [others[:2], others[2:]]


def test_a_fold_whose_cases_cannot_be_used_leaves_one_fewer(tmp_path):
    prepared = dataset(tmp_path, {case: {"fold": 2 * (number % 2)} for number, case in enumerate(IDS)})
    assert [*map(list, held_out_folds(prepared, 2, 0, {}))] == [IDS[::2], IDS[1::2]]


@pytest.mark.parametrize("change", ["twice", "nowhere", "not trained on"])
def test_folds_that_do_not_hold_out_each_case_once_are_named_and_not_taken(tmp_path, change):
    splits = json.loads(json.dumps(SPLITS))
    if change == "twice":
        splits[1] = splits[0]
    elif change == "nowhere":
        splits[2] = {"train": IDS, "val": []}
    else:
        splits[1]["train"].remove("x_0")
    write_prepared(dataset(tmp_path))
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    prepared, notes = with_split_file(read_prepared(tmp_path))
    note = "the folds of splits_final.json do not hold out each case once, so --folds divides the cases itself"
    assert note in notes and {case.fold for case in prepared.cases} == {None}
    assert len(held_out_folds(prepared, 2, 0, {})) == 2


def test_a_later_fold_that_is_damaged_is_named(tmp_path):
    write_prepared(dataset(tmp_path))
    (tmp_path / "splits_final.json").write_text(json.dumps([SPLITS[0], {"train": [1], "val": ["x_0"]}]))
    with pytest.raises(DatasetError, match="train holds 1"):
        with_split_file(read_prepared(tmp_path))
