"""Logits on the network's grid to a label map on the scan's grid, where no tile of them can be taken by itself."""

import math
from collections.abc import Sequence

import numpy as np

from mambahome_jax.imaging.geometry import Order, resample_to
from mambahome_jax.imaging.volume import Volume

SLAB_BYTES = 32 << 20
# Voxels by which sampling axis by axis may miss a position, and affines that count as equal, as in imaging.geometry.
_PARALLEL = 1e-4
_SAME = 1e-3


def labels_on_grid(
    logits: np.ndarray,
    affine: np.ndarray,
    target_affine: np.ndarray,
    target_shape: Sequence[int],
    order: Order = "linear",
    *,
    slab_bytes: int = SLAB_BYTES,
) -> np.ndarray:
    """Class of the largest logit at each voxel of another grid, the logits brought there by interpolation.

    logits: (d, h, w, classes) on the grid `affine` (4, 4).
    target_affine, target_shape: (4, 4) and (D, H, W) of the grid to label.
    order: "linear" or "nearest"; beyond the outermost voxels their values go on.
    slab_bytes: most that the interpolated logits may take at a time.

    Returns (D, H, W) of uint8, or uint16 for more than 256 classes; of equal logits the lower class wins.
    """
    shape, source = tuple(int(n) for n in target_shape), Volume(logits, affine)
    result = np.empty(shape, np.uint8 if logits.shape[-1] <= 256 else np.uint16)
    height = max(slab_bytes // (math.prod(shape[1:]) * logits.shape[-1] * logits.dtype.itemsize), 1)
    for first in range(0, shape[0], height):
        box = (slice(first, min(first + height, shape[0])), slice(0, shape[1]), slice(0, shape[2]))
        result[box] = resample_to(source, target_affine, shape, order, box=box).array.argmax(axis=-1)
    return result


def positions_on(
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
