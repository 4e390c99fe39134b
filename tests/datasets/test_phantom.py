"""Synthetic scans: what a network is asked to learn is there, and in its place."""

import json

import numpy as np
import pytest
from scipy import ndimage

from mambahome_jax.datasets.phantom import LABELS, phantom, write_phantoms
from mambahome_jax.errors import OutputError
from mambahome_jax.imaging.geometry import orientation_of, reorient
from mambahome_jax.imaging.volume import read_labels, read_volume


@pytest.fixture(scope="module")
def patients():
    return [phantom(seed) for seed in range(5)]


def test_every_patient_has_every_organ_in_its_place(patients):
    for image, label in patients:
        assert image.array.dtype == np.int16 and label.array.dtype == np.uint8
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert sorted(np.unique(label.array)) == [0, *LABELS]
        voxel = abs(np.linalg.det(label.affine[:3, :3])) / 1000
        volume = {name: np.count_nonzero(label.array == value) * voxel for value, name in LABELS.items()}
        assert 400 < volume["liver"] < 2000 and 80 < volume["spleen"] < 400
        assert 100 < volume["kidneys"] < 400 and 50 < volume["aorta"] < 260
        centre = {
            name: label.affine[:3, :3] @ ndimage.center_of_mass(label.array == value) + label.affine[:3, 3]
            for value, name in LABELS.items()
        }
        # In RAS+ the patient's right side has the larger x.
        assert centre["liver"][0] - centre["spleen"][0] > 90
        x = label.affine[0, :3] @ np.argwhere(label.array == 3).T + label.affine[0, 3]
        right, left = x[x > centre["aorta"][0]], x[x < centre["aorta"][0]]
        assert right.mean() - left.mean() > 80 and 0.5 < right.size / left.size < 2


def test_organs_stand_out_but_no_window_isolates_them(patients):
    for image, label in patients:
        median = {value: np.median(image.array[label.array == value]) for value in LABELS}
        assert median[1] < median[2] < median[3] < median[4]
        near = np.abs(image.array - median[1]) < 25
        assert np.count_nonzero(near & (label.array == 0)) > 0.1 * np.count_nonzero(near)


def test_patients_and_grids_differ(patients):
    assert len({orientation_of(image.affine) for image, _ in patients}) >= 3
    assert len({tuple(image.spacing.round(3)) for image, _ in patients}) == len(patients)
    for image, _ in patients:
        shape = reorient(image, "RAS").shape
        assert all(low <= n <= high for n, low, high in zip(shape, (95, 80, 40), (115, 95, 57), strict=True))


def test_same_seed_same_patient(patients):
    image, label = phantom(3)
    np.testing.assert_array_equal(image.array, patients[3][0].array)
    np.testing.assert_array_equal(label.array, patients[3][1].array)


def test_written_phantoms_make_a_dataset(tmp_path):
    assert write_phantoms(tmp_path, 2, seed=7) == ["phantom_001", "phantom_002"]
    assert write_phantoms(tmp_path / "more", 1, seed=7, first=2) == ["phantom_002"]
    image = read_volume(tmp_path / "images" / "phantom_002.nii.gz")
    label = read_labels(tmp_path / "labels" / "phantom_002.nii.gz")
    np.testing.assert_array_equal(image.affine, label.affine)
    again = read_volume(tmp_path / "more" / "images" / "phantom_002.nii.gz")
    np.testing.assert_array_equal(image.array, again.array)
    table = json.loads((tmp_path / "dataset.json").read_text())
    assert table["labels"] == {"0": "background"} | {str(value): name for value, name in LABELS.items()}


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_phantoms(tmp_path / "file", 1)
