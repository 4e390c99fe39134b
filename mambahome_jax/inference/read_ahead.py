"""Scans that threads read while another is segmented: how many at a time, and how much of the memory they may take."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import NIFTI_SUFFIXES, suffix_of
from mambahome_jax.imaging.volume import read_grid
from mambahome_jax.support.processes import available_memory

# What the scans that are read ahead may take together, in bytes of float32: 512 x 512 x 512 voxels anywhere, and a part
# of the memory where it is plentiful, up to four of 512 x 512 x 1000. A larger one is read when the last one is done.
HELD_BYTES = 512 << 20
MOST_HELD_BYTES, HELD_PART = 4 << 30, 32

T = TypeVar("T")


def held_bytes() -> int:
    """What scans that are read ahead may take together on this machine as it is now, in bytes of float32."""
    return min(max(HELD_BYTES, (available_memory() or 0) // HELD_PART), MOST_HELD_BYTES)


def read_ahead(
    read: Callable[[Scan], T], scans: Sequence[Scan], threads: int, held: int
) -> Iterator[tuple[Scan, int, Future[T]]]:
    """Read scans in threads: at most `threads` beyond the one in use, and no more than `held` bytes of them.

    Yields each with its bytes as float32, and what `read` makes of it, which lives as long as the caller keeps it. A
    scan that takes more by itself is read when the one before it is done with.
    """
    with ThreadPoolExecutor(threads) as readers:
        waiting: deque[tuple[Scan, int, Future[T]]] = deque()
        try:
            for scan in scans:
                nbytes = nbytes_of(scan)
                while waiting and sum(each for _, each, _ in waiting) + nbytes > held:
                    yield waiting.popleft()
                waiting.append((scan, nbytes, readers.submit(read, scan)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, _, reading in waiting:
                reading.cancel()


def nbytes_of(scan: Scan) -> int:
    files = scan.channels or (scan.path,)
    try:
        if suffix_of(scan.path.name, NIFTI_SUFFIXES) and scan.path.is_file():
            return 4 * len(files) * math.prod(read_grid(scan.path, spacing_scale=1).array.shape)
        listed = [file for path in files for file in (path.iterdir() if path.is_dir() else [path])]
        # Compressed CT takes about two bytes a voxel or less.
        return 4 * sum(file.stat().st_size for file in listed)
    except (DatasetError, OSError):
        return 0
