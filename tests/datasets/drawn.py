"""Label maps and scans drawn on one grid in RAS, and stored in the axes and with the headers of published files."""

import gzip
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (24, 20, 16)
AFFINE = np.array([[1.5, 0, 0, -17.25], [0, 1.5, 0, -14.25], [0, 0, 2.0, -15], [0, 0, 0, 1]])


def draw(values: Iterable[int], shift: int = 0) -> np.ndarray:
    """Label map with a block of 3 x 3 x 3 voxels for each value, in one of 90 places that differ by value."""
    label = np.zeros(SHAPE, np.uint8)
    for value in values:
        place = (value + shift) % 90
        i, j, k = 4 * (place % 6), 4 * (place // 6 % 5), 5 * (place // 30)
        label[i : i + 3, j : j + 3, k : k + 3] = value
    return label


def scan(label: np.ndarray, modality: str, seed: int = 0) -> np.ndarray:
    """Image in which each structure has its own grey value, in the units of the modality."""
    low, step, noise = {"ct": (-1000, 30, 5.0), "mr": (20, 15, 1.0), "us": (0, 80, 2.0)}[modality]
    inside = low + (label > 0) * (1000 if modality == "ct" else 0) + step * label.astype(float)
    image = inside + np.random.default_rng(seed).normal(0, noise, label.shape)
    image[0, 0, 0] = low - (24 if modality == "ct" else 0)
    return np.clip(image, 0, 255) if modality == "us" else image


def write(path: Path, array: np.ndarray, axes: str = "RAS", dtype: str = "int16", forms: str = "both") -> None:
    """Write an array drawn in RAS (channels last) with its axes stored as `axes`.

    forms: "both", "qform" (all-zero sform of code 0) or "zero sform" (all zero with code 1).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes)
    )
    stored = nib.orientations.apply_orientation(array, transform)
    affine = AFFINE @ nib.orientations.inv_ornt_aff(transform, SHAPE)
    image = nib.Nifti1Image(np.round(stored).astype(dtype) if dtype[0] != "f" else stored.astype(dtype), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    if forms != "both":
        for row in ("srow_x", "srow_y", "srow_z"):
            image.header[row] = 0
        image.header["sform_code"] = int(forms == "zero sform")
        # nibabel fills the forms in again from the affine, so the bytes are written as they are.
        path.write_bytes(_bytes(image))
        return
    nib.save(image, path)


def _bytes(image: nib.Nifti1Image) -> bytes:
    header = image.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_slope_inter(1, 0)
    voxels = np.asarray(image.dataobj).astype(header.get_data_dtype())
    return gzip.compress(header.binaryblock + bytes(4) + voxels.tobytes(order="F"), 1)


def first_voxel(mask: np.ndarray) -> np.ndarray:
    """Of a mask, the voxel that comes first alone."""
    first = np.zeros_like(mask)
    first[tuple(np.argwhere(mask)[0])] = True
    return first
