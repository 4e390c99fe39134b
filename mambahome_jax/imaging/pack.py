"""Packing voxels as gzip in several threads, into the same bytes however many there are."""

import multiprocessing
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mambahome_jax.imaging import deflate
from mambahome_jax.support.processes import usable_cores

P = TypeVar("P")
R = TypeVar("R")

_MOST_THREADS = 8  # each holds some megabytes, and a disk keeps up with no more
_PART = 1 << 22  # bytes of voxels that are packed at a time
_LEAST_SLICES = 4  # of a part: neighbours along the last axis share a cache line where that is the contiguous one
_BLOCK = 1 << 16  # bytes that stay within the cache while their axes are turned round
# Deflate, no flags, no time, packed fast, on an unknown system.
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
_LAST_BLOCK = b"\x03\0"  # an empty one that says that none follows


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


def gzipped(head: bytes, array: np.ndarray) -> Generator[bytes, None, None]:
    """Pieces of one gzip member that holds `head` and the voxels (D0, D1, D2[, C]), first axis fastest.

    At most two parts of some megabytes a thread are in memory.
    """
    noise = array.dtype.kind == "f"

    def packed(part: memoryview | np.ndarray) -> tuple[memoryview, bytes]:
        content = part if isinstance(part, memoryview) else fortran_bytes(part)
        return content, deflate.deflated(content, noise=noise)

    yield _HEADER
    checksum = length = 0
    parts: list[memoryview | np.ndarray] = [memoryview(head), *parts_of(array)]
    for content, piece in _in_order(packed, parts):
        checksum, length = deflate.crc32(content, checksum), length + content.nbytes
        yield piece
    yield _LAST_BLOCK + struct.pack("<II", checksum, length % (1 << 32))


def threads() -> int:
    """How many pack: one a core, and one alone in a worker process, which shares the cores with others."""
    if multiprocessing.parent_process() is not None:
        return 1
    return min(usable_cores(), _MOST_THREADS)


def _in_order(function: Callable[[P], R], parts: Sequence[P]) -> Iterator[R]:
    count = min(threads(), len(parts))
    if count == 1:
        yield from map(function, parts)
        return
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[R]] = deque()
        for part in parts:
            waiting.append(pool.submit(function, part))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
