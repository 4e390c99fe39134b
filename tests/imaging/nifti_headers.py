"""NIfTI files with any header for tests, and where SimpleITK sees a file."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from mambahome_jax.imaging.header import grid_shift
from mambahome_jax.imaging.volume import Volume

sitk.ProcessObject.SetGlobalWarningDisplay(False)

SHAPE = (9, 8, 7)
STRAIGHT = np.array([[1.5, 0, 0, -29.25], [0, 1.5, 0, -26.25], [0, 0, 2, -31], [0, 0, 0, 1.0]])
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 3.0) @ np.diag([-1.5, 1.5, 2]), [520, -7, 300])
MOVED = nib.affines.from_matvec(STRAIGHT[:3, :3], STRAIGHT[:3, 3] + [20, 32, 72])


def sheared(mm: float) -> np.ndarray:
    affine = STRAIGHT.copy()
    affine[0, 1] = mm
    return affine


def save(path: Path, sform, scode, qform, qcode, unit=2, array=None, edit=None) -> Path:
    """A scan with these forms, written byte by byte as nibabel would mend some of them."""
    header = nib.Nifti1Header()
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["pixdim"][1:4] = 1.5, 1.5, 2
    header.set_qform(qform, qcode, strip_shears=True)
    header.set_sform(sform, scode)
    factor = {1: 0.001, 3: 1000}.get(unit, 1)
    for name in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[name] *= factor
    header["pixdim"][1:4] *= factor
    header["xyzt_units"], header["vox_offset"], header["magic"] = unit, 352, b"n+1"
    if edit:
        edit(header)
    path.write_bytes(bytes(header.binaryblock) + bytes(4) + array.tobytes(order="F"))
    return path


def in_itk(path: Path) -> np.ndarray | None:
    """(4, 4), voxel to RAS mm, as SimpleITK reads a file; None where it refuses it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.array(reader.GetDirection()[:9]).reshape(3, 3) * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return np.diag([-1, -1, 1, 1]) @ affine


def apart(one: np.ndarray, other: np.ndarray, shape=SHAPE) -> float:
    """Voxels by which two grids differ at most."""
    return grid_shift(one, other, shape)[0]


def crop(volume: Volume, start, end) -> Volume:
    """The box from voxel `start` to `end` (exclusive), zeros beyond the volume."""
    padded = np.pad(volume.array, [(9, 9)] * 3 + [(0, 0)] * (volume.array.ndim - 3))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    return Volume(padded[tuple(slice(a + 9, b + 9) for a, b in zip(start, end, strict=True))], affine, volume.header)
