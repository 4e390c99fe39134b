"""Orientation and resampling: equal to MONAI, and true to the world."""

import itertools
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel import orientations
from scipy import ndimage

from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging import geometry
from mambahome_jax.imaging.geometry import (
    cubic_limits,
    orientation_of,
    reorient,
    resample,
    resample_to,
    resampled_grid,
)
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume
from tests.conftest import golden_path, load_golden
from tests.imaging.test_volume import CASES

ORIENTATIONS = ["RAS", "LPS", "PSR", "AIL", "SRP", "LAI"]


@pytest.mark.parametrize("target", ["lps", "ras"])
@pytest.mark.parametrize("case", CASES)
def test_reorients_and_resamples_as_monai(case, target):
    expected = load_golden(f"pipeline/geometry/{case}.npz")
    image = reorient(read_volume(golden_path(f"pipeline/geometry/{case}_image.nii.gz")), target)
    labels = reorient(read_labels(golden_path(f"pipeline/geometry/{case}_label.nii.gz")), target)
    assert orientation_of(image.affine) == target.upper()
    np.testing.assert_array_equal(image.array, expected[f"{target}/image"])
    np.testing.assert_array_equal(labels.array, expected[f"{target}/label"])
    np.testing.assert_allclose(image.affine, expected[f"{target}/affine"], rtol=0, atol=1e-12)

    key = f"{target}_spacing"
    pixdim = expected[f"{key}/pixdim"]
    resampled, moved = resample(image, pixdim), resample(labels, pixdim, order="nearest")
    assert resampled.array.dtype == np.float32 and moved.array.dtype == np.uint8
    np.testing.assert_allclose(resampled.affine, expected[f"{key}/affine"], rtol=0, atol=1e-12)
    bound = 2e-6 * np.ptp(expected["image"])
    np.testing.assert_allclose(resampled.array, expected[f"{key}/image"], rtol=0, atol=bound)
    compared = ~expected.get(f"{key}/label_tie", np.zeros(moved.shape, bool))
    np.testing.assert_array_equal(moved.array[compared], expected[f"{key}/label"][compared])


@pytest.mark.parametrize(("case", "target"), [("real_oblique", "lps"), ("psr_int16_scl", "ras")])
def test_brings_logits_back_to_the_file_as_monai(case, target):
    expected = load_golden(f"pipeline/geometry/{case}.npz")
    file = read_volume(golden_path(f"pipeline/geometry/{case}_image.nii.gz"))
    grid = resample(reorient(file, target), expected[f"{target}_spacing/pixdim"])
    logits = Volume(np.moveaxis(expected[f"{target}_invert/logits"], 0, -1), grid.affine)
    for order, bound in (("nearest", 0), ("linear", 1e-4)):
        back = resample_to(logits, file.affine, file.shape, order)
        np.testing.assert_array_equal(back.affine, file.affine)
        reference = np.moveaxis(expected[f"{target}_invert/{order}"], 0, -1)
        np.testing.assert_allclose(back.array, reference, rtol=0, atol=bound)
        np.testing.assert_array_equal(back.array.argmax(-1), expected[f"{target}_invert/{order}_argmax"])


@st.composite
def affines(draw, shear: float = 0.0) -> np.ndarray:
    angles = [draw(st.floats(-0.6, 0.6)) for _ in range(3)]
    spacing = [draw(st.floats(0.5, 4.0)) for _ in range(3)]
    matrix = nib.eulerangles.euler2mat(*angles) @ np.diag(spacing)
    matrix[:, 1] += draw(st.floats(-shear, shear)) * matrix[:, 0]
    shift = [draw(st.floats(-200, 200)) for _ in range(3)]
    affine = nib.affines.from_matvec(matrix, shift)
    orientation = draw(st.sampled_from(ORIENTATIONS))
    return reorient(Volume(np.zeros((9, 8, 7)), affine), orientation).affine


def world(affine: np.ndarray, shape) -> np.ndarray:
    """(D0, D1, D2, 3) mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def inside(affine: np.ndarray, shape, grid: Volume) -> np.ndarray:
    """Which voxels of a grid lie within the centres of the outermost voxels of another."""
    position = (world(grid.affine, grid.shape) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    return ((position > -1e-6) & (position < np.array(shape) - 1 + 1e-6)).all(axis=-1)


@settings(max_examples=40)
@given(affine=affines(), orientation=st.sampled_from(ORIENTATIONS))
def test_reorientation_moves_nothing_in_the_world_and_can_be_undone(affine, orientation):
    shape = (5, 6, 7)
    volume = Volume(world(affine, shape)[..., :2], affine)
    turned = reorient(volume, orientation)
    assert orientation_of(turned.affine) == orientation
    np.testing.assert_allclose(turned.array, world(turned.affine, turned.shape)[..., :2], atol=1e-9)
    back = reorient(turned, orientation_of(affine))
    np.testing.assert_array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-9)


@settings(max_examples=40)
@given(affine=affines(shear=0.3), spacing=st.tuples(*[st.floats(0.6, 3.5)] * 3))
def test_a_ramp_in_world_coordinates_stays_a_ramp(affine, spacing):
    shape = (9, 8, 7)
    volume = Volume(world(affine, shape).astype(np.float32), affine)
    result = resample(volume, spacing)
    known = inside(affine, shape, result)
    np.testing.assert_allclose(result.array[known], world(result.affine, result.shape)[known], atol=2e-3)
    if np.abs(np.array(spacing) - volume.spacing).min() > 1e-3:
        np.testing.assert_allclose(result.spacing, spacing, atol=1e-9)


@settings(max_examples=30)
@given(source=affines(shear=0.2), target=affines(shear=0.2))
def test_a_ramp_survives_onto_any_other_grid(source, target):
    shape = (9, 8, 7)
    target[:3, 3] = source[:3, 3] + source[:3, :3] @ [4, 4, 3] - target[:3, :3] @ [2, 2, 2]
    result = resample_to(Volume(world(source, shape).astype(np.float32), source), target, (5, 4, 6))
    known = inside(source, shape, result)
    assume(known.any())
    np.testing.assert_allclose(result.array[known], world(target, (5, 4, 6))[known], atol=2e-3)


@settings(max_examples=25)
@given(
    affine=affines(),
    spacing=st.tuples(*[st.floats(0.6, 3.5)] * 3),
    dtype=st.sampled_from([np.int16, np.uint8, np.float32, np.float64]),
    channels=st.sampled_from([(), (2,)]),
    fortran=st.booleans(),
)
def test_axis_by_axis_equals_all_at_once(affine, spacing, dtype, channels, fortran):
    array = np.random.default_rng(0).integers(0, 200, (9, 8, 7, *channels)).astype(dtype)
    volume = Volume(np.asfortranarray(array) if fortran else array, affine)
    grid, shape = resampled_grid(affine, volume.shape, spacing)
    if grid is affine:
        assert resample(volume, spacing) is volume
        return
    to_old = np.linalg.inv(affine) @ grid
    by_axis = resample_to(volume, grid, shape).array
    at_once = geometry._sample_anywhere(array, to_old, shape, "linear")
    assert by_axis.dtype == at_once.dtype == np.float32
    np.testing.assert_allclose(by_axis, at_once, atol=2e-3)
    nearest = resample_to(volume, grid, shape, "nearest").array
    assert nearest.dtype == dtype
    position = np.clip(
        np.einsum("ij,...j->...i", to_old[:3, :3], world(np.eye(4), shape)) + to_old[:3, 3], 0, [8, 7, 6]
    )
    sure = (np.abs(position % 1 - 0.5) > 1e-4).all(axis=-1)
    expected = array[tuple(np.moveaxis(np.rint(position).astype(int), -1, 0))]
    np.testing.assert_array_equal(nearest[sure], expected[sure])


def test_sheared_grids_do_not_go_axis_by_axis(monkeypatch):
    monkeypatch.setattr(geometry, "sample_by_axis", lambda *_: pytest.fail("axis by axis"))
    affine = np.eye(4)
    affine[0, 1] = 0.2
    resample(Volume(np.zeros((9, 8, 7), np.float32), affine), (1.5, 1.5, 1.5))


def test_oblique_scan_with_a_float32_sform_goes_axis_by_axis(monkeypatch):
    monkeypatch.setattr(ndimage, "affine_transform", lambda *_, **__: pytest.fail("all at once"))
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, -0.3) @ np.diag([0.7, 0.8, 2.5]))
    affine = affine.astype(np.float32).astype(np.float64)
    for order in ("linear", "nearest"):
        resample(Volume(np.zeros((60, 60, 60), np.float32), affine), (1.0, 1.0, 1.0), order)


def test_nothing_to_do_gives_the_volume_itself():
    volume = Volume(np.zeros((9, 8, 7), np.float32), np.diag([1.0004, 0.9996, 2.0, 1.0]))
    assert resample(volume, (1, 1, 2)) is volume
    assert resample(volume, (0, -1, 0)) is volume


def test_labels_come_back_unchanged_after_finer_sampling():
    labels = np.random.default_rng(0).integers(0, 5, (9, 8, 7), dtype=np.uint8)
    file = reorient(Volume(labels, np.diag([2.0, 3.0, 5.0, 1.0])), "PSR")
    fine = resample(reorient(file, "RAS"), (0.9, 0.9, 0.9), "nearest")
    back = resample_to(fine, file.affine, file.shape, "nearest")
    np.testing.assert_array_equal(back.array, file.array)


@pytest.mark.parametrize("orientation", ["RAX", "RRS", "RA", ""])
def test_orientation_that_is_none_is_refused(orientation):
    with pytest.raises(ConfigError, match="orientation"):
        reorient(Volume(np.zeros((2, 2, 2)), np.eye(4)), orientation)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, np.nan), (1, np.inf, 1)])
def test_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(ConfigError, match="spacing"):
        resample(Volume(np.zeros((2, 2, 2)), np.eye(4)), spacing)


def test_order_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="order"):
        resample_to(Volume(np.zeros((2, 2, 2)), np.eye(4)), np.eye(4), (2, 2, 2), "quadratic")


@pytest.mark.parametrize("millimetres", [1e4, 1e12])
def test_a_scan_of_many_metres_is_refused_before_anything_is_allocated(millimetres):
    volume = Volume(np.zeros((12, 16, 8), np.float32), np.diag([millimetres, 1, 3, 1]))
    with pytest.raises(DatasetError, match=r"mm, which are .* voxels of 1 x 1 x 1 mm; expected at most 512 times"):
        resample(volume, (1, 1, 1))
    assert resample(volume, (0, 1, 1)).shape == (12, 16, 22)


def test_a_needle_of_a_kilometre_is_refused_before_days_of_windows():
    volume = Volume(np.zeros((24, 24, 24), np.float32), np.diag([5e4, 1e-4, 1e-4, 1]))
    with pytest.raises(DatasetError, match="expected at most 512 times"):
        resample(volume, (1, 1, 1))


def test_orientation_along_the_axes_as_nibabel():
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((0.5, -2.0), repeat=3):
            affine = np.diag([0.0, 0, 0, 1])
            affine[axes, range(3)] = signs
            expected = orientations.ornt2axcodes(orientations.io_orientation(affine))
            assert orientation_of(affine) == "".join(expected), affine


NNUNET = json.loads(str(load_golden("baselines/recipe_nnunet.npz")["resample/meta_json"]))


@pytest.mark.parametrize("case", NNUNET)
def test_cubic_splines_as_nnunet(case):
    """On a grid of nnU-Net's, whose voxels' edges are aligned; ours goes on with the edge beyond the last centres."""
    golden, meta = load_golden("baselines/recipe_nnunet.npz"), NNUNET[case]
    array = np.moveaxis(golden[f"resample/{case}/x"], 0, -1)
    expected = np.moveaxis(golden[f"resample/{case}/order3"], 0, -1)
    steps = np.array(array.shape[:3]) / expected.shape[:3]
    start = steps / 2 - 0.5
    separate, axis = meta["separate"]
    if separate:
        start[axis] += 1e-6  # nnU-Net takes the upper of two voxels as near, label maps here the even one
    source, target = (np.diag([*mm, 1.0]) for mm in (meta["current"], steps * meta["current"]))
    target[:3, 3] = start * meta["current"]
    result = resample_to(Volume(array, source), target, expected.shape[:3], "cubic").array
    positions = [s + step * np.arange(n) for s, step, n in zip(start, steps, expected.shape, strict=False)]
    known = [(p > -1e-9) & (p < n - 1 + 1e-9) for p, n in zip(positions, array.shape, strict=False)]
    if separate:
        known[axis][:] = True
    assert all(k.any() for k in known)
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(result[np.ix_(*known)], expected[np.ix_(*known)], rtol=0, atol=bound)
    assert result.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("orientation", ["RAS", "PSR"])
def test_cubic_splines_as_scipy_at_once(dtype, fortran, orientation):
    array = np.random.default_rng(0).normal(0, 100, (70, 9, 45, 2)).astype(dtype)
    affine = reorient(Volume(array, np.diag([1.0, 2.0, 1.5, 1.0])), orientation).affine
    volume = Volume(np.asfortranarray(array) if fortran else array, affine)
    grid, shape = resampled_grid(affine, volume.shape, (0.8, 1.3, 1.1))
    to_old = np.linalg.inv(affine) @ grid
    # Beyond the outermost centres the edge goes on.
    positions = np.clip(
        np.einsum("ij,...j->...i", to_old[:3, :3], world(np.eye(4), shape)) + to_old[:3, 3], 0, [69, 8, 44]
    )
    result = resample_to(volume, grid, shape, "cubic").array
    for channel in range(2):
        at_once = ndimage.map_coordinates(
            array[..., channel].astype(float), np.moveaxis(positions, -1, 0), mode="nearest"
        )
        at_once = np.clip(at_once, array[..., channel].min(), array[..., channel].max())
        np.testing.assert_allclose(result[..., channel], at_once, rtol=0, atol=2e-3)


def test_cubic_splines_take_the_nearest_slice_along_a_far_coarser_axis():
    array = np.random.default_rng(0).normal(size=(12, 10, 6)).astype(np.float32)
    volume = Volume(array, np.diag([1.0, 1.0, 3.5, 1.0]))
    result = resample(volume, (0.7, 0.8, 1.5), "cubic")
    nearest = resample(Volume(np.broadcast_to(np.arange(6.0), array.shape), volume.affine), (0.7, 0.8, 1.5), "nearest")
    slices = nearest.array[0, 0].astype(int)
    for index, source in enumerate(slices):
        plane = resample(Volume(array[..., source, None], np.diag([1.0, 1, 1, 1])), (0.7, 0.8, 0), "cubic").array[
            ..., 0
        ]
        np.testing.assert_allclose(result.array[..., index], plane, atol=1e-6)
        assert result.array[..., index].min() >= array[..., source].min()
        assert result.array[..., index].max() <= array[..., source].max()
    assert (np.diff(slices) == 0).any()
    # At three times, or with two coarse axes, splines go along all.
    for spacing in ((1.0, 1.0, 3.0), (4.0, 1.0, 4.0)):
        other = resample(replace(volume, affine=np.diag([*spacing, 1.0])), (0, 0, 2.0), "cubic").array
        assert not np.isin(other, array).all()


@pytest.mark.parametrize("spacing", [(1.2, 0.7, 0.9), (1.2, 0.7, 9.0)])
@pytest.mark.parametrize("shear", [0.0, 0.2])
def test_boxes_of_cubic_splines_are_parts_of_the_whole(spacing, shear):
    array = np.random.default_rng(0).normal(size=(60, 40, 13, 1)).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[0, 1] = shear
    volume = Volume(array, affine)
    grid, shape = resampled_grid(affine, volume.shape, (0.9, 0.9, 1.4))
    whole = resample_to(volume, grid, shape, "cubic")
    limits = cubic_limits(volume, grid)
    for rows in (slice(0, 7), slice(31, 52)):
        box = (rows, slice(3, shape[1]), slice(2, 9))
        for known in (limits, None):
            part = resample_to(volume, grid, shape, "cubic", box=box, limits=known)
            np.testing.assert_allclose(part.array, whole.array[box], rtol=0, atol=2e-6)
    doubled = resample_to(volume, grid, shape, "cubic", before=lambda values: 2 * values)
    np.testing.assert_allclose(doubled.array, 2 * whole.array, atol=4e-6)


def test_cubic_splines_leave_an_input_as_it_is():
    array = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    array.flags.writeable = False
    volume = Volume(array, np.eye(4))
    np.testing.assert_array_equal(resample_to(volume, np.eye(4), array.shape, "cubic").array, array)
    flipped = reorient(volume, "LPS")
    np.testing.assert_array_equal(resample_to(volume, flipped.affine, array.shape, "cubic").array, flipped.array)
