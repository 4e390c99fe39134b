"""dataset.json of a preprocessed folder, and how its cases are split."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError, OutputError


def case(name: str, **changes) -> PreparedCase:
    values = {"split": None, "label": f"labels/{name}.nii.gz", "patient": ""} | changes
    return PreparedCase(
        id=name,
        image=f"images/{name}.nii.gz",
        modality="ct",
        shape=(4, 5, 6),
        spacing=(1.0, 1.0, 2.5),
        source=f"scans/{name}.nii.gz",
        **values,
    )


def prepared(root: Path, *cases: PreparedCase) -> Prepared:
    labels = {1: "liver", 12: "spleen"}
    return Prepared(root, "set", (1.0, 1.0, 2.5), "RAS", ("CT",), labels, cases, (("bad", "truncated"),))


def test_round_trip_and_keys(tmp_path):
    partial = case("d", labelled=(12,), remarks=("2 voxels lie in two masks",))
    written = prepared(tmp_path, case("a"), case("b", label=None, split="test"), case("c", patient="p"), partial)
    write_prepared(written)
    assert read_prepared(tmp_path) == written
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert set(content) == {"version", "name", "spacing", "orientation", "channels", "labels", "cases", "skipped"}
    assert content["cases"][0] == {
        "id": "a",
        "image": "images/a.nii.gz",
        "label": "labels/a.nii.gz",
        "split": None,
        "modality": "ct",
        "shape": [4, 5, 6],
        "spacing": [1.0, 1.0, 2.5],
        "source": "scans/a.nii.gz",
    }
    assert content["labels"] == {"1": "liver", "12": "spleen"}
    assert content["skipped"] == [{"id": "bad", "reason": "truncated"}]
    assert read_prepared(tmp_path).image_path(written.cases[0]) == tmp_path / "images/a.nii.gz"


def test_spacing_none_means_each_scan_its_own(tmp_path):
    write_prepared(replace(prepared(tmp_path), spacing=None))
    assert read_prepared(tmp_path).spacing is None


def test_prepared_folder_is_a_dataset_too(tmp_path):
    (tmp_path / "store").mkdir()
    write_prepared(prepared(tmp_path, case("a", split="val", patient="p")))
    found = load_dataset(tmp_path)
    assert (found.labels, found.channels) == ({1: "liver", 12: "spleen"}, ("CT",))
    assert (found.cases[0].split, found.cases[0].patient, found.cases[0].modality) == ("val", "p", "ct")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"cases": [{"id": "a"}]}, "damaged"),
        ({"spacing": [1]}, "damaged"),
        ({"values": {"1": 255, "12": 255}}, "expected distinct values from 1 to 65535"),
        ({"values": {"1": 255}}, 'expected a stored value for each of "labels"'),
    ],
)
def test_damaged_description(tmp_path, change, message):
    write_prepared(prepared(tmp_path, case("a")))
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        read_prepared(tmp_path)


def test_unwritable_folder(tmp_path):
    with pytest.raises(OutputError, match=r"dataset\.json: cannot be written: No such file"):
        write_prepared(prepared(tmp_path / "missing"))


def test_marked_cases_are_held_out():
    cases = [
        case("a", split="val"),
        case("b", split="train"),
        case("c"),
        case("d", split="test"),
        case("e", label=None),
    ]
    assert split_cases(prepared(Path(), *cases)) == (["b", "c"], ["a"])


def test_every_fifth_case_is_held_out_by_seed():
    cases = [case(f"c{i:02}") for i in range(20)] + [case("t", split="test"), case("u", label=None)]
    train, held_out = split_cases(prepared(Path(), *cases), seed=3)
    assert (len(train), len(held_out)) == (16, 4)
    assert split_cases(prepared(Path(), *cases), seed=3) == (train, held_out)
    assert split_cases(prepared(Path(), *cases), seed=4)[1] != held_out
    assert not {"t", "u"} & {*train, *held_out}
    assert len(split_cases(prepared(Path(), *cases), 3, hold_out=2)[1]) == 10
    assert split_cases(prepared(Path(), *cases), 3, hold_out=0) == ([f"c{i:02}" for i in range(20)], [])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 1000))
def test_no_patient_is_on_both_sides(patients, seed):
    cases = [case(f"c{i}", patient=f"p{patient}") for i, patient in enumerate(patients)]
    train, held_out = split_cases(prepared(Path(), *cases), seed)
    patient_of = {c.id: c.patient for c in cases}
    assert sorted(train + held_out) == sorted(patient_of)
    assert not {patient_of[c] for c in train} & {patient_of[c] for c in held_out}
    assert train
    assert bool(held_out) == (len(set(patients)) > 1)
