"""Which file names mean the same case."""

import pytest

from mambahome_jax.datasets.files import channels_of, counterparts
from mambahome_jax.datasets.registry import load_dataset
from tests.datasets.test_layouts import touch


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        (["x_0000", "y_0000"], {"x": ["x_0000"], "y": ["y_0000"]}),
        (["x_002_0000"], {"x_002": ["x_002_0000"]}),
        (["x_0001", "x_0000", "y_0000", "y_0001"], {"x": ["x_0000", "x_0001"], "y": ["y_0000", "y_0001"]}),
        # Numbers of the cases themselves.
        (["scan_0000", "scan_0001", "scan_0002"], {}),
        (["scan_0003", "scan_0004"], {}),
        (["a_0000", "b_0001"], {}),
        (["x_0000", "x_0001", "y_0000"], {}),
        (["x_0000", "y"], {}),
        ([], {}),
    ],
)
def test_endings_are_channels_where_every_case_has_the_same(names, cases):
    assert channels_of(names) == cases


@pytest.mark.parametrize(
    ("names", "others", "pairs"),
    [
        (["x_0000"], ["x"], {"x_0000": "x"}),
        (["x"], ["x_0000"], {"x": "x_0000"}),
        (["x", "y_0000"], ["x_0000", "y"], {"x": "x_0000", "y_0000": "y"}),
        (["x_0000"], ["x_0000"], {"x_0000": "x_0000"}),
        # What is equal is paired first, and a number of the case itself is not left out.
        (["x", "x_0000"], ["x"], {"x": "x"}),
        (["scan_0000", "scan_0001"], ["scan"], {}),
        (["scan_0000", "scan_0001"], ["scan_0000", "scan_0001"], {f"scan_000{n}": f"scan_000{n}" for n in (0, 1)}),
        (["x_0001"], ["x"], {}),
    ],
)
def test_names_that_differ_in_the_channel_alone_are_counterparts(names, others, pairs):
    assert counterparts(names, others) == pairs


def test_channels_in_the_plain_layout_are_one_case(tmp_path):
    touch(tmp_path / "one", "images/p1_0000.nii.gz", "images/p2_0000.nii.gz", "labels/p1.nii.gz", "labels/p2.nii.gz")
    assert [(case.id, case.label.name) for case in load_dataset(tmp_path / "one").cases] == [
        ("p1", "p1.nii.gz"),
        ("p2", "p2.nii.gz"),
    ]
    files = [f"images/p{p}_000{channel}.nii.gz" for p in (1, 2) for channel in (0, 1)]
    touch(tmp_path / "two", *files, "labels/p1.nii.gz", "labels/p2_seg.nii.gz")
    dataset = load_dataset(tmp_path / "two")
    assert [(case.id, [path.name for path in case.images], case.label.name) for case in dataset.cases] == [
        ("p1", ["p1_0000.nii.gz", "p1_0001.nii.gz"], "p1.nii.gz"),
        ("p2", ["p2_0000.nii.gz", "p2_0001.nii.gz"], "p2_seg.nii.gz"),
    ]
    assert dataset.channels == ("channel_0", "channel_1") and not dataset.skipped


def test_a_case_that_lacks_a_channel_is_skipped_and_one_case_alone_has_its_channels(tmp_path):
    touch(tmp_path / "one", "images/x_0000.nii.gz", "images/x_0001.nii.gz", "labels/x.nii.gz")
    (case,) = load_dataset(tmp_path / "one").cases
    assert (case.id, len(case.images)) == ("x", 2)
    touch(tmp_path / "one", "images/y_0000.nii.gz", "labels/y.nii.gz")
    dataset = load_dataset(tmp_path / "one")
    assert [case.id for case in dataset.cases] == ["x"]
    assert dataset.skipped == (("y", "images/y_0001 not found; expected a file for each of 2 channels"),)
    # Numbers of the cases, with another ending in labels/.
    files = [f"images/scan_{n:04}.nii.gz" for n in range(3)] + [f"labels/scan_{n:04}_seg.nii.gz" for n in range(3)]
    touch(tmp_path / "two", *files)
    assert [case.id for case in load_dataset(tmp_path / "two").cases] == ["scan_0000", "scan_0001", "scan_0002"]


def test_cases_numbered_with_four_digits_stay_apart_in_the_plain_layout(tmp_path):
    names = [f"{site}_{number:04}.nii.gz" for site in "ab" for number in range(3)]
    touch(tmp_path, *(f"{part}/{name}" for part in ("images", "labels") for name in names))
    assert [case.id for case in load_dataset(tmp_path).cases] == [name.removesuffix(".nii.gz") for name in names]
    assert not any(case.images for case in load_dataset(tmp_path).cases)
