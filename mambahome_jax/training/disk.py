"""Disk space of runs: what a training will take."""

from pathlib import Path

import jax

from mambahome_jax.errors import OutputError
from mambahome_jax.support.disk import bytes_of, free_bytes, said_bytes
from mambahome_jax.support.processes import SHARED_MEMORY, batch_bytes, needed_bytes
from mambahome_jax.training.checkpoints import checkpoint_bytes
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.step import TrainState


def require_disk(run: Path, setup: Setup, state: TrainState) -> list[str]:
    """Say what a run takes, and what is free. state: arrays, or their shapes and dtypes.

    What an earlier part of the run wrote is replaced, so it counts as free. Raises OutputError: no checkpoint fits.
    """
    keep, (best, last) = setup.flags.keep_last, checkpoint_bytes(state)
    # The one before stays until the next is whole.
    kept, most = best + keep * last, best + (keep + 1) * last
    sizes = f"best {said_bytes(best)}, {'last' if keep == 1 else f'{keep} kept of'} {said_bytes(last)}"
    text = f"checkpoints take {said_bytes(kept)} ({sizes}), {said_bytes(most)} while one is written"
    lines, free = [f"Disk: {text}"], free_bytes(run)
    if free is not None:
        free += bytes_of(run / "checkpoints")
        room, action = f"{said_bytes(free)} are free in {run}", "Free some space or name another --output_dir"
        if free < best + last:
            raise OutputError(f"{run / 'checkpoints'}: {text}, but {room}. {action}")
        lines = [f"{lines[0]}; {room}", *([] if free >= most else [f"Note: the disk may get full. {action}"])]
    if setup.num_workers:
        shared = said_bytes(needed_bytes(setup.num_workers, shared_batch_bytes(setup)))
        lines[0] += f"; in {SHARED_MEMORY} up to {shared} for {setup.num_workers} processes that read patches"
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    if cache and "://" not in cache:
        lines[0] += f"; programs compiled before take {said_bytes(bytes_of(Path(cache)))} in {cache}"
    return lines


def shared_batch_bytes(setup: Setup) -> int:
    """Bytes of a batch that the processes of this loader put into shared memory."""
    return batch_bytes(setup.global_batch // jax.process_count(), setup.patch_size, setup.model.in_chans)
