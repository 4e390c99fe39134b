"""Findings that need the whole dataset, and the plan, on facts without files."""

from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.datasets.base import Dataset
from mambahome_jax.preprocessing.findings import CaseFacts, dataset_findings
from mambahome_jax.preprocessing.plan import Machine
from mambahome_jax.preprocessing.summary import summarise_dataset


def facts(name: str, **changes) -> CaseFacts:
    fact = CaseFacts(name, name, "train", "ct", f"{name}.nii.gz", True, (100, 100, 50), (1.0, 1.0, 2.0), "RAS", name)
    return replace(fact, **changes)


def dataset(labels=None, **changes) -> Dataset:
    return Dataset("d", ("CT",), labels or {}, (), **changes)


def found(cases: list[CaseFacts], labels=None) -> list[tuple[str, str, str, str]]:
    return [(f.severity, f.kind, f.case, f.found) for f in dataset_findings(dataset(labels), cases)]


def test_a_patient_in_two_splits_is_a_leak():
    cases = [facts("a", patient="p"), facts("b", patient="p", split="test"), facts("c", patient="p", split=None)]
    assert found(cases) == [("warning", "leak", "b", "patient p in train: a; test: b")]
    assert found([facts("a", patient="p"), facts("b", patient="p")]) == []


def test_the_same_image_in_two_splits_is_a_leak():
    cases = [facts("a", digest="x"), facts("b", digest="x", split="test"), facts("c", digest=""), facts("d", digest="")]
    assert found(cases) == [
        ("warning", "leak", "b", "the same image as a, which is in train and this one in test"),
    ]


def test_what_the_layout_left_out_is_listed():
    given = dataset(skipped=(("x", "no image"),), notes=("a note",))
    listed = [(f.severity, f.case, f.found) for f in dataset_findings(given, [facts("a")])]
    assert listed == [("error", "x", "no image"), ("note", "", "a note")]


def test_no_label_at_all_is_said_once_and_test_cases_need_none():
    assert found([facts("a", labelled=False, split="test"), facts("b")]) == []
    cases = [facts(name, labelled=False) for name in "abc"]
    assert found(cases) == [("warning", "missing", "", "none of 3 cases has a label map")]


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.1, 5.0])
def test_outliers_are_far_off_and_of_their_own_modality(factor):
    cases = [facts(f"c{i}", spacing=(1 + 0.01 * i, 1.0, 2.0)) for i in range(9)]
    cases.append(facts("far", spacing=(1.0, factor, 2.0)))
    cases += [facts(f"m{i}", modality="mr", spacing=(5.0, 5.0, 5.0)) for i in range(6)]
    far = [case for _, kind, case, _ in found(cases) if kind == "spacing"]
    assert far == (["far"] if factor in (0.2, 5.0) else [])


def test_a_dataset_of_mixed_spacings_has_no_outliers():
    spacings = np.geomspace(0.5, 6, 20)
    assert found([facts(f"c{i}", spacing=(1.0, 1.0, mm)) for i, mm in enumerate(spacings)]) == []


def test_rare_and_missing_structures():
    cases = [facts(f"c{i:02}", volumes_ml={1: 3.0} | ({2: 1.0} if i == 4 else {})) for i in range(30)]
    listed = found(cases, {1: "liver", 2: "tumour", 3: "spleen"})
    assert listed == [
        ("note", "structure", "", "label 2 (tumour) occurs in 1 of 30 label maps: c04"),
        ("warning", "structure", "", "label 3 (spleen) occurs in none of 30 label maps"),
    ]
    cases += [facts("m", modality="mr", volumes_ml={2: 1.0})]
    text = [line[3] for line in found(cases, {1: "liver", 2: "tumour"})]
    assert "label 1 (liver) occurs in none of the 1 label maps of modality mr" in text


def test_the_plan_of_check_leaves_thick_slices_whole():
    cases = [facts(name, spacing=(1.5, 1.5, 10.0), shape=(256, 216, 10)) for name in "abc"]
    plan = summarise_dataset(dataset(), cases, Machine(80.0)).plan
    assert plan is not None and plan.spacing.value == (1.5, 1.5, 10)
    assert plan.patch_size.value == (256, 224, 10) and plan.strides.value[0] == (2, 2, 1)


@pytest.mark.parametrize(
    ("modality", "low", "high", "expected"),
    [(None, -1024.0, 3000.0, "ct"), (None, 0.0, 800.0, "mr"), ("us", 0.0, 255.0, "us"), (None, 0.0, 255.0, "mr")],
)
def test_suggested_modality(modality, low, high, expected):
    row = (low, low, low, low, high, high, high)
    cases = [facts(name, modality=modality, percentiles=(row,)) for name in "abc"]
    assert summarise_dataset(dataset(), cases, Machine()).modality == expected


def test_unusable_cases_do_not_enter_the_summary():
    bad = facts("bad", spacing=(50.0, 50.0, 50.0))
    broken = replace(bad, findings=tuple(dataset_findings(dataset(skipped=(("bad", "x"),)), [])))
    assert not broken.usable
    summary = summarise_dataset(dataset(), [facts("a"), broken], Machine())
    assert summary.spacing_mm is not None and summary.spacing_mm.max == (1, 1, 2)
    assert summary.cases == (("train", "ct", 1, 1),)
    assert summarise_dataset(dataset(), [broken], Machine()).plan is None
