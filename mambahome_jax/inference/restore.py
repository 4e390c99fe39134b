"""Where the voxels of the scan lie on the network's grid."""

from collections.abc import Sequence

import numpy as np

# Voxels by which sampling axis by axis may miss a position, and affines that count as equal, as in imaging.geometry.
_PARALLEL = 1e-4
_SAME = 1e-3


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
