"""Augmentation beyond the published one: affine map, elastic deformation, mirroring, gamma, contrast and brightness.

Everything is an operation on one whole sample that is chosen or not by `where`, so that one compiled function without
branches serves a batch under vmap.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mambahome_jax.config import Mirror
from mambahome_jax.datasets.structures import swap_table

FULL = jax.lax.Precision.HIGHEST
# Distance of the points at which an elastic deformation is drawn, in voxels of the finest axis.
CONTROL_DISTANCE = 16


def affine_matrix(angles: jax.Array, scale: jax.Array, voxel_size: Sequence[float]) -> jax.Array:
    """Where the content of each output voxel comes from: (3, 3) float32, about the centre, in voxels.

    angles: (3,) radians, about the three axes one after the other; the content turns from the lower to the higher of
    the other two axes. scale: above 1 enlarges. voxel_size: (3,), so that the map is a rotation in space where the
    voxels are not cubes.
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

    Normal at control points that lie CONTROL_DISTANCE voxels of the finest axis apart, cubic between them.

    std: of each component at the control points, in voxels of the finest axis and as long along the others in space.
    """
    finest = min(voxel_size)
    distance = finest * CONTROL_DISTANCE
    points = [max(2, round(n * size / distance)) for n, size in zip(shape, voxel_size, strict=True)]
    drawn = jax.random.normal(key, (3, *points), jnp.float32) * std
    smooth = jax.image.resize(drawn, (3, *shape), "cubic", precision=FULL)
    return [field * (finest / size) for field, size in zip(smooth, voxel_size, strict=True)]


def resample(
    image: jax.Array, label: jax.Array, matrix: jax.Array, displacement: Sequence[jax.Array | float] = (0.0, 0.0, 0.0)
) -> tuple[jax.Array, jax.Array]:
    """Image (D, H, W, C) and label (D, H, W) at matrix @ (voxel - centre) + centre + displacement.

    The image is interpolated trilinearly; the label is that of the eight voxels around whose shares in it are largest
    together, so that borders do not get the steps that the nearest voxel's would.

    displacement: (D, H, W) for each axis, in voxels. Outside the volume the nearest voxel of its border counts. The
    identity changes no bit.
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
    return total, _most(shares, labels)


def _most(shares: Sequence[jax.Array], labels: Sequence[jax.Array]) -> jax.Array:
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
    """Flip image (D, H, W, C) and label (D, H, W) along each axis listed with the given probability, and swap the
    label values of that axis' pairs where it was flipped."""
    for number, (axis, pairs) in enumerate(mirrors):
        happens = _happens(key, number, probability)
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
        labelled = jnp.where(_happens(key, number, probability), swapped, labelled)
    return labelled


def _happens(key: jax.Array, number: int, probability: float) -> jax.Array:
    return jax.random.bernoulli(jax.random.fold_in(key, number), probability)


def change_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Intensities times a factor."""
    return image * factor.astype(image.dtype)


def change_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Distance to the channel's mean times a factor, kept within the extremes from before; image (D, H, W, C)."""
    low, high = _extremes(image)
    mean = image.mean(axis=(0, 1, 2), keepdims=True)
    return jnp.clip(mean + (image - mean) * factor.astype(image.dtype), low, high)


def change_gamma(image: jax.Array, gamma: jax.Array) -> jax.Array:
    """Power of each channel of (D, H, W, C), scaled to [0, 1] for it and back."""
    low, high = _extremes(image)
    width = jnp.maximum(high - low, 1e-6)
    return ((image - low) / width) ** gamma.astype(image.dtype) * width + low


def _extremes(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = (0, 1, 2)
    return image.min(axis=axes, keepdims=True), image.max(axis=axes, keepdims=True)
