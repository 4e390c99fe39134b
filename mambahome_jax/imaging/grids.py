"""Whether two volumes lie on one grid."""

from pathlib import Path

import numpy as np

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.volume import Volume

TOLERANCE = 0.1
_CORNERS = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)])

MEND_LABEL = "Bring the label map onto the grid of its image first."


def require_same_grid(image: Volume, label: Volume, file: Path, action: str = MEND_LABEL) -> None:
    """Raises DatasetError where the shapes differ, or a corner voxel lies more than 0.1 of a voxel elsewhere."""
    if image.shape != label.shape:
        found, expected = f"grid of {_by(label.shape)} voxels", f"{_by(image.shape)} as in the image"
        raise DatasetError(found, file=file, expected=expected, action=action)
    shift, largest = grid_shift(image.affine, label.affine, image.shape)
    if shift > TOLERANCE:
        found = f"a grid that lies up to {largest:.3g} mm ({shift:.3g} voxels) off the image's"
        raise DatasetError(found, file=file, expected=f"at most {TOLERANCE} voxels", action=action)


def grid_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far apart two grids of one shape lie at the corner that differs most: voxels of the first, and mm."""
    if np.array_equal(affine, other):
        return 0.0, 0.0
    corners = _CORNERS * [*(n - 1 for n in shape[:3]), 1]
    shift_mm = (corners @ (other - affine).T)[:, :3]
    shift = np.abs(shift_mm @ np.linalg.inv(affine[:3, :3]).T).max()
    return float(shift), float(np.linalg.norm(shift_mm, axis=1).max())


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
