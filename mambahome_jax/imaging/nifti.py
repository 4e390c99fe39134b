"""NIfTI files: nibabel knows the header; the voxels are read and written here, packed by gzip or not.

That checks gzip's checksum, which a reader that stops after the last voxel never sees, keeps memory to what the file
can hold, and makes every fault a `DatasetError` that names the file.
"""

import contextlib
import functools
import gzip
import importlib
import json
import logging
import math
import multiprocessing
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import no_scan, suffix_of
from mambahome_jax.imaging.header import Header, scaled, usable_affine
from mambahome_jax.support.files import not_read
from mambahome_jax.support.processes import usable_cores

GZIP_MAGIC = b"\x1f\x8b"
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_HEADER = 544  # bytes of the longer of the two, with those that announce extensions
_COMMENT = 6  # kind of a header extension: plain text
# nibabel tells what it mends in a header, but not in the header of which file.
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)
_STEP, _HEAD_STEP = 1 << 20, 1 << 13  # bytes that are unpacked at a time
_LONGEST_HEADER = 1 << 11  # bytes that are unpacked at once where a stream begins
# What may lie behind the bytes asked for, beside as many again: a file of some kilobytes can hold gigabytes of zeros.
_BEYOND = 1 << 26
_MOST_THREADS = 8  # that pack: each holds some megabytes, and a disk keeps up with no more
_PART = 1 << 22  # bytes of voxels that are turned into the file's order at a time
_LEAST_SLICES = 4  # of a part: neighbours along the last axis share a cache line where that is the contiguous one
_BLOCK = 1 << 16  # bytes that stay within the cache while their axes are turned round


class DamagedError(Exception):
    """Packed bytes that cannot be unpacked or do not agree with their checksum."""


class TrailingError(DamagedError):
    """Bytes that are no gzip behind the end of a whole one."""


class Headers(NamedTuple):
    """A header as nibabel mends it, and as it is stored; equal files share both, so neither is to be changed."""

    mended: nib.Nifti1Header
    stored: nib.Nifti1Header


def _isal(name: str, instead: ModuleType) -> Any:
    """A module of isal, which takes a fraction of zlib's time; the one of the standard library where it is missing."""
    try:
        return importlib.import_module(f"isal.{name}")
    except ImportError:
        return instead


deflate = _isal("isal_zlib", zlib)
packer = _isal("igzip_threaded", gzip)


def read(path: Path, channels: int | None, *, voxels: bool = True) -> tuple[Headers, np.ndarray]:
    """Read the header and the stored values (D0, D1, D2[, C]), first axis fastest; zeros without `voxels`.

    No more is allocated than the file can hold, whatever its header claims.
    Raises DatasetError: no NIfTI file; truncated or damaged; another number of axes or channels.
    """
    with _opened(path) as (file, packed):
        headers = _header_of(path, file, packed)
        shape, dtype, offset = _layout(path, headers.mended, channels)
        end = offset + math.prod(shape) * dtype.itemsize
        size = os.fstat(file.fileno()).st_size
        # Deflate packs no more than 1032 bytes into one.
        _require_held(path, 1032 * size if packed else size, offset, end)
        if not voxels:
            return headers, np.broadcast_to(np.uint8(0), shape)
        file.seek(0)
        content, held = unpacked(file, end) if packed else (file.read(end), end)
        _require_held(path, min(held, len(content)), offset, end)
    return headers, np.frombuffer(content, dtype, count=math.prod(shape), offset=offset).reshape(shape, order="F")


def write(path: Path, array: np.ndarray, header: nib.Nifti1Header, names: Mapping[int, str] | None) -> None:
    """Write voxels (D0, D1, D2[, C]) behind a header, packed where the name ends in .gz: the same bytes for any number
    of threads. names: of label values, as a comment extension. Raises OSError."""
    extension = _names_extension(names) if names else bytes(4)
    header["vox_offset"] = int(header["sizeof_hdr"]) + len(extension)
    with path.open("wb") as file, packing(file) if path.name.endswith(".gz") else file as target:
        target.write(bytes(header.binaryblock) + extension)
        for part in parts_of(array):
            target.write(fortran_bytes(part))


def inflated(file: BinaryIO, step: int = _STEP) -> Iterator[bytes]:
    """Unpack a gzip or zlib stream from where the file stands, at most `step` bytes at a time.

    Afterwards the file stands behind the stream. Raises EOFError: no end. DamagedError: damaged, a wrong checksum.
    """
    # ISA-L refuses some headers that are not in one piece.
    unpacker, packed = deflate.decompressobj(32 + zlib.MAX_WBITS), file.read(max(step // 4, _LONGEST_HEADER))
    while True:
        try:
            part = unpacker.decompress(packed, step)
        except deflate.error as error:
            raise DamagedError("invalid packed bytes or a wrong checksum") from error
        yield part
        if unpacker.eof:
            file.seek(-len(unpacker.unused_data), os.SEEK_CUR)
            return
        left = unpacker.unconsumed_tail
        # Where neither input nor output moves, it never would.
        if not part and len(left) == len(packed):
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        packed = left or file.read(step // 4)


def unpacked(file: BinaryIO, size: int) -> tuple[bytearray, int]:
    """Unpack the first `size` bytes of a gzip file, zeros where it has fewer, and count those that it has.

    It is read to its end, where the checksum stands; what lies behind that and is no gzip is left alone, as by gzip.
    Raises EOFError: no end. DamagedError: damaged, something else behind fewer than `size` bytes, or far more than
    `size`.
    """
    content, held = bytearray(size), 0
    try:
        for part in _members(file, _STEP):
            kept = part[: max(size - held, 0)]
            content[held : held + len(kept)] = kept
            held += len(part)
            if held > 2 * size + _BEYOND:
                raise DamagedError(f"more than {held} bytes in it, {size} expected")
    except TrailingError:
        # The members before it are whole by their checksums.
        if held < size:
            raise
    return content, min(held, size)


def unpacked_head(file: BinaryIO, size: int) -> bytes:
    """Unpack the first `size` bytes of a gzip file, or all of fewer. Raises as `unpacked`, as far as it reads."""
    head = b""
    for part in _members(file, _HEAD_STEP):
        head += part
        if len(head) >= size:
            break
    return head[:size]


def _members(file: BinaryIO, step: int) -> Iterator[bytes]:
    """Unpack all members of a gzip file, with zeros between and behind them."""
    yield from inflated(file, step)
    while piece := file.read(step // 4):
        if rest := piece.lstrip(b"\0"):
            file.seek(-len(rest), os.SEEK_CUR)
            if not GZIP_MAGIC.startswith(rest[:2]):
                raise TrailingError("it goes on behind its end")
            yield from inflated(file, step)


@contextlib.contextmanager
def packing(file: BinaryIO) -> Iterator[Any]:
    """A file that packs into another, in threads where isal is installed; none is left behind, whatever fails."""
    if packer is gzip:
        # Level 1 packs a noisy CT to within a few percent of level 6 at three times its speed.
        with gzip.GzipFile("", "wb", 1, file, mtime=0) as target:
            yield target
    else:
        # Level 3 packs no better at half the speed or less, and differs with the processor.
        with packer.open(file, "wb", 2, threads=threads()) as target:
            yield target


def threads() -> int:
    """How many pack: one a core, and one alone in a worker process, which shares the cores with others."""
    return 1 if multiprocessing.parent_process() is not None else min(usable_cores(), _MOST_THREADS)


def parts_of(array: np.ndarray) -> list[np.ndarray]:
    """Views of (D0, D1, D2[, C]) whose voxels follow each other in a file that has the first axis fastest."""
    count = max(_PART // max(array.shape[0] * array.shape[1] * array.itemsize, 1), _LEAST_SLICES)
    channels = np.moveaxis(array, 3, 0) if array.ndim == 4 else [array]
    return [channel[:, :, k : k + count] for channel in channels for k in range(0, array.shape[2], count)]


def fortran_bytes(part: np.ndarray) -> memoryview:
    """The bytes of (D0, D1, D2), first axis fastest, without a copy where they lie like that."""
    if not part.flags.f_contiguous:
        turned = np.empty(part.shape, part.dtype, order="F")
        rows = max(_BLOCK * part.shape[1] // part.nbytes, 1)
        for j in range(0, part.shape[1], rows):
            # Copied first as they lie: rows that are a power of two apart would push each other out of the cache.
            turned[:, j : j + rows] = part[:, j : j + rows].copy(order="K")
        part = turned
    return part.reshape(-1, order="F").view(np.uint8).data


def _names_extension(names: Mapping[int, str]) -> bytes:
    text = json.dumps({"labels": {str(value): name for value, name in sorted(names.items())}}).encode()
    # Four bytes that announce it, then size and kind as int32 and the text, padded so that the size divides by 16.
    size = -(-(8 + len(text)) // 16) * 16
    return b"\x01\0\0\0" + struct.pack("<ii", size, _COMMENT) + text.ljust(size - 8, b"\0")


def _require_held(path: Path, held: int, offset: int, end: int) -> None:
    if held < end:
        fault, expected = f"truncated: {max(held - offset, 0)} bytes of voxels", f"{end - offset}"
        raise DatasetError(fault, file=path, expected=expected, action="Copy or download it again.")


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
        fault, action = f"truncated or damaged ({error})", "Copy or download it again."
        raise DatasetError(fault, file=path, expected="a whole gzip", action=action) from error
    except OSError as error:
        raise not_read(path, error) from error


def _header_of(path: Path, file: BinaryIO, packed: bool) -> Headers:
    content = unpacked_head(file, _HEADER) if packed else file.read(_HEADER)
    size = next((s for s in _HEADERS for order in ("little", "big") if int.from_bytes(content[:4], order) == s), None)
    if size is None or len(content) < size:
        if not suffix_of(path.name):
            raise no_scan(path)
        raise DatasetError("not a NIfTI file", file=path, expected=".nii or .nii.gz")
    with _named(path):
        headers = _parsed(content[:size])
    if not headers.mended["magic"].item().startswith(b"n+"):
        raise DatasetError("an Analyze file or half of a NIfTI pair", file=path, expected="one .nii or .nii.gz file")
    return headers


@contextlib.contextmanager
def _named(path: Path, what: str = "damaged NIfTI header", expected: str | None = None) -> Iterator[None]:
    """Raise DatasetError where nibabel refuses a header; numbers that are none go on without a warning of NumPy."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise DatasetError(f"{what} ({error})", file=path, expected=expected) from error


@functools.lru_cache(maxsize=64)
def _parsed(content: bytes) -> Headers:
    """nibabel tests every field, which takes longer than reading a small file; masks of a case share their header."""
    stored = _HEADERS[len(content)](content, check=False)
    mended = stored.copy()
    mended.check_fix(logger=_SILENT)
    return Headers(mended, stored)


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
    if channels is not None and channels != (shape[3] if len(shape) == 4 else 1):
        expected = "a 3D volume" if channels == 1 else f"{channels} channels as the fourth axis"
        raise DatasetError(f"{len(shape)}D volume {shape}", file=path, expected=expected)
    return shape


def affine_of(path: Path, header: nib.Nifti1Header) -> np.ndarray:
    """(4, 4) float64, voxel to RAS in the file's unit: sform, else qform, else by the spacing. Raises DatasetError."""
    with _named(path, "no usable affine"):
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        if not affine[:3, :3].any():
            # An all-zero sform says nothing, whatever its code.
            coded = header.get_qform(coded=True)[0]
            affine = np.asarray(header.get_base_affine() if coded is None else coded, dtype=np.float64)
    return usable_affine(path, affine)


def forms_of(path: Path, header: Header) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """What a NIfTI header says of the geometry in its three ways: sform, qform (4, 4), voxel to RAS mm, and pixdim (3,)
    in mm; None for a form whose code or numbers are 0. Raises DatasetError: a qform that is no rotation."""
    assert header.nifti is not None
    mended = _parsed(header.nifti.binaryblock).mended
    with _named(path, "damaged qform", expected="a rotation"):
        qform = mended.get_qform(coded=True)[0]
    sform = mended.get_sform(coded=True)[0]
    if sform is not None and not sform[:3, :3].any():
        sform = None
    sform, qform = (None if form is None else scaled(form, header.scale) for form in (sform, qform))
    return sform, qform, header.scale * np.abs(np.asarray(mended["pixdim"][1:4], np.float64))


def slope_inter(path: Path, header: nib.Nifti1Header) -> tuple[float, float]:
    """What stored values are multiplied by, and what is added then. Raises DatasetError: a damaged header."""
    with _named(path):
        slope, inter = header.get_slope_inter()
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _layout(path: Path, header: nib.Nifti1Header, channels: int | None) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, stored type, and where in the file the voxels begin."""
    shape = checked_shape(path, tuple(int(n) for n in header.get_data_shape()), channels)
    with _named(path):
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
    if dtype.kind not in "iuf":
        raise DatasetError(f"voxels of type {dtype}", file=path, expected="one integer or real number a voxel")
    if offset < 0:
        raise DatasetError(f"voxels that begin at byte {offset}", file=path, expected="one behind the header")
    return shape, dtype, offset
