"""Names of structures: one organ in two spellings, structures chosen and merged, datasets joined."""

from pathlib import Path

import pytest

from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.structures import (
    consecutive,
    join_datasets,
    merge_structures,
    read_structure_table,
    select_structures,
    structure_key,
)
from mambahome_jax.errors import DatasetError


def numbered(names):
    return dict(enumerate(names, start=1))


def dataset(labels, *cases, **changes):
    cases = cases or (Case("a", Path("a.nii.gz"), Path("a_label.nii.gz")),)
    return Dataset(changes.pop("name", "set"), ("CT",), labels, cases, **changes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left kidney", "kidney_left"),
        ("Kidney-L", "kidney_left"),
        ("gall_bladder", "gallbladder"),
        ("postcava", "inferior_vena_cava"),
        ("bladder", "urinary_bladder"),
        ("arota", "aorta"),
        ("right adrenal gland", "adrenal_gland_right"),
    ],
)
def test_spellings_of_one_organ(one, other):
    assert structure_key(one) == structure_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("kidney_left", "kidney_right"), ("prostate", "prostate/uterus"), ("colon", "duodenum"), ("Niere", "Köper")],
)
def test_what_is_not_one_organ(one, other):
    assert structure_key(one) != structure_key(other)


def test_values_become_consecutive():
    found = consecutive(dataset({1: "a", 4: "b", 10: "c"}))
    assert found.labels == {1: "a", 2: "b", 3: "c"}
    assert found.cases[0].values == {1: 1, 4: 2, 10: 3}
    same = dataset({1: "a", 2: "b"})
    assert consecutive(same) is same


def test_chosen_structures_keep_their_order_and_the_rest_is_background():
    found = select_structures(dataset({1: "liver", 2: "right kidney", 3: "spleen"}), ["spleen", "kidney_right"])
    assert found.labels == {1: "spleen", 2: "right kidney"}
    assert found.cases[0].values == {1: 0, 2: 2, 3: 1}
    with pytest.raises(DatasetError, match="no structure 'heart'; expected one of: 1 liver"):
        select_structures(dataset({1: "liver"}), ["heart"])


def test_merged_structures():
    source = dataset({1: "lesion", 2: "veins", 3: "parenchyma", 4: "duct"})
    found = merge_structures(source, {"PDAC": [1], "pancreas": [3, "duct"]})
    assert found.labels == {1: "PDAC", 2: "pancreas"}
    assert found.cases[0].values == {1: 1, 2: 0, 3: 2, 4: 2}
    with pytest.raises(DatasetError, match="veins is in b and in another structure"):
        merge_structures(source, {"a": [2], "b": [2]})
    with pytest.raises(DatasetError, match="no structure 9"):
        merge_structures(source, {"a": [9]})
    unnamed = merge_structures(dataset({}), {"background": [2], "a": [5]})
    assert (unnamed.labels, unnamed.cases[0].values) == ({1: "a"}, {2: 0, 5: 1})


def test_label_map_files(tmp_path):
    file = tmp_path / "map.toml"
    file.write_text('pancreas = [4, 5]\nPDAC = 1\nkidneys = ["kidney_left", "kidney_right"]\n')
    assert read_structure_table(file) == {"pancreas": [4, 5], "PDAC": [1], "kidneys": ["kidney_left", "kidney_right"]}
    for text in ("", "a = []", "a = [1.5]", "a = ", "a = [true]"):
        file.write_text(text)
        with pytest.raises(DatasetError, match="lines such as"):
            read_structure_table(file)
    with pytest.raises(DatasetError, match="no such file"):
        read_structure_table(tmp_path / "none.toml")


def test_joined_datasets():
    first = dataset(
        {1: "gall_bladder", 2: "left kidney"}, name="A b", skipped=(("x", "damaged"),), notes=("n",), hint="h"
    )
    partial = Case("b", Path("b.nii.gz"), Path("l.nii.gz"), patient="p", labelled=(3,))
    second = dataset({1: "brain", 3: "gallbladder"}, Case("a", Path("c.nii.gz"), Path("m.nii.gz")), partial, name="A b")
    joint = join_datasets([first, second])
    assert joint.labels == {1: "gallbladder", 2: "kidney_left", 3: "brain"}
    assert [(case.id, case.patient) for case in joint.cases] == [
        ("A_b_a", "A_b_a"),
        ("A_b_2_a", "A_b_2_a"),
        ("A_b_2_b", "A_b_2_p"),
    ]
    assert [case.values for case in joint.cases] == [{1: 1, 2: 2}, {1: 3, 3: 1}, {1: 3, 3: 1}]
    assert [case.labelled for case in joint.cases] == [(1, 2), (1, 3), (1,)]
    assert (joint.skipped, joint.notes, joint.hint) == ((("A_b_x", "damaged"),), ("A_b: n",), "h")
    # A structure made of one part that this dataset labels and one that it does not.
    merged = merge_structures(joint, {"all": ["gallbladder", "kidney_left"], "brain": ["brain"]})
    assert [case.labelled for case in merged.cases] == [(1,), (1, 2), (1,)]
    assert merged.cases[1].values == {1: 2, 3: 1}


def test_structures_of_labels_without_names_cannot_be_chosen():
    with pytest.raises(DatasetError, match=r"no structure 'spleen': labels without names. Name them in a dataset.json"):
        select_structures(dataset({}), ["spleen"])


def test_datasets_that_cannot_be_joined():
    with pytest.raises(DatasetError, match="labels without names"):
        join_datasets([dataset({1: "a"}), dataset({})])
    two = Dataset("two", ("T1", "T2"), {1: "a"}, ())
    with pytest.raises(DatasetError, match="2 channels; expected 1 channel as in set"):
        join_datasets([dataset({1: "a"}), two])
