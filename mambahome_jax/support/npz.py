"""Damaged files of NumPy's: what reading them raises, and whether a .npz can hold the arrays that it claims, looked at
before numpy makes room for them."""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What numpy and zipfile raise for a .npy or .npz file that is missing or damaged, or none at all.
NPZ_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, MemoryError, OverflowError, RuntimeError, SyntaxError),
    *(NotImplementedError, RecursionError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)
_DEFLATE = 1032  # bytes that one can stand for at most


def require_held(path: Path) -> None:
    """Raises ValueError: an array larger than its member, or a member larger than the file; NPZ_ERRORS else."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > _DEFLATE * min(member.compress_size, size):
                raise ValueError(f"{member.filename} claims {member.file_size} bytes of {member.compress_size}")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims shape {shape} in {member.file_size} bytes")
