"""Augmentation of a batch on the device: what the published data_loader.py lists, and what recipes add to that.

Every operation is one on a whole sample that changes nothing where it is not drawn (zoom and smoothing are small
matrices along each axis), so that one compiled function without branches serves a batch under vmap.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from mambahome_jax.config import Mirror
from mambahome_jax.datasets.structures import swap_table
from mambahome_jax.preprocessing.grids import thick_axis
from mambahome_jax.recipes import AugmentationConfig

SPATIAL = 3
# So that the identity, where a sample is left alone, changes no bit of it.
FULL = jax.lax.Precision.HIGHEST
# Distance of the points at which an elastic deformation is drawn, in voxels of the finest axis.
CONTROL_DISTANCE = 16
# What is drawn beside the published operations leaves their keys as they are.
_MORE_KEYS = 100
_ELASTIC_KEY = 200


def augment(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    """Augment each sample of a batch on its own, each operation by its own probability.

    In this order: mirroring, affine map and elastic deformation, zoom, quarter turns in the plane of the first two axes
    (half turns where D and H differ), intensity shift, smoothing, noise, brightness, contrast, resolution, gamma. image
    (batch, D, H, W, C) of about unit range; label (batch, D, H, W); sample n draws from fold_in(key, n).
    """
    keys = _sample_keys(key, image.shape[0])
    return jax.vmap(lambda k, x, y: _augment_sample(k, x, y, config))(keys, image, label)


def augment_labelled(key: jax.Array, labelled: jax.Array, config: AugmentationConfig) -> jax.Array:
    """Classes that each sample has labels of, (batch, classes) bool, after `augment` with the same key."""
    keys = _sample_keys(key, labelled.shape[0])
    return jax.vmap(lambda k, row: mirror_labelled(jax.random.fold_in(k, _MORE_KEYS), row, config.mirror))(
        keys, labelled
    )


def _sample_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(batch))


def _augment_sample(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    image, label = _deform(key, image, label, config)
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
    return _change_intensity(key, image + shift.astype(dtype) + noise_std.astype(dtype) * noise, config), label


def _deform(
    key: jax.Array, image: jax.Array, label: jax.Array, config: AugmentationConfig
) -> tuple[jax.Array, jax.Array]:
    mirror_key, happens_key, angle_key, scale_key = (jax.random.fold_in(key, _MORE_KEYS + n) for n in range(4))
    if config.mirror:
        image, label = mirror(mirror_key, image, label, config.mirror)
    if not config.affine_probability and not config.elastic_probability:
        return image, label
    happens = jax.random.bernoulli(happens_key, config.affine_probability)
    thick = thick_axis(config.voxel_size) if config.plane_rotation else None
    limit = jnp.deg2rad(config.affine_rotation)
    if thick is not None:
        limit = jnp.zeros(3).at[thick].set(jnp.deg2rad(config.plane_rotation))
    angles = jnp.where(happens, jax.random.uniform(angle_key, (3,), jnp.float32, -limit, limit), 0)
    if config.scale_apart:
        happens = jax.random.bernoulli(jax.random.fold_in(happens_key, 1), config.affine_probability)
    scale = jnp.where(happens, jax.random.uniform(scale_key, (), jnp.float32, *config.affine_scale), 1)
    matrix = affine_matrix(angles, scale, config.voxel_size)
    if thick is not None:
        matrix = matrix.at[thick, thick].set(1)
    if not config.elastic_probability:
        return warp(image, label, matrix)
    std_key, field_key = jax.random.split(jax.random.fold_in(key, _ELASTIC_KEY))
    std = _draw(std_key, config.elastic_probability, (0.0, config.elastic_std), neutral=0.0)
    moved: list[jax.Array | float] = [*elastic_displacement(field_key, std, label.shape, config.voxel_size)]
    if thick is not None:
        moved[thick] = 0.0
    return warp(image, label, matrix, moved)


def _change_intensity(key: jax.Array, image: jax.Array, config: AugmentationConfig) -> jax.Array:
    gamma = partial(change_gamma, keep_moments=config.gamma_keeps_moments)
    whole = thick_axis(config.voxel_size) if config.plane_rotation else None
    changes = (
        (4, change_brightness, config.brightness_probability, config.brightness_range),
        (5, change_contrast, config.contrast_probability, config.contrast_range),
        (7, partial(lower_resolution, whole=whole), config.low_resolution_probability, config.low_resolution_range),
        (8, lambda x, value: -gamma(-x, value), config.inverted_gamma_probability, config.gamma_range),
        (6, gamma, config.gamma_probability, config.gamma_range),
    )
    for number, change, probability, bounds in changes:
        if not probability:
            continue
        happens_key, value_key = jax.random.split(jax.random.fold_in(key, _MORE_KEYS + number))
        value = jax.random.uniform(value_key, (), jnp.float32, *bounds)
        image = jnp.where(jax.random.bernoulli(happens_key, probability), change(image, value), image)
    return image


def _draw(
    key: jax.Array, probability: float, bounds: tuple[float, float], neutral: float, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Draw uniformly within bounds with the given probability, else take the value that changes nothing; float32."""
    happens_key, value_key = jax.random.split(key)
    value = jax.random.uniform(value_key, shape, jnp.float32, *bounds)
    return jnp.where(jax.random.bernoulli(happens_key, probability), value, neutral)


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


def _draw_turns(key: jax.Array, probability: float, square: bool) -> jax.Array:
    happens_key, value_key = jax.random.split(key)
    turns = jax.random.randint(value_key, (), 1, 4) if square else 2
    return jnp.where(jax.random.bernoulli(happens_key, probability), turns, 0)


def _turn(array: jax.Array, turns: jax.Array) -> jax.Array:
    half = jnp.flip(array, (0, 1))
    if array.shape[0] != array.shape[1]:
        return jnp.where(turns == 2, half, array)
    quarter = jnp.rot90(array)
    return jnp.select([turns == 1, turns == 2, turns == 3], [quarter, half, jnp.flip(quarter, (0, 1))], array)


def affine_matrix(angles: jax.Array, scale: jax.Array, voxel_size: Sequence[float]) -> jax.Array:
    """Where the content of each output voxel comes from: (3, 3) float32, about the centre, in voxels.

    angles: (3,) radians, about one axis after the other, from the lower to the higher of the other two. scale: above 1
    enlarges. voxel_size: (3,), so that it is a rotation in space.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    matrix = jnp.eye(3)
    for axis in range(3):
        a, b = (other for other in range(3) if other != axis)
        turn = jnp.eye(3).at[a, a].set(cos[axis]).at[b, b].set(cos[axis])
        turn = turn.at[a, b].set(sin[axis]).at[b, a].set(-sin[axis])
        matrix = jnp.matmul(turn, matrix, precision=FULL)
    size = jnp.asarray(voxel_size, jnp.float32)
    return matrix * size / size[:, None] / scale


def elastic_displacement(
    key: jax.Array, std: jax.Array, shape: Sequence[int], voxel_size: Sequence[float]
) -> list[jax.Array]:
    """A smooth random displacement, one (D, H, W) float32 in voxels for each axis.

    std: of each component at the control points, in voxels of the finest axis; cubic between them.
    """
    finest = min(voxel_size)
    distance = finest * CONTROL_DISTANCE
    points = [max(2, round(n * size / distance)) for n, size in zip(shape, voxel_size, strict=True)]
    drawn = jax.random.normal(key, (3, *points), jnp.float32) * std
    smooth = jax.image.resize(drawn, (3, *shape), "cubic", precision=FULL)
    return [field * (finest / size) for field, size in zip(smooth, voxel_size, strict=True)]


def warp(
    image: jax.Array, label: jax.Array, matrix: jax.Array, displacement: Sequence[jax.Array | float] = (0.0, 0.0, 0.0)
) -> tuple[jax.Array, jax.Array]:
    """Sample image (D, H, W, C) and label (D, H, W) at matrix @ (voxel - centre) + centre + displacement.

    The image is interpolated trilinearly; the label is that of the eight voxels around whose shares in it are largest
    together, for smooth borders. Outside the volume its border is repeated. The identity changes no bit.
    """
    shape = label.shape
    centre = [(n - 1) / 2 for n in shape]
    offsets = [jnp.arange(n, dtype=jnp.float32) - c for n, c in zip(shape, centre, strict=True)]
    grids = jnp.meshgrid(*offsets, indexing="ij", sparse=True)
    low, high, weight = [], [], []
    for row, size, middle, moved in zip(matrix, shape, centre, displacement, strict=True):
        # Products and sums instead of a matrix product, which a GPU might shorten.
        place = row[0] * grids[0] + row[1] * grids[1] + row[2] * grids[2] + middle + moved
        place = jnp.clip(place, 0, size - 1)
        below = jnp.floor(place)
        low.append(below.astype(jnp.int32))
        high.append(jnp.minimum(low[-1] + 1, size - 1))
        weight.append(place - below)
    total = jnp.zeros_like(image)
    shares, labels = [], []
    for corner in range(8):
        above = [corner >> axis & 1 for axis in range(3)]
        index = tuple(high[a] if up else low[a] for a, up in enumerate(above))
        first, second, third = (weight[a] if up else 1 - weight[a] for a, up in enumerate(above))
        shares.append(first * second * third)
        labels.append(label[index])
        total = total + shares[-1].astype(image.dtype)[..., None] * image[index]
    return total, _largest_share(shares, labels)


def _largest_share(shares: Sequence[jax.Array], labels: Sequence[jax.Array]) -> jax.Array:
    """The label with the largest sum of shares; of equal ones the first."""
    most, chosen = jnp.full_like(shares[0], -1), labels[0]
    for candidate in labels:
        total = sum(
            (jnp.where(label == candidate, share, 0) for share, label in zip(shares, labels, strict=True)),
            start=jnp.zeros_like(most),
        )
        chosen = jnp.where(total > most, candidate, chosen)
        most = jnp.maximum(total, most)
    return chosen


def mirror(
    key: jax.Array, image: jax.Array, label: jax.Array, mirrors: Sequence[Mirror], probability: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Flip image (D, H, W, C) and label (D, H, W) along each axis, and swap the labels of that axis' pairs with it."""
    for number, (axis, pairs) in enumerate(mirrors):
        happens = _mirrors(key, number, probability)
        flipped = jnp.flip(label, axis)
        if pairs:
            size = max(max(pair) for pair in pairs) + 1
            swapped = jnp.take(jnp.asarray(swap_table(pairs, size), label.dtype), flipped, mode="clip")
            flipped = jnp.where(flipped < size, swapped, flipped)
        image = jnp.where(happens, jnp.flip(image, axis), image)
        label = jnp.where(happens, flipped, label)
    return image, label


def mirror_labelled(
    key: jax.Array, labelled: jax.Array, mirrors: Sequence[Mirror], probability: float = 0.5
) -> jax.Array:
    """Which classes (classes,) bool a sample has labels of once `mirror` with the same key is done with it."""
    for number, (_, pairs) in enumerate(mirrors):
        swapped = labelled[swap_table(pairs, labelled.shape[0])]
        labelled = jnp.where(_mirrors(key, number, probability), swapped, labelled)
    return labelled


def _mirrors(key: jax.Array, number: int, probability: float) -> jax.Array:
    return jax.random.bernoulli(jax.random.fold_in(key, number), probability)


def change_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply the intensities."""
    return image * factor.astype(image.dtype)


def change_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply the distance to the channel's mean, kept within the extremes from before; image (D, H, W, C)."""
    low, high = _extremes(image)
    mean = image.mean(axis=(0, 1, 2), keepdims=True)
    return jnp.clip(mean + (image - mean) * factor.astype(image.dtype), low, high)


def change_gamma(image: jax.Array, gamma: jax.Array, keep_moments: bool = False) -> jax.Array:
    """Raise each channel of (D, H, W, C) to a power, scaled to [0, 1] for it and back.

    keep_moments: shift and scale the result to the mean and deviation from before, as nnU-Net does.
    """
    low, high = _extremes(image)
    width = jnp.maximum(high - low, 1e-6)
    changed = ((image - low) / width) ** gamma.astype(image.dtype) * width + low
    if not keep_moments:
        return changed
    (mean, std), (old_mean, old_std) = (
        (array.mean((0, 1, 2), keepdims=True), array.std((0, 1, 2), keepdims=True)) for array in (changed, image)
    )
    return (changed - mean) * (old_std / jnp.maximum(std, 1e-7)) + old_mean


def lower_resolution(image: jax.Array, factor: jax.Array, whole: int | None = None) -> jax.Array:
    """Sample (D, H, W, C) at the nearest voxels of a grid coarser by `factor`, below 1, and interpolate back linearly.

    whole: an axis to leave as it is.
    """
    for axis in range(SPATIAL):
        if axis != whole:
            image = _along_axis(resolution_matrix(factor, image.shape[axis]).astype(image.dtype), image, axis)
    return image


def resolution_matrix(factor: jax.Array, size: int) -> jax.Array:
    """What `lower_resolution` does to an axis, (size, size) float32; the identity for a factor of 1."""
    small = jnp.clip(jnp.round(size * factor), 1, size)
    place = jnp.clip((jnp.arange(size) + 0.5) * (small / size) - 0.5, 0, small - 1)
    below = jnp.floor(place)
    part = (place - below)[:, None]

    def nearest(voxel: jax.Array) -> jax.Array:
        return jax.nn.one_hot(jnp.floor((voxel + 0.5) * (size / small)).astype(jnp.int32), size)

    return (1 - part) * nearest(below) + part * nearest(jnp.minimum(below + 1, small - 1))


def _extremes(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = (0, 1, 2)
    return image.min(axis=axes, keepdims=True), image.max(axis=axes, keepdims=True)
