"""Whether two volumes lie on one grid."""

from pathlib import Path

import numpy as np

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.header import grid_shift
from mambahome_jax.imaging.volume import Volume

TOLERANCE = 0.1
# By how much the grids of a scan and of its label map differ where affines were rounded to float32 or written as text.
SAME_GRID_MM = 1e-3

MEND_LABEL = "Bring the label map onto the grid of its image first."


def require_same_grid(image: Volume, label: Volume, file: Path, action: str = MEND_LABEL) -> None:
    """Raises DatasetError where the shapes differ, or a corner voxel lies more than 0.1 of a voxel elsewhere."""
    if image.shape != label.shape:
        found, expected = f"grid of {_by(label.shape)} voxels", f"{_by(image.shape)} as in the image"
        raise DatasetError(found, file=file, expected=expected, action=action)
    shift, _ = shift_between(image, label)
    if shift > TOLERANCE:
        shift, largest = grid_shift(image.affine, label.affine, image.shape)
        found = f"a grid that lies up to {largest:.3g} mm ({shift:.3g} voxels) off the image's"
        raise DatasetError(found, file=file, expected=f"at most {TOLERANCE} voxels", action=action)


def shift_between(image: Volume, label: Volume) -> tuple[float, float]:
    """How far apart two volumes of one shape lie in the program that sees them nearest to each other: voxels and mm.

    A label map that was drawn where an ITK program shows a scan fits the scan's other form, not its affine.
    """
    if np.array_equal(image.affine, label.affine):
        return 0.0, 0.0
    pairs = [(grid, label.affine) for grid in image.grids] + [(image.affine, grid) for grid in label.grids]
    return min(grid_shift(one, other, image.shape) for one, other in pairs)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
