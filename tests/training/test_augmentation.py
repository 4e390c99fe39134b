"""Each augmentation on its own against numpy and scipy, and their probabilities together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mambahome_jax.recipes import AugmentationConfig
from mambahome_jax.training.augmentation import augment, smoothing_matrix, zoom_coordinates, zoom_matrix

OFF = AugmentationConfig(
    zoom_probability=0.0,
    rotate90_probability=0.0,
    shift_probability=0.0,
    smooth_probability=0.0,
    noise_probability=0.0,
)

PUBLISHED = ("zoom", "rotate90", "shift", "smooth", "noise")


def _batch(shape=(12, 12, 10), batch=16, channels=2):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, *shape, channels)).astype(np.float32)
    return image, rng.integers(0, 4, (batch, *shape)).astype(np.int32)


@jax.jit
def _compiled(key, image, label, settings):
    return augment(key, image, label, AugmentationConfig(**settings))


def _augment(image, label, seed=0, **changes):
    # The settings are arguments, so that one compilation serves all tests of a shape.
    settings = dataclasses.asdict(dataclasses.replace(OFF, **changes))
    settings = {name: value for name, value in settings.items() if name.startswith(PUBLISHED)}
    image, label = _compiled(jax.random.key(seed), image, label, settings)
    return np.asarray(image), np.asarray(label)


def test_nothing_changes_a_bit_when_no_probability_strikes():
    image, label = _batch()
    new_image, new_label = _augment(image, label)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_label, label)
    assert new_label.dtype == label.dtype and new_image.dtype == image.dtype


def test_zoom_is_linear_interpolation_about_the_centre():
    image, label = _batch()
    new_image, new_label = _augment(image, label, zoom_probability=1.0, zoom_range=(1.4, 1.4))
    coordinates = [np.asarray(zoom_coordinates(jnp.float32(1.4), n), np.float64) for n in label.shape[1:]]
    np.testing.assert_allclose(np.mean(coordinates[0]), 5.5, rtol=1e-6)
    np.testing.assert_allclose(np.diff(coordinates[2]), 1 / 1.4, rtol=1e-5)
    grid = np.meshgrid(*coordinates, indexing="ij")
    expected = ndimage.map_coordinates(image[3, ..., 0].astype(np.float64), grid, order=1, mode="nearest")
    np.testing.assert_allclose(new_image[3, ..., 0], expected, atol=1e-5)
    nearest = [np.floor(c + 0.5).astype(int) for c in coordinates]
    np.testing.assert_array_equal(new_label[3], label[3][np.ix_(*nearest)])


def test_image_and_label_turn_together_and_are_never_mirrored():
    image, label = _batch()
    image[..., 0] = label
    new_image, new_label = _augment(image, label, rotate90_probability=1.0)
    np.testing.assert_array_equal(new_image[..., 0], new_label)
    seen = set()
    for before, after in zip(label, new_label, strict=True):
        turns = [k for k in range(4) if np.array_equal(np.rot90(before, k), after)]
        assert turns and turns[0] > 0
        seen.update(turns)
    assert seen == {1, 2, 3}


def test_only_half_turns_where_the_first_two_axes_differ():
    image, label = _batch(shape=(12, 8, 10))
    _, new_label = _augment(image, label, rotate90_probability=1.0)
    np.testing.assert_array_equal(new_label, np.rot90(label, 2, axes=(1, 2)))


def test_shift_adds_one_number_a_sample():
    image, label = _batch()
    shift = _augment(image, label, shift_probability=1.0)[0] - image
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1, :1, :1], shift.shape), atol=1e-6)
    values = shift[:, 0, 0, 0, 0]
    assert np.abs(values).max() <= 0.1 + 1e-6 and len(set(values.tolist())) == len(values)


def test_smoothing_is_a_gaussian_that_keeps_constants():
    image, label = _batch(shape=(24, 24, 24), batch=2)
    new_image, new_label = _augment(image, label, smooth_probability=1.0, smooth_sigma_range=(1.0, 1.0))
    weights = np.asarray(smoothing_matrix(jnp.float32(1.0), 24))[12]
    np.testing.assert_allclose(np.sqrt(weights @ (np.arange(24) - 12.0) ** 2), np.sqrt(1 + 1 / 12), rtol=1e-4)
    expected = image[0, ..., 0].astype(np.float64)
    for axis in range(3):
        expected = ndimage.correlate1d(expected, weights[1:24].astype(np.float64), axis=axis, mode="constant")
    inner = (slice(9, 15),) * 3
    np.testing.assert_allclose(new_image[0][..., 0][inner], expected[inner], atol=1e-5)
    np.testing.assert_array_equal(new_label, label)
    flat, _ = _augment(np.ones_like(image), label, smooth_probability=1.0)
    np.testing.assert_allclose(flat, 1, atol=1e-6)


def test_noise_has_a_deviation_of_its_own_in_each_sample():
    image, label = _batch()
    noise = _augment(image, label, noise_probability=1.0)[0] - image
    deviation = noise.std(axis=(1, 2, 3, 4))
    assert deviation.max() <= 0.0105 and deviation.min() < 0.004 and abs(noise.mean()) < 1e-4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zoom", 0.3), ("rotate90", 0.1), ("shift", 0.2), ("smooth", 0.2), ("noise", 0.2)],
)
def test_published_probabilities(name, expected):
    assert getattr(AugmentationConfig(), f"{name}_probability") == expected
    image, label = _batch(shape=(4, 4, 4), batch=2000, channels=1)
    new_image, _ = _augment(image, label, **{f"{name}_probability": expected})
    changed = (new_image != image).any(axis=(1, 2, 3, 4)).mean()
    assert abs(changed - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_a_sample_is_augmented_alike_in_any_batch():
    image, label = _batch()
    both = _augment(image, label, noise_probability=1.0, zoom_probability=0.5)
    alone = _augment(image[:2], label[:2], noise_probability=1.0, zoom_probability=0.5)
    np.testing.assert_allclose(both[0][:2], alone[0], atol=1e-6)
    np.testing.assert_array_equal(both[1][:2], alone[1])


def test_matrices_of_the_neutral_values_are_the_identity():
    np.testing.assert_array_equal(zoom_matrix(jnp.float32(1.0), 9), np.eye(9))
    np.testing.assert_array_equal(smoothing_matrix(jnp.float32(0.0), 9), np.eye(9))
