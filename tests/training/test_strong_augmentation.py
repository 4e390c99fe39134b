"""Affine map, mirroring and changes of contrast, each against numpy or scipy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mambahome_jax.training.augmentation import (
    affine_matrix,
    augment,
    augment_labelled,
    change_brightness,
    change_contrast,
    change_gamma,
    elastic_displacement,
    lower_resolution,
    mirror,
    warp,
)
from tests.conftest import load_golden
from tests.training.test_augmentation import OFF

SHAPE = (10, 9, 8)


def _sample(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*SHAPE, 2)).astype(np.float32), rng.integers(0, 5, SHAPE).astype(np.int32)


def _matrix(degrees, scale=1.0, voxel_size=(1.0, 1.0, 1.0)):
    return affine_matrix(jnp.deg2rad(jnp.asarray(degrees, jnp.float32)), jnp.float32(scale), voxel_size)


def assert_sampled_at(places, sample, resampled):
    """places: (3, *SHAPE), where the content of each voxel comes from."""
    (image, label), (new_image, new_label) = sample, resampled
    for channel in range(2):
        expected = ndimage.map_coordinates(image[..., channel].astype(np.float64), places, order=1, mode="nearest")
        np.testing.assert_allclose(new_image[..., channel], expected, atol=1e-4)
    classes = (label == np.arange(5)[:, None, None, None]).astype(np.float64)
    shares = [ndimage.map_coordinates(one, places, order=1, mode="nearest") for one in classes]
    assert (np.asarray(new_label) == np.argmax(shares, axis=0)).mean() > 0.999


def test_the_identity_changes_no_bit():
    image, label = _sample()
    new_image, new_label = jax.jit(warp)(image, label, _matrix((0, 0, 0)))
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_label, label)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_a_quarter_turn_is_that_of_numpy_for_image_and_label(axis, plane):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(6, 6, 6, 1)).astype(np.float32)
    label = rng.integers(0, 5, (6, 6, 6)).astype(np.int32)
    degrees = np.zeros(3)
    degrees[axis] = 90
    new_image, new_label = warp(image, label, _matrix(degrees))
    np.testing.assert_allclose(new_image, np.rot90(image, 1, plane), atol=1e-5)
    np.testing.assert_array_equal(new_label, np.rot90(label, 1, plane))


def test_any_map_is_linear_interpolation_with_the_border_repeated():
    image, label = _sample()
    matrix = _matrix((12, -7, 15), scale=0.9)
    new_image, new_label = warp(image, label, matrix)
    centre = (np.array(SHAPE) - 1) / 2
    grid = np.indices(SHAPE).reshape(3, -1)
    places = (np.asarray(matrix, np.float64) @ (grid - centre[:, None]) + centre[:, None]).reshape(3, *SHAPE)
    assert_sampled_at(places, (image, label), (new_image, new_label))


def test_a_displacement_is_where_the_content_comes_from():
    image, label = _sample()
    rng = np.random.default_rng(2)
    moved = rng.normal(0, 1.5, (3, *SHAPE)).astype(np.float32)
    new_image, new_label = warp(image, label, _matrix((0, 0, 0)), list(moved))
    places = np.indices(SHAPE) + moved
    assert_sampled_at(places, (image, label), (new_image, new_label))


def test_an_elastic_displacement_is_smooth_as_large_as_asked_and_the_same_in_space_along_every_axis():
    shape, size = (64, 48, 32), (1.0, 1.0, 2.0)
    fields = [elastic_displacement(jax.random.key(n), jnp.float32(2.0), shape, size) for n in range(20)]
    in_space = np.array([[field * s for field, s in zip(found, size, strict=True)] for found in fields])
    assert in_space.shape == (20, 3, *shape)
    # Between control points the cubic averages some of it away.
    np.testing.assert_allclose(in_space.std(axis=(0, 2, 3, 4)), 1.55, rtol=0.15)
    for axis, spacing in enumerate(size):
        steps = np.abs(np.diff(in_space, axis=axis + 2)) / spacing
        assert 0.01 < steps.mean() < 0.2 and np.quantile(steps, 0.999) < 0.7
    still = elastic_displacement(jax.random.key(0), jnp.float32(0.0), shape, size)
    assert not np.any(still)


def test_elastic_deformation_moves_image_and_label_alike_in_part_of_the_samples():
    config = dataclasses.replace(OFF, elastic_probability=0.5, elastic_std=2.0)
    label = np.zeros((16, 32, 32, 32), np.int32)
    label[:, 8:24, 8:24, 8:24] = 1
    image = label[..., None].astype(np.float32)
    new_image, new_label = jax.jit(lambda k, x, y: augment(k, x, y, config))(jax.random.key(3), image, label)
    changed = np.any(np.asarray(new_image) != image, axis=(1, 2, 3, 4))
    assert 3 <= changed.sum() <= 13
    np.testing.assert_array_equal(np.asarray(new_label)[~changed], label[~changed])
    assert np.any(np.asarray(new_label) != label)
    agree = (np.asarray(new_image)[..., 0] > 0.5) == (np.asarray(new_label) == 1)
    assert agree.mean() > 0.9999


def test_scale_above_one_enlarges_and_voxel_size_makes_it_a_rotation_in_space():
    ball = (np.linalg.norm(np.indices((16, 16, 16)) - 7.5, axis=0) < 4).astype(np.int32)
    image = ball[..., None].astype(np.float32)
    _, larger = warp(image, ball, _matrix((0, 0, 0), scale=1.25))
    np.testing.assert_allclose(np.sum(larger) / ball.sum(), 1.25**3, rtol=0.1)
    size = np.array([1.0, 1.0, 3.0])
    in_space = np.diag(size) @ np.asarray(_matrix((10, 20, -15), voxel_size=tuple(size))) @ np.diag(1 / size)
    np.testing.assert_allclose(in_space @ in_space.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(in_space), 1, rtol=1e-5)


def test_mirroring_flips_both_and_swaps_the_labels_of_pairs():
    image, label = _sample()
    image[..., 0] = label
    new_image, new_label = mirror(jax.random.key(0), image, label, ((1, ((1, 3),)),), probability=1.0)
    np.testing.assert_array_equal(new_image, image[:, ::-1])
    table = np.array([0, 3, 2, 1, 4])
    np.testing.assert_array_equal(new_label, table[label][:, ::-1])
    same_image, same_label = mirror(jax.random.key(0), image, label, ((1, ((1, 3),)),), probability=0.0)
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_label, label)


def test_what_a_dataset_labelled_trades_places_with_the_labels():
    """Of a dataset that labels the left kidney alone a mirrored sample has the right one labelled."""
    config = dataclasses.replace(OFF, mirror=((0, ((1, 2),)), (1, ())))
    key = jax.random.key(5)
    label = np.zeros((16, *SHAPE), np.int32)
    label[:, :3, :3, :3] = 1
    _, found = augment(key, np.zeros((16, *SHAPE, 1), np.float32), label, config)
    labelled = np.tile([True, True, False, True], (16, 1))
    after = np.asarray(augment_labelled(key, labelled, config))
    swapped = np.asarray(found == 2).any((1, 2, 3))
    assert 0 < swapped.sum() < 16
    np.testing.assert_array_equal(after, np.where(swapped[:, None], [True, False, True, True], labelled))


def test_brightness_contrast_and_gamma_are_their_formulas():
    image, _ = _sample()
    low, high = image.min(axis=(0, 1, 2)), image.max(axis=(0, 1, 2))
    mean = image.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(change_brightness(image, jnp.float32(0.8)), image * 0.8, rtol=1e-6)
    expected = np.clip(mean + (image - mean) * 1.2, low, high)
    np.testing.assert_allclose(change_contrast(image, jnp.float32(1.2)), expected, atol=1e-5)
    expected = ((image - low) / (high - low)) ** 1.5 * (high - low) + low
    np.testing.assert_allclose(change_gamma(image, jnp.float32(1.5)), expected, atol=1e-5)


def _batch(samples=24):
    images, labels = zip(*(_sample(n) for n in range(samples)), strict=True)
    image = np.stack(images)
    image[..., 0] = np.stack(labels)
    return image, np.stack(labels)


def _nnunet(name):
    golden = load_golden("baselines/recipe_nnunet.npz")
    return (jnp.asarray(np.moveaxis(golden[f"aug/{key}"], 0, -1)) for key in ("image", name))


@pytest.mark.parametrize("inverted", [0, 1])
def test_gamma_that_keeps_mean_and_deviation_is_that_of_nnunet(inverted):
    image, expected = _nnunet(f"gamma_1.4_0.75_invert{inverted}")
    sign = -1 if inverted else 1
    for channel, gamma in enumerate((1.4, 0.75)):
        one = image[..., channel : channel + 1]
        changed = sign * change_gamma(sign * one, jnp.float32(gamma), keep_moments=True)
        np.testing.assert_allclose(changed[..., 0], expected[..., channel], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "factors", "whole"), [("0.5_0.77", (0.5, 0.77), None), ("dummy2d_0.6", (1.0, 0.6), 0)]
)
def test_low_resolution_is_that_of_nnunet(name, factors, whole):
    image, expected = _nnunet(f"lowres_{name}")
    for channel, factor in enumerate(factors):
        changed = lower_resolution(image[..., channel : channel + 1], jnp.float32(factor), whole)
        np.testing.assert_allclose(changed[..., 0], expected[..., channel], atol=1e-5)
    np.testing.assert_array_equal(lower_resolution(image, jnp.float32(1)), image)


def test_a_batch_without_luck_stays_as_it_is():
    image, label = _batch(4)
    config = dataclasses.replace(
        OFF, affine_probability=0.0, gamma_probability=0.0, contrast_probability=0.0, brightness_probability=0.0
    )
    new_image, new_label = jax.jit(lambda k, x, y: augment(k, x, y, config))(jax.random.key(0), image, label)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_label, label)


def test_samples_are_changed_each_on_its_own_and_with_the_given_probability():
    image, label = _batch()
    config = dataclasses.replace(OFF, mirror=((0, ()),), affine_probability=0.5)
    new_image, new_label = jax.jit(lambda k, x, y: augment(k, x, y, config))(jax.random.key(2), image, label)
    mapped = [not np.isin(new, (old, old[::-1])).all() for new, old in zip(new_image, image, strict=True)]
    assert 6 <= sum(mapped) <= 18
    whole = [n for n, changed in enumerate(mapped) if not changed]
    flipped = [np.array_equal(new_label[n], label[n][::-1]) for n in whole]
    assert 0 < sum(flipped) < len(whole)
    # Where nothing was interpolated, the channel that holds the label moved with it.
    for n in whole:
        np.testing.assert_array_equal(np.asarray(new_image)[n, ..., 0], new_label[n])


def test_rotation_and_scale_come_each_by_itself():
    """Lines along an axis: turned ones change along it, and scaled ones only across."""
    image = jnp.broadcast_to(jnp.sin(jnp.arange(8.0))[:, None, None, None], (200, 8, 8, 4, 1))
    label = jnp.zeros(image.shape[:-1], jnp.int32)
    config = dataclasses.replace(
        OFF, affine_probability=0.5, affine_rotation=30.0, affine_scale=(0.7, 0.9), scale_apart=True
    )
    changed, _ = augment(jax.random.key(0), image, label, config)
    turned = np.ptp(np.asarray(changed)[..., 0], axis=2).max((1, 2)) > 1e-3
    moved = np.abs(changed - image).max((1, 2, 3, 4)) > 1e-3
    assert abs(turned.mean() - 0.5) < 0.12
    assert abs((moved & ~turned).mean() - 0.25) < 0.1


def test_the_published_operations_draw_what_they_drew_before():
    image, label = _batch(4)
    plain = dataclasses.replace(OFF, noise_probability=1.0, shift_probability=1.0)
    more = dataclasses.replace(plain, affine_probability=0.0, gamma_probability=0.0)
    outcomes = [augment(jax.random.key(3), image, label, config)[0] for config in (plain, more)]
    np.testing.assert_array_equal(*outcomes)


def test_thick_slices_move_within_their_plane_alone_and_turn_to_any_angle_there():
    size = (1.5, 1.5, 10.0)
    config = dataclasses.replace(OFF, affine_probability=1.0, affine_rotation=30.0, elastic_probability=1.0)
    config = dataclasses.replace(config, plane_rotation=180.0, voxel_size=size)
    label = np.broadcast_to(np.arange(1, 7), (32, 24, 24, 6)).astype(np.int32).copy()
    image = label[..., None].astype(np.float32)
    turn = jax.jit(augment, static_argnums=3)
    new_image, new_label = turn(jax.random.key(1), image, label, config)
    np.testing.assert_allclose(new_image, image, atol=1e-5)
    np.testing.assert_array_equal(new_label, label)
    # A bar from the centre, whose direction says by how much the slices were turned.
    bar = np.zeros((32, 24, 24, 6), np.int32)
    bar[:, 12:, 11:13] = 1
    _, turned = turn(jax.random.key(1), bar[..., None].astype(np.float32), bar, config)
    weight = np.asarray(turned).sum(axis=3)
    first, second = np.indices((24, 24)) - 11.5
    angles = np.arctan2((weight * second).sum(axis=(1, 2)), (weight * first).sum(axis=(1, 2)))
    assert np.histogram(angles, 4, (-np.pi, np.pi))[0].min() >= 3
    # Not thick: as any other scan, with the same draws.
    like = dataclasses.replace(config, voxel_size=(1.5, 1.5, 3.3))
    other = dataclasses.replace(like, plane_rotation=0.0)
    np.testing.assert_array_equal(
        turn(jax.random.key(1), image, label, like)[0], turn(jax.random.key(1), image, label, other)[0]
    )
