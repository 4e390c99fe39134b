"""One label map of what a case has: masks, values to replace, channels in files of their own."""

import numpy as np
import pytest

from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.label_map import read_image, read_label_map
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume, write_volume

SHAPE = (5, 4, 3)


def save(path, array, shift=0.0):
    affine = np.eye(4)
    affine[0, 3] = shift
    write_volume(path, Volume(array, affine))
    return path


@pytest.fixture
def image(tmp_path):
    save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.float32))
    return Volume(np.zeros(SHAPE, np.float32), np.eye(4))


def mask(*voxels, value=1):
    array = np.zeros(SHAPE, np.uint8)
    for voxel in voxels:
        array[voxel] = value
    return array


def test_the_later_mask_has_the_voxel_and_overlaps_are_counted(tmp_path, image):
    files = [mask((0, 0, 0), (1, 0, 0)), mask((1, 0, 0), (2, 0, 0), value=255), mask((1, 0, 0), (2, 0, 0), (3, 0, 0))]
    masks = tuple((value, save(tmp_path / f"{value}.nii.gz", array)) for value, array in enumerate(files, start=1))
    case = Case("a", tmp_path / "image.nii.gz", masks=masks)
    label, remarks, _ = read_label_map(case, image, {1: "x", 2: "y", 3: "z"})
    assert label.array.dtype == np.uint8
    assert label.array[:, 0, 0].tolist() == [1, 3, 3, 3, 0] and label.array.sum() == 10
    assert remarks == ("3 voxels lie in two masks (most: 2 in y and z); the later in the table has them",)
    # Masks of one structure do not overlap, and one that is left out takes nothing from the others.
    merged = Case("a", case.image, masks=masks, values={1: 1, 2: 1, 3: 0})
    label, remarks, _ = read_label_map(merged, image, {1: "xy"})
    assert (label.array[:, 0, 0].tolist(), remarks) == ([1, 1, 1, 0, 0], ())


def test_masks_that_cannot_be_merged(tmp_path, image):
    case = Case("a", tmp_path / "image.nii.gz", masks=((1, save(tmp_path / "m.nii.gz", mask((0, 0, 0)) + 1)),))
    with pytest.raises(DatasetError, match=r"m\.nii\.gz: values 1, 2; expected a mask of 0 and 1"):
        read_label_map(case, image, {1: "x"})
    save(tmp_path / "m.nii.gz", mask((0, 0, 0)), shift=0.4)
    with pytest.raises(DatasetError, match=r"m\.nii\.gz: a grid that lies up to 0\.4 mm"):
        read_label_map(case, image, {1: "x"})


@pytest.mark.parametrize("stored", ["LPI", "SRA", "PIR"])
def test_a_label_map_is_matched_by_its_place_however_its_voxels_are_stored(tmp_path, image, stored):
    array = mask((1, 0, 2), (4, 3, 0), value=2)
    turned = reorient(Volume(array, np.eye(4)), stored)
    assert turned.array.shape != SHAPE or not np.array_equal(turned.array, array)
    write_volume(tmp_path / "label.nii.gz", turned)
    label, _, counts = read_label_map(Case("a", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"), image, {2: "x"})
    np.testing.assert_array_equal(label.array, array)
    assert counts == {2: 2}
    moved = turned.affine.copy()
    moved[0, 3] += 0.4
    write_volume(tmp_path / "label.nii.gz", Volume(turned.array, moved))
    with pytest.raises(DatasetError, match=r"label\.nii\.gz: a grid that lies up to 0\.4 mm"):
        read_label_map(Case("a", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"), image, {2: "x"})


def test_nothing_labelled(tmp_path, image):
    files = {1: save(tmp_path / "1.nii.gz", mask()), 2: save(tmp_path / "2.nii.gz", mask())}
    case = Case("a", tmp_path / "image.nii.gz", masks=tuple(files.items()), values={1: 1, 2: 0}, may_be_empty=False)
    with pytest.raises(DatasetError, match="all 2 masks are empty"):
        read_label_map(case, image, {1: "x"})
    save(files[2], mask((0, 0, 0)))
    assert not read_label_map(case, image, {1: "x"})[0].array.any()
    assert read_label_map(Case("a", case.image), image, {}) == (None, (), {})
    assert not read_label_map(Case("a", case.image, files[1]), image, {})[0].array.any()


def test_values_are_replaced_and_others_refused(tmp_path, image):
    array = np.zeros(SHAPE)
    array[0, 0, :3] = 1.0, 4.0, 300.0
    case = Case("a", tmp_path / "image.nii.gz", save(tmp_path / "l.nii.gz", array), values={1: 0, 4: 2, 300: 1})
    assert read_label_map(case, image, {1: "x", 2: "y"})[0].array[0, 0].tolist() == [0, 2, 1]
    save(case.label, array + (array == 0) * 7)
    with pytest.raises(DatasetError, match=r"unknown label values 7; expected 1 left out, 4 y, 300 x. Pull again"):
        read_label_map(case, image, {1: "x", 2: "y"}, "Pull again.")


def test_channels_in_files_of_their_own(tmp_path):
    files = tuple(save(tmp_path / f"{n}.nii.gz", np.full(SHAPE, n, np.float32)) for n in (3, 8))
    case = Case("a", files[0], images=files)
    found = read_image(case, 2)
    assert found.array.shape == (*SHAPE, 2) and found.array[1, 1, 1].tolist() == [3, 8]
    with pytest.raises(DatasetError, match="2 files; expected 3, a file a channel"):
        read_image(case, 3)
    save(files[1], np.zeros((5, 4, 2), np.float32))
    with pytest.raises(DatasetError, match="grid of 5 x 4 x 2 voxels"):
        read_image(case, 2)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("int16", "int16"), "int16"),
        (("int16", "uint8"), "int16"),
        (("uint8", "int16"), "int16"),
        (("int16", "float32"), "float32"),
        (("uint32", "int16"), "float32"),
        (("int32", "float32"), "float32"),
    ],
)
def test_channels_as_stored_have_the_values_of_float32(tmp_path, types, expected):
    rng = np.random.default_rng(0)
    files = tuple(save(tmp_path / f"{n}.nii", rng.integers(0, 200, SHAPE).astype(kind)) for n, kind in enumerate(types))
    case = Case("a", files[0], images=files)
    stored = read_image(case, 2, as_stored=True)
    assert stored.array.dtype == expected
    np.testing.assert_array_equal(stored.array.astype(np.float32), read_image(case, 2).array)
