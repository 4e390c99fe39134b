"""The folds of a cross-validation on several GPUs of one host: a process for each fold, a GPU for each process.

A fold then trains as on a single GPU, with the batch that was planned for one. Every process is `train --fold`.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from mambahome_jax.datasets.prepared import detect
from mambahome_jax.errors import MambaHomeError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing.plan import follow_plan, is_given
from mambahome_jax.preprocessing.plan_folder import planned_settings
from mambahome_jax.support.console import duration, say
from mambahome_jax.support.output_folder import locked
from mambahome_jax.support.paths import local_path
from mambahome_jax.support.processes import end_with_parent
from mambahome_jax.training.distributed import launched_as_several
from mambahome_jax.training.folds import networks_of, rounds_of
from mambahome_jax.training.progress import train_line
from mambahome_jax.training.runs import SIGNALLED, run_folder, run_training

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Seconds between two looks at the processes.
_PAUSE = 0.2


def wants_side_by_side(flags: TrainConfig, gpus: Sequence[str]) -> bool:
    """Whether the folds of a command get a GPU each: where there are several, and no flag says what to do with them."""
    asked = is_given(flags, "num_devices", "parallel", "strategy", "num_processes", "coordinator_address")
    several = flags.folds is not None and flags.fold is None and len(gpus) > 1
    return several and not asked and not launched_as_several(os.environ) and detect(local_path(flags.data_train))


def train_side_by_side(flags: TrainConfig, gpus: Sequence[str], console: Console, started: float) -> int:
    """Train the folds that have not ended, as many at a time as there are GPUs, and pool their scores; the exit code.

    gpus: names as CUDA_VISIBLE_DEVICES takes them. JAX must not have been started in this process.
    Raises MambaHomeError before anything is trained.
    """
    plan = planned_settings(flags)
    planned = follow_plan(flags, plan.settings, plan.machine)
    if flags.max_minutes is None and planned.max_minutes is not None:  # those that are planned for folds in turn
        flags = replace(flags, max_minutes=planned.max_minutes / flags.networks * rounds_of(flags.networks, len(gpus)))
    folder = run_folder(planned)
    networks = networks_of(flags, folder, len(gpus))
    waiting = deque(replace(network.flags, output_dir=folder, resume=True) for network in networks)
    free, running = deque(gpus), dict[int, tuple[str, BaseProcess]]()
    codes: list[int] = []
    with locked(folder, "train"), forwarded_signals(lambda: [each for _, each in running.values()]) as received:
        while running or (waiting and not (received or any(map(_stops, codes)))):
            if waiting and free and not (received or any(map(_stops, codes))):
                fold, gpu = waiting.popleft(), free.popleft()
                assert fold.fold is not None
                # The time of the first ones is that of the command.
                begun = started if len(codes) + len(running) < len(gpus) else time.monotonic()
                running[fold.fold] = gpu, _start(fold, gpu, begun)
                say(console, f"Fold {fold.fold} on GPU {gpu}; see {networks[fold.fold].folder / 'log.txt'}")
                continue
            time.sleep(_PAUSE)
            for number, (gpu, process) in [*running.items()]:
                if process.exitcode is not None:
                    del running[number]
                    free.append(gpu)
                    codes.append(process.exitcode if process.exitcode >= 0 else SIGNALLED - process.exitcode)
                    after = duration(time.monotonic() - started)
                    say(console, f"Fold {number} ended with exit code {codes[-1]}, {after} after the start")
    if received or any(map(_stops, codes)):
        say(console, f"Next, to continue: {train_line(flags, resume=True)}")
        return SIGNALLED + received[0] if received else max(filter(_stops, codes))
    # All have ended but those that stopped themselves, which go on here and say why.
    os.environ[VISIBLE] = gpus[0]
    return run_training(replace(flags, resume=True), console, started, len(gpus)).exit_code


def _stops(code: int) -> bool:
    """Whether no other fold is begun after one with this exit code: it was refused, or stopped by a signal."""
    return code == 2 or code > SIGNALLED


def _start(flags: TrainConfig, gpu: str, begun: float) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=train_fold_quietly, args=(flags, begun))
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = gpu
    try:
        process.start()
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before
    return process


def train_fold_quietly(flags: TrainConfig, started: float) -> None:
    """Train a fold and exit, in a process of its own that says nothing but errors: log.txt has the rest."""
    end_with_parent()
    with Path(os.devnull).open("w") as nowhere:
        try:
            code = run_training(flags, Console(file=nowhere), started).exit_code
        except MambaHomeError as error:
            print(f"Error: fold {flags.fold}: {error}", file=sys.stderr, flush=True)
            code = 2
    sys.exit(code)


@contextlib.contextmanager
def forwarded_signals(processes: Callable[[], Iterable[BaseProcess]]) -> Iterator[list[int]]:
    """Hand SIGTERM and SIGINT on to the processes, which write a checkpoint; gives those that came."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        for process in processes():
            process.terminate()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
