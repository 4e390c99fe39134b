"""train: a preprocessed folder (or the published layout) in, checkpoints, metrics and a report of the run out."""

import time

from rich.console import Console

from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.devices import begin_devices, visible_gpus
from mambahome_jax.training.distributed import exit_all_processes_on_error, is_first, join_processes


def run(config: TrainConfig, started: float | None = None) -> int:
    """Train as `config` says; return the exit code. `started`: time.monotonic() at the start of the program.

    0 done, 1 done but some cases could not be used, or stopped by numbers that are not finite, 128 + n stopped by
    signal n (SIGTERM 143, SIGINT 130) with a checkpoint from which --resume continues. Raises MambaHomeError before
    anything is trained; one of several processes ends itself instead, with exit code 2, and so the others.
    """
    if config.folds:  # in processes of their own, so before this one starts its devices
        from mambahome_jax.training.side_by_side import train_side_by_side, wants_side_by_side

        if wants_side_by_side(config, gpus := visible_gpus()):
            return train_side_by_side(config, gpus, Console(), started or time.monotonic())
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    begin_devices()
    from mambahome_jax.training.runs import run_training  # what it imports takes as long as a GPU takes to start

    console = Console(quiet=not is_first(), force_terminal=None if is_first() else False)
    with exit_all_processes_on_error():
        return run_training(config, console, started).exit_code
