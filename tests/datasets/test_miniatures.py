"""preprocess on a miniature of every layout: cases, values, names, splits, and why others are left out."""

import json
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.datasets.registry import detect_layouts, load_dataset
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.patches.store import Store
from tests.datasets import miniatures
from tests.datasets.drawn import SHAPE
from tests.datasets.miniatures import MINIATURES, Miniature


def preprocess(miniature: Miniature, out: Path, **flags) -> tuple[int, dict]:
    config = PreprocessConfig(miniature.folder, out, spacing=(0, 0, 0), num_workers=1, **flags)
    code = run(config)
    return code, json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("name", MINIATURES)
def test_preprocess_reads_it_right(name, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    miniature = MINIATURES[name](tmp_path / "in")
    code, found = preprocess(miniature, tmp_path / "out")
    assert code == (1 if miniature.skipped else 0)
    shown = capsys.readouterr().out
    assert f"layout {miniature.layout}: " in shown
    assert found["labels"] == {str(value): name for value, name in miniature.labels.items()}
    cases = {case["id"]: case for case in found["cases"]}
    assert sorted(cases) == sorted(miniature.cases)
    store = Store(tmp_path / "out")
    for case, expected in miniature.cases.items():
        entry = cases[case]
        assert (entry["split"], entry["modality"]) == (expected.split, expected.modality), case
        assert entry.get("patient", case) == expected.patient
        assert store.read_image(case).shape == (*SHAPE, expected.channels)
        assert store.entry(case).labelled == expected.labelled
        assert (entry["label"] is None) == (expected.label is None)
        if expected.label is not None:
            np.testing.assert_array_equal(store.read_label(case), expected.label, err_msg=case)
            means = [store.read_image(case)[expected.label == v, 0].mean() for v in np.unique(expected.label)]
            assert np.all(np.diff(means) > 0), "the image is not in step with its label"
    reasons = {entry["id"]: entry["reason"] for entry in found["skipped"]}
    assert sorted(reasons) == sorted(miniature.skipped)
    for case, words in miniature.skipped.items():
        for word in words:
            assert word in reasons[case] and case in shown
    for case, remark in miniature.remarks.items():
        assert cases[case]["remarks"][0].startswith(remark) and remark in " ".join(shown.split())


@pytest.mark.parametrize("name", MINIATURES)
def test_each_layout_is_found_and_can_be_named(name, tmp_path):
    miniature = MINIATURES[name](tmp_path)
    home = tmp_path / "amos22" if name == "amos" else tmp_path
    assert detect_layouts(home) == [miniature.layout]
    named = load_dataset(home, miniature.layout)
    assert (named.cases, named.layout) == (load_dataset(tmp_path).cases, miniature.layout)


def test_studies_of_a_patient_stay_together(tmp_path):
    dataset = load_dataset(miniatures.panorama(tmp_path).folder)
    assert [case.patient for case in dataset.cases] == ["100000", "100000", "100001", "101994"]
    assert "labels of commit 0123456789abcdef" in dataset.notes


def test_panorama_labels_beside_the_folder(tmp_path):
    miniatures.panorama(tmp_path / "in")
    dataset = load_dataset(tmp_path / "in/batch_1")
    assert [(case.id, case.has_label) for case in dataset.cases] == [("100000_00001", True), ("100000_00002", True)]


def test_several_structures_merged_into_two(tmp_path):
    (tmp_path / "map.toml").write_text("PDAC = [1]\npancreas = [4, 5]\n")
    miniature = miniatures.panorama(tmp_path / "in")
    _, found = preprocess(miniature, tmp_path / "out", label_map=tmp_path / "map.toml")
    assert found["labels"] == {"1": "PDAC", "2": "pancreas"}
    drawn = miniature.cases["100000_00001"].label
    expected = np.select([drawn == 1, (drawn == 4) | (drawn == 5)], [1, 2], 0)
    np.testing.assert_array_equal(Store(tmp_path / "out").read_label("100000_00001"), expected)
    assert "101994_00001" in {entry["id"] for entry in found["skipped"]}


def test_structures_chosen_by_name(tmp_path):
    miniature = miniatures.totalsegmentator_mri(tmp_path / "in")
    _, found = preprocess(miniature, tmp_path / "out", labels=("Liver", "kidney-left"))
    assert found["labels"] == {"1": "liver", "2": "kidney_left"}
    drawn = miniature.cases["s0002"].label
    np.testing.assert_array_equal(
        Store(tmp_path / "out").read_label("s0002"), np.select([drawn == 5, drawn == 3], [1, 2], 0)
    )
    # Judged by all masks, not only by those chosen.
    assert [entry["id"] for entry in found["skipped"]] == ["s0031", "s0026"]


def test_one_modality_of_a_mixed_dataset(tmp_path):
    _, found = preprocess(miniatures.amos(tmp_path / "in"), tmp_path / "out", only="mr")
    assert [case["id"] for case in found["cases"]] == ["amos_0507", "amos_0551", "amos_0600"]


def test_two_datasets_joined_by_structure(tmp_path):
    atlas, total = miniatures.abdomenatlas(tmp_path / "atlas"), miniatures.totalsegmentator_mri(tmp_path / "total")
    config = PreprocessConfig((atlas.folder, total.folder), tmp_path / "out", spacing=(0, 0, 0), num_workers=1)
    assert run(config) == 1
    found = json.loads((tmp_path / "out/dataset.json").read_text())
    labels = {name: int(value) for value, name in found["labels"].items()}
    # 25 and 50 structures, of which 21 are in both.
    assert list(labels.values()) == list(range(1, 55))
    assert {"gallbladder", "inferior_vena_cava", "urinary_bladder", "kidney_left", "brain", "intestine"} <= set(labels)
    assert not {"gall_bladder", "postcava", "bladder"} & set(labels)
    cases = {case["id"]: case for case in found["cases"]}
    assert sorted(cases) == [
        "atlas_BDMAP_00000001",
        "atlas_BDMAP_00000002",
        "total_s0001",
        "total_s0002",
        "total_s0005",
    ]
    assert cases["total_s0005"]["split"] == "test"
    store = Store(tmp_path / "out")
    assert store.entry("atlas_BDMAP_00000001").labelled == tuple(range(1, 26))
    labelled = set(store.entry("total_s0001").labelled)
    assert len(labelled) == 50 and labels["liver"] in labelled and labels["celiac_trunk"] not in labelled
    assert cases["total_s0001"]["labelled"] == sorted(labelled)
    for case, miniature, source in (
        ("total_s0002", total, "s0002"),
        ("atlas_BDMAP_00000001", atlas, "BDMAP_00000001"),
    ):
        drawn, read = miniature.cases[source].label, store.read_label(case)
        for value, name in miniature.labels.items():
            joint = {"gall_bladder": "gallbladder", "postcava": "inferior_vena_cava", "bladder": "urinary_bladder"}
            np.testing.assert_array_equal(read == labels[joint.get(name, name)], drawn == value, err_msg=name)


def test_masks_that_are_not_there_are_not_labelled(tmp_path):
    miniature = miniatures.totalsegmentator_mri(tmp_path / "in")
    (tmp_path / "in/s0001/segmentations/spleen.nii.gz").unlink()
    _, found = preprocess(miniature, tmp_path / "out")
    assert Store(tmp_path / "out").entry("s0001").labelled == tuple(range(2, 51))
    assert "labelled" not in found["cases"][1]
