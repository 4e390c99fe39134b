"""Reading NIfTI files: nibabel knows the header, the voxels are read here.

That checks gzip's checksum, which a reader that stops after the last voxel never sees, keeps memory to what the file
can hold, and makes every fault a `DatasetError` that names the file.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import no_scan, suffix_of
from mambahome_jax.imaging.unpack import GZIP_MAGIC, DamagedError, unpacked, unpacked_head

_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_LONGEST = 1e12  # mm
# nibabel tells what it mends in a header, but not in the header of which file.
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)
_HEADER = 544  # bytes of the longer of the two, with those that announce extensions


class Headers(NamedTuple):
    """A header twice: as nibabel mends it, and as it is stored. Neither is to be changed, as equal files share them."""

    mended: nib.Nifti1Header
    stored: nib.Nifti1Header


def read(path: Path, channels: int | None) -> tuple[Headers, np.ndarray]:
    """Header and the stored values (D0, D1, D2[, C]), first axis fastest, without a copy.

    No more is allocated than the file can hold, whatever its header claims.
    Raises DatasetError: as `read_header`; a truncated or damaged file; another number of axes or channels.
    """
    with _opened(path) as (file, packed):
        headers = _header_of(path, _head(file, packed))
        shape, dtype, offset = _layout(path, headers.mended, channels)
        end = offset + math.prod(shape) * dtype.itemsize
        _require_held(path, _most(file, packed), offset, end)
        file.seek(0)
        content, held = unpacked(file, end) if packed else (file.read(end), end)
        _require_held(path, min(held, len(content)), offset, end)
    return headers, np.frombuffer(content, dtype, count=math.prod(shape), offset=offset).reshape(shape, order="F")


def read_geometry(path: Path) -> tuple[tuple[int, ...], Headers]:
    """Shape, from the header and the size of the file, and the header. Raises DatasetError as `read`."""
    with _opened(path) as (file, packed):
        headers = _header_of(path, _head(file, packed))
        shape, dtype, offset = _layout(path, headers.mended, None)
        _require_held(path, _most(file, packed), offset, offset + math.prod(shape) * dtype.itemsize)
    return shape, headers


def _head(file: BinaryIO, packed: bool) -> bytes:
    return unpacked_head(file, _HEADER) if packed else file.read(_HEADER)


def _most(file: BinaryIO, packed: bool) -> int:
    """Bytes that a file can hold at most: deflate packs no more than 1032 into one."""
    size = os.fstat(file.fileno()).st_size
    return 1032 * size if packed else size


def _require_held(path: Path, held: int, offset: int, end: int) -> None:
    if held < end:
        found, expected = f"truncated: {max(held - offset, 0)} bytes of voxels", f"{end - offset}"
        raise DatasetError(found, file=path, expected=expected, action="Copy or download it again.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The file, and whether it is gzip. Raises DatasetError, also where reading it fails afterwards."""
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for its writer for ever.
        raise DatasetError("cannot be read: not a regular file", file=path, expected=".nii or .nii.gz")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            yield file, packed
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=path) from error
    except (EOFError, DamagedError) as error:
        found, action = f"truncated or damaged ({error})", "Copy or download it again."
        raise DatasetError(found, file=path, expected="a whole gzip", action=action) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=path) from error


def _header_of(path: Path, content: bytes) -> Headers:
    size = next((s for s in _HEADERS for order in ("little", "big") if int.from_bytes(content[:4], order) == s), None)
    if size is None or len(content) < size:
        if not suffix_of(path.name):
            raise no_scan(path)
        raise DatasetError("not a NIfTI file", file=path, expected=".nii or .nii.gz")
    try:
        headers = _parsed(content[:size])
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise DatasetError(f"damaged NIfTI header ({error})", file=path) from error
    if not headers.mended["magic"].item().startswith(b"n+"):
        raise DatasetError("an Analyze file or half of a NIfTI pair", file=path, expected="one .nii or .nii.gz file")
    return headers


@functools.lru_cache(maxsize=64)
def _parsed(content: bytes) -> Headers:
    """nibabel tests every field, which takes longer than reading a small file; masks of a case share their header."""
    stored = _HEADERS[len(content)](content, check=False)
    mended = stored.copy()
    mended.check_fix(logger=_SILENT)
    return Headers(mended, stored)


def _shape_of(path: Path, header: nib.Nifti1Header, channels: int | None) -> tuple[int, ...]:
    return checked_shape(path, tuple(int(n) for n in header.get_data_shape()), channels)


def checked_shape(path: Path, shape: tuple[int, ...], channels: int | None) -> tuple[int, ...]:
    """(D0, D1, D2) or (D0, D1, D2, C), without trailing axes of length 1. Raises DatasetError: anything else.

    Of (D0, D1, D2, 1, C), which is how ITK writes vectors to NIfTI, the axis of one time point goes too.
    """
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4):
        expected = "three spatial axes, and at most one of channels after them"
        raise DatasetError(f"{len(shape)} axes {shape}", file=path, expected=expected)
    if min(shape) < 1:
        raise DatasetError(f"empty volume {shape}", file=path, expected="at least one voxel")
    found = shape[3] if len(shape) == 4 else 1
    if channels is not None and found != channels:
        expected = "a 3D volume" if channels == 1 else f"{channels} channels as the fourth axis"
        raise DatasetError(f"{len(shape)}D volume {shape}", file=path, expected=expected)
    return shape


def affine_of(path: Path, header: nib.Nifti1Header) -> np.ndarray:
    """(4, 4) float64, voxel to RAS in the file's unit: sform, else qform, else by the spacing. Raises DatasetError."""
    try:
        # What is not finite is refused below, by name; NumPy's warnings tell no name.
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            if not affine[:3, :3].any():
                # An all-zero sform says nothing, whatever its code.
                coded = header.get_qform(coded=True)[0]
                affine = np.asarray(header.get_base_affine() if coded is None else coded, dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise DatasetError(f"no usable affine ({error})", file=path) from error
    return usable_affine(path, affine)


def usable_affine(path: Path | None, affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4) itself. Raises DatasetError: not finite, singular, or of no size on earth."""
    # What lies beyond cannot be millimetres, and its squares and products would overflow.
    small = bool(np.isfinite(affine).all()) and np.abs(affine).max() <= _LONGEST
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if small else np.zeros(3)
    if not abs(np.linalg.det(affine[:3, :3]) if small else 0) > 1e-6 * lengths.prod() or lengths.min() < 1 / _LONGEST:
        expected = "three independent axes of positive length"
        action = "Mend the geometry in its header (NIfTI: sform, qform or pixdim)."
        raise DatasetError(f"singular affine {affine[:3].tolist()}", file=path, expected=expected, action=action)
    return affine


def slope_inter(path: Path, header: nib.Nifti1Header) -> tuple[float, float]:
    """What stored values are multiplied by, and what is added then. Raises DatasetError: a damaged header."""
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise DatasetError(f"damaged NIfTI header ({error})", file=path) from error
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _layout(path: Path, header: nib.Nifti1Header, channels: int | None) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, stored type, and where in the file the voxels begin."""
    shape = _shape_of(path, header, channels)
    try:
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise DatasetError(f"damaged NIfTI header ({error})", file=path) from error
    if dtype.kind not in "iuf":
        raise DatasetError(f"voxels of type {dtype}", file=path, expected="one integer or real number a voxel")
    if offset < 0:
        raise DatasetError(f"voxels that begin at byte {offset}", file=path, expected="one behind the header")
    return shape, dtype, offset
