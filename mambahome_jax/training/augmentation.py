"""Augmentation of a batch on the device, as the published data_loader.py lists it, and what recipes add to that.

Every operation that is linear along one axis (zoom, smoothing) is a small matrix a sample and axis, the identity where
the sample is left alone, so that one compiled function without branches serves all.
"""

import jax
import jax.numpy as jnp

from mambahome_jax.recipes import AugmentationConfig
from mambahome_jax.training.strong_augmentation import (
    affine_matrix,
    change_brightness,
    change_contrast,
    change_gamma,
    elastic_displacement,
    mirror,
    mirror_labelled,
    resample,
)

SPATIAL = 3
# So that the identity, where a sample is left alone, changes no bit of it.
FULL = jax.lax.Precision.HIGHEST
# What is drawn beside the published operations leaves their keys as they are.
_MORE_KEYS = 100
_ELASTIC_KEY = 200


def augment(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    """Zoom, quarter turns in the plane of the first two axes, intensity shift, smoothing and noise, each by its own
    probability and each sample on its own; before them mirroring, an affine map and an elastic deformation, behind them
    brightness, contrast and gamma, where the configuration has them.

    Args:
        key: from jax.random.key; sample n draws from fold_in(key, n), whatever the size of the batch.
        image: (batch, D, H, W, C), floating, scaled to about unit range.
        label: (batch, D, H, W), integer.

    Returns:
        image and label of the same shapes and dtypes. Zoom keeps the size and the centre (image linear, label nearest).
        Where D and H differ only the half turn is possible. Without `config.mirror` nothing is mirrored: left and right
        are different organs.
    """
    keys = _sample_keys(key, image.shape[0])
    return jax.vmap(lambda k, x, y: _augment_sample(k, x, y, config))(keys, image, label)


def augment_labelled(key: jax.Array, labelled: jax.Array, config: AugmentationConfig) -> jax.Array:
    """Which classes each sample has labels of, (batch, classes) bool, after `augment` with the same key: where it was
    mirrored, those of a pair trade places."""
    keys = _sample_keys(key, labelled.shape[0])
    return jax.vmap(lambda k, row: mirror_labelled(jax.random.fold_in(k, _MORE_KEYS), row, config.mirror))(
        keys, labelled
    )


def _sample_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(batch))


def _augment_sample(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    image, label = _spatial(key, image, label, config)
    zoom_key, turn_key, shift_key, smooth_key, noise_key = jax.random.split(key, 5)
    zoom = _draw(zoom_key, config.zoom_probability, config.zoom_range, neutral=1.0)
    turns = _draw_turns(turn_key, config.rotate90_probability, square=label.shape[0] == label.shape[1])
    shift = _draw(shift_key, config.shift_probability, (-config.shift_range, config.shift_range), neutral=0.0)
    sigma = _draw(smooth_key, config.smooth_probability, config.smooth_sigma_range, neutral=0.0, shape=(SPATIAL,))
    std_key, normal_key = jax.random.split(noise_key)
    noise_std = _draw(std_key, config.noise_probability, (0.0, config.noise_std), neutral=0.0)

    # Smoothing comes after turn and shift in the published order. With one distribution of sigma for all axes, and
    # kernels of sum 1, it commutes with both, and so shares its matrices with the zoom.
    dtype = image.dtype
    for axis, size in enumerate(label.shape):
        matrix = jnp.matmul(smoothing_matrix(sigma[axis], size), zoom_matrix(zoom, size), precision=FULL)
        image = _along_axis(matrix.astype(dtype), image, axis)
        nearest = jnp.floor(zoom_coordinates(zoom, size) + 0.5).astype(jnp.int32)
        label = jnp.take(label, nearest, axis=axis, mode="clip")
    image, label = _turn(image, turns), _turn(label, turns)
    noise = jax.random.normal(normal_key, image.shape, dtype)
    return _intensity(key, image + shift.astype(dtype) + noise_std.astype(dtype) * noise, config), label


def _spatial(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    mirror_key, happens_key, angle_key, scale_key = (jax.random.fold_in(key, _MORE_KEYS + n) for n in range(4))
    if config.mirror:
        image, label = mirror(mirror_key, image, label, config.mirror)
    if not config.affine_probability and not config.elastic_probability:
        return image, label
    happens = jax.random.bernoulli(happens_key, config.affine_probability)
    limit = jnp.deg2rad(config.affine_rotation)
    angles = jnp.where(happens, jax.random.uniform(angle_key, (3,), jnp.float32, -limit, limit), 0)
    scale = jnp.where(happens, jax.random.uniform(scale_key, (), jnp.float32, *config.affine_scale), 1)
    matrix = affine_matrix(angles, scale, config.voxel_size)
    if not config.elastic_probability:
        return resample(image, label, matrix)
    std_key, field_key = jax.random.split(jax.random.fold_in(key, _ELASTIC_KEY))
    std = _draw(std_key, config.elastic_probability, (0.0, config.elastic_std), neutral=0.0)
    return resample(image, label, matrix, elastic_displacement(field_key, std, label.shape, config.voxel_size))


def _intensity(key: jax.Array, image: jax.Array, config: AugmentationConfig) -> jax.Array:
    changes = (
        (change_brightness, config.brightness_probability, config.brightness_range),
        (change_contrast, config.contrast_probability, config.contrast_range),
        (change_gamma, config.gamma_probability, config.gamma_range),
    )
    for number, (change, probability, bounds) in enumerate(changes, _MORE_KEYS + 4):
        if not probability:
            continue
        happens_key, value_key = jax.random.split(jax.random.fold_in(key, number))
        value = jax.random.uniform(value_key, (), jnp.float32, *bounds)
        image = jnp.where(jax.random.bernoulli(happens_key, probability), change(image, value), image)
    return image


def _draw(
    key: jax.Array, probability: float, bounds: tuple[float, float], neutral: float, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Uniform within bounds with the given probability, else the value that changes nothing; float32."""
    happens_key, value_key = jax.random.split(key)
    value = jax.random.uniform(value_key, shape, jnp.float32, *bounds)
    return jnp.where(jax.random.bernoulli(happens_key, probability), value, neutral)


def _draw_turns(key: jax.Array, probability: float, square: bool) -> jax.Array:
    happens_key, value_key = jax.random.split(key)
    turns = jax.random.randint(value_key, (), 1, 4) if square else 2
    return jnp.where(jax.random.bernoulli(happens_key, probability), turns, 0)


def zoom_coordinates(zoom: jax.Array, size: int) -> jax.Array:
    """Where each voxel of the zoomed axis lies on the axis before, in voxels and within it; (size,) float32."""
    centre = (size - 1) / 2
    return jnp.clip((jnp.arange(size, dtype=jnp.float32) - centre) / zoom + centre, 0, size - 1)


def zoom_matrix(zoom: jax.Array, size: int) -> jax.Array:
    """Linear interpolation at `zoom_coordinates` as a matrix (size, size), float32."""
    distance = zoom_coordinates(zoom, size)[:, None] - jnp.arange(size, dtype=jnp.float32)
    return jnp.maximum(1 - jnp.abs(distance), 0)


def smoothing_matrix(sigma: jax.Array, size: int) -> jax.Array:
    """Gaussian of `sigma` voxels integrated over each voxel, rows of sum 1; (size, size) float32, identity for 0."""
    index = jnp.arange(size, dtype=jnp.float32)
    # Multiplied, not divided: XLA makes that of some divisions, in one program and not in another.
    scale = 1 / (jnp.sqrt(2.0) * jnp.maximum(sigma, 1e-3))
    distance = index[:, None] - index
    weight = jax.scipy.special.erf((distance + 0.5) * scale) - jax.scipy.special.erf((distance - 0.5) * scale)
    return weight * (1 / weight.sum(axis=1, keepdims=True))


def _along_axis(matrix: jax.Array, image: jax.Array, axis: int) -> jax.Array:
    """Multiply one spatial axis of (D, H, W, C) by a matrix."""
    subscripts = ("ij,jhwc->ihwc", "ij,djwc->diwc", "ij,dhjc->dhic")[axis]
    return jnp.einsum(subscripts, matrix, image, precision=FULL)


def _turn(array: jax.Array, turns: jax.Array) -> jax.Array:
    half = jnp.flip(array, (0, 1))
    if array.shape[0] != array.shape[1]:
        return jnp.where(turns == 2, half, array)
    quarter = jnp.rot90(array)
    return jnp.select([turns == 1, turns == 2, turns == 3], [quarter, half, jnp.flip(quarter, (0, 1))], array)
