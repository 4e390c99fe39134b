"""Shared memory of the loader's worker processes: what they need, what there is, and how to say that it is too little.

Containers have 64 MB of it unless told otherwise. Where a process writes beyond, the system kills it without a word.
"""

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path("/dev/shm")
# Batches that a worker has in shared memory at most: being made, in its queue, taken out and waiting their turn, being
# freed. Seven were measured.
_BATCHES_A_WORKER = 8
# Batches in use by the training itself, and the locks of the queues.
_BATCHES_IN_USE, _LOCKS = 4, 1 << 20
REMEDY = f"Give {FOLDER} more room (docker run --shm-size=8g; --ipc=host), or use fewer --num_workers; 0 are threads"


@dataclass(frozen=True)
class Workers:
    """How many processes can read patches, and why they are fewer than asked for; empty where they are not."""

    count: int
    why_fewer: str = ""


def needed_bytes(workers: int, batch_bytes: int) -> int:
    """Shared memory that so many processes take at most, for batches of `batch_bytes`."""
    return (_BATCHES_A_WORKER * workers + _BATCHES_IN_USE) * batch_bytes + _LOCKS if workers else 0


def batch_bytes(batch_size: int, patch_size: tuple[int, int, int], channels: int) -> int:
    """Bytes of a batch of the loader: image float32 with its channels, label and case int32."""
    voxels = int(np.prod(patch_size, dtype=np.int64))
    return batch_size * (voxels * (channels + 1) + 1) * 4


def free_bytes() -> int | None:
    """Room in the folder of shared memory; None where the system has none that is limited by itself."""
    try:
        room = os.statvfs(FOLDER)
    except (AttributeError, OSError):
        return None
    return room.f_bavail * room.f_frsize


def why_none() -> str:
    """Why no process can be given work here; empty where it can. Queues need locks in shared memory."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        return f"shared memory ({FOLDER}) cannot be used: {getattr(error, 'strerror', None) or error}"
    return ""


def fitting_workers(wanted: int, size: int) -> Workers:
    """As many of the `wanted` processes as shared memory holds with batches of `size` bytes; 0 where none fits."""
    if wanted == 0:
        return Workers(0)
    if reason := why_none():
        return Workers(0, f"{reason}; patches are read in threads. {REMEDY}")
    free = free_bytes()
    if free is None or needed_bytes(wanted, size) <= free:
        return Workers(wanted)
    fitting = next((count for count in range(wanted - 1, 0, -1) if needed_bytes(count, size) <= free), 0)
    instead = f"{fitting} processes read patches" if fitting else "patches are read in threads"
    need = f"{FOLDER} has {_megabytes(free)} free, {wanted} processes may need {_megabytes(needed_bytes(wanted, size))}"
    return Workers(fitting, f"{need}; {instead}. {REMEDY}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"
