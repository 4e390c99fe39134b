"""Logits on the network's grid to a label map on the scan's grid, slab by slab.

All classes at the scan's full resolution never exist at once: 13 classes of a 512 x 512 x 1000 scan would take 13 GB.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.imaging.geometry import Order, resample_to
from mambahome_jax.imaging.volume import Volume

SLAB_BYTES = 32 << 20
# Voxels by which sampling axis by axis may miss a position, and affines that count as equal, as in imaging.geometry.
_PARALLEL = 1e-4
_SAME = 1e-3


def labels_on_grid(
    logits: jax.Array | np.ndarray,
    affine: np.ndarray,
    target_affine: np.ndarray,
    target_shape: Sequence[int],
    order: Order = "linear",
    *,
    slab_bytes: int = SLAB_BYTES,
) -> np.ndarray:
    """Class of the largest logit at each voxel of another grid, the logits brought there by interpolation.

    logits: (d, h, w, classes) on the grid `affine` (4, 4), on the device or the host.
    target_affine, target_shape: (4, 4) and (D, H, W) of the grid to label, its axes in the same orientation.
    order: "linear" or "nearest"; beyond the outermost voxels their values go on.
    slab_bytes: most that the interpolated logits may take at a time.

    Returns (D, H, W) of uint8, or uint16 for more than 256 classes; of equal logits the lower class wins.
    """
    dtype = np.dtype(np.uint8 if logits.shape[-1] <= 256 else np.uint16)
    result = np.empty(tuple(target_shape), dtype)
    for rows, slab in logits_in_slabs(logits, affine, target_affine, target_shape, order, slab_bytes=slab_bytes):
        result[rows] = np.asarray(_largest(slab, dtype))
    return result


def logits_in_slabs(
    logits: jax.Array | np.ndarray,
    affine: np.ndarray,
    target_affine: np.ndarray,
    target_shape: Sequence[int],
    order: Order = "linear",
    *,
    slab_bytes: int = SLAB_BYTES,
) -> Iterator[tuple[slice, jax.Array]]:
    """(rows, logits of these rows of the first axis), for the arguments of `labels_on_grid`."""
    shape = tuple(int(n) for n in target_shape)
    row_bytes = math.prod(shape[1:]) * logits.shape[-1] * logits.dtype.itemsize
    height = min(max(int(slab_bytes // row_bytes), 1), shape[0])
    # The last slab is moved back to the border, so that all have one shape and are compiled once.
    starts = [min(first, shape[0] - height) for first in range(0, shape[0], height)]
    positions = _positions(affine, logits.shape, target_affine, shape)
    if positions is None:
        yield from _anywhere(logits, affine, target_affine, shape, order, starts, height)
        return
    indices = [_neighbours(axis, order) for axis in positions]
    needed = _rows_needed(indices[0][0], starts, height, logits.shape[0])
    for start in starts:
        low, weight = (values[start : start + height] for values in indices[0])
        first = 0
        if isinstance(logits, np.ndarray):
            first = min(int(low[0]), logits.shape[0] - needed)
        source = jnp.asarray(logits[first : first + needed]) if isinstance(logits, np.ndarray) else logits
        yield slice(start, start + height), _sample(source, ((low - first, weight), *indices[1:]), order)


def _positions(
    affine: np.ndarray, shape: Sequence[int], target_affine: np.ndarray, target_shape: Sequence[int]
) -> list[np.ndarray] | None:
    """Where the target's voxels lie along each source axis, in voxels; None where the grids are turned or sheared."""
    size = np.array(target_shape)
    if tuple(shape[:3]) == tuple(target_shape) and np.allclose(affine, target_affine, atol=_SAME):
        return [np.arange(n, dtype=np.float64) for n in size]
    matrix = np.linalg.inv(affine) @ target_affine
    diagonal, middle = np.diag(matrix)[:3], (size - 1) / 2
    rest = matrix[:3, :3] - np.diag(diagonal)
    if (diagonal <= 0).any() or (np.abs(rest) @ middle).max() >= _PARALLEL:
        return None
    start = matrix[:3, 3] + rest @ middle
    # Rounding to 1e-9 voxel makes ties and unmoved axes exact, whatever the noise of the matrix product.
    return [
        np.clip(np.round(start[axis] + diagonal[axis] * np.arange(size[axis]), 9), 0, shape[axis] - 1)
        for axis in range(3)
    ]


def _neighbours(position: np.ndarray, order: Order) -> tuple[np.ndarray, np.ndarray]:
    low = np.rint(position) if order == "nearest" else np.floor(position)
    return low.astype(np.int32), (position - low).astype(np.float32)


def _rows_needed(low: np.ndarray, starts: list[int], height: int, available: int) -> int:
    spans = [int(low[start + height - 1]) - int(low[start]) + 2 for start in starts]
    return min(max(spans), available)


@partial(jax.jit, static_argnames="order")
def _sample(logits, indices, order):
    for axis, (low, weight) in enumerate(indices):
        below = jnp.take(logits, low, axis=axis, mode="clip")
        if order == "linear":
            above = jnp.take(logits, low + 1, axis=axis, mode="clip")
            weight = weight.astype(logits.dtype).reshape(-1, *[1] * (3 - axis))
            below = below + (above - below) * weight
        logits = below
    return logits


@partial(jax.jit, static_argnames="dtype")
def _largest(logits, dtype):
    return jnp.argmax(logits, axis=-1).astype(dtype)


def _anywhere(
    logits: jax.Array | np.ndarray,
    affine: np.ndarray,
    target_affine: np.ndarray,
    shape: tuple[int, ...],
    order: Order,
    starts: list[int],
    height: int,
) -> Iterator[tuple[slice, jax.Array]]:
    source = Volume(np.asarray(logits), affine)
    for start in starts:
        shifted = target_affine.copy()
        shifted[:3, 3] += target_affine[:3, 0] * start
        slab = resample_to(source, shifted, (height, *shape[1:]), order)
        yield slice(start, start + height), jnp.asarray(slab.array)
