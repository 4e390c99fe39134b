"""Slightly moved copies of windows: which maps, the mean against SciPy's, and what a scan gets of it."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, special

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.affine_copies import moved, small_affines
from mambahome_jax.inference.segment import segment
from tests.inference.models import Levels


def test_maps_are_small_rotations_in_space_and_the_first_changes_nothing():
    size = np.array([0.5, 1.0, 3.0])
    matrices, shifts = small_affines(6, size)
    np.testing.assert_array_equal(matrices[0], np.eye(3))
    np.testing.assert_array_equal(shifts[0], np.zeros(3))
    for matrix, shift in zip(matrices[1:], shifts[1:], strict=True):
        in_mm = matrix * size[:, None] / size
        scale = np.cbrt(np.linalg.det(in_mm))
        np.testing.assert_allclose(in_mm @ in_mm.T, scale**2 * np.eye(3), rtol=0, atol=1e-6)
        assert 0.92 <= scale <= 1.08 and scale != 1
        # About three axes, 10 degrees each at most.
        assert 0.5 < np.rad2deg(np.arccos((np.trace(in_mm / scale) - 1) / 2)) < 18
        assert (abs(shift * size) <= 0.5).all() and shift.any()
    fewer = small_affines(3, size)
    np.testing.assert_array_equal(matrices[:3], fewer[0])
    np.testing.assert_array_equal(shifts[:3], fewer[1])


def test_one_copy_is_the_window_alone():
    def predict(windows):
        return windows

    assert moved(predict, 1, (1, 1, 1)) is predict


def test_the_mean_is_that_of_scipy():
    rng = np.random.default_rng(1)
    shape, size = (9, 8, 7), (1.0, 1.0, 2.0)
    windows = rng.normal(size=(2, *shape, 2)).astype(np.float32)
    weights = rng.normal(size=(1, *shape, 1, 3)).astype(np.float32)

    def predict(x):
        return (x[..., None] * weights).sum(axis=-2)

    def warp(volumes, matrix, shift):
        centre = (np.array(shape) - 1) / 2
        offset = centre + shift - matrix @ centre
        moved = np.empty_like(volumes)
        for n, c in np.ndindex(volumes.shape[0], volumes.shape[-1]):
            moved[n, ..., c] = ndimage.affine_transform(volumes[n, ..., c], matrix, offset, order=1, mode="nearest")
        return moved

    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    centre, last = (np.array(shape) - 1) / 2, np.array(shape) - 1
    expected, copies = np.zeros((2, *shape, 3)), np.zeros((*shape, 1))
    for matrix, shift in zip(*small_affines(4, size), strict=True):
        there = warp(windows.astype(np.float64), matrix.astype(np.float64), shift)
        inverse = np.linalg.inv(matrix.astype(np.float64))
        back = (voxels - centre - shift) @ inverse.T + centre
        seen = ((back > -1e-9) & (back < last + 1e-9)).all(axis=-1, keepdims=True)
        expected += seen * warp(special.softmax(predict(there), axis=-1), inverse, -(inverse @ shift))
        copies += seen
    assert copies.min() == 1 and copies.max() == 4
    expected /= copies
    found = np.exp(moved(predict, 4, size)(jnp.asarray(windows)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    # What is moved there and not back would be another thing.
    assert abs(found - special.softmax(predict(windows), axis=-1)).max() > 0.1


def test_borders_are_where_they_are():
    """A perfect network keeps what lies at a window's border, which some copies do not see."""
    shape = (96, 96, 24)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    depth = np.minimum(place, np.array(shape) - 1 - place).min(axis=-1)
    for band in ((depth >= 3) & (depth < 6), depth < 4):
        image = jnp.asarray(band[None, ..., None], jnp.float32)
        found = moved(lambda x: jnp.concatenate([(0.5 - x) * 12, (x - 0.5) * 12], axis=-1), 2, (1.0, 1.0, 1.0))(image)
        labels = np.asarray(found[0]).argmax(axis=-1) == 1
        assert 2 * (labels & band).sum() / (labels.sum() + band.sum()) > 0.99


def test_certain_voxels_stay_finite_and_broken_ones_broken():
    logits = jnp.asarray([0.0, 1e4, -1e4]) * jnp.ones((1, 4, 4, 4, 3))
    assert np.isfinite(moved(lambda x: logits, 2, (1, 1, 1))(logits)).all()
    broken = logits.at[0, 1, 1, 1, 0].set(jnp.nan)
    assert np.isnan(moved(lambda x: broken, 2, (1, 1, 1))(logits)).any()
    # Infinite, which softmax alone would make 0 of.
    broken = logits.at[0, 1, 1, 1, 0].set(-jnp.inf)
    assert np.isnan(moved(lambda x: broken, 2, (1, 1, 1))(logits)).any()


def test_segment_takes_copies_and_refuses_none():
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in (32, 16, 16)], indexing="ij"))
    ball = (np.linalg.norm(grid, axis=0) < 6).astype(np.float32)
    image = ndimage.gaussian_filter(ball, 1)
    image[3, 4, 5] = 1  # a voxel by itself, which no moved copy sees whole
    volume = Volume(image, np.eye(4))
    properties = DataProperties(spacing=None, modality="us", labels=((1, "ball"),))
    options = {"roi_size": (16, 16, 16), "spacing": (0, 0, 0), "chain": "trained"}
    model = Levels((0.0, 1.0), metadata=properties)
    plain, averaged = (segment(model, volume, tta_affine=n, **options).array for n in (1, 5))
    assert plain[3, 4, 5] == 1 and averaged[3, 4, 5] == 0
    overlap = (plain & averaged).sum() * 2 / (plain.sum() + averaged.sum())
    assert 0.98 < overlap < 1
    for wrong in (0, 1.5, "4"):
        with pytest.raises(ConfigError, match=rf"tta_affine is {wrong!r}; expected an integer, 1 or more"):
            segment(model, volume, tta_affine=wrong, **options)
    with pytest.raises(ConfigError, match="predict gave shape"):
        segment(lambda windows: windows[..., 0], volume, tta_affine=2, modality="us", **options)
