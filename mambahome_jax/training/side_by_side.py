"""Trainings side by side on the GPUs of one host, each in a process of its own: folds, and those of a duel.

A training then has one GPU, or a share of it, and the batch that was planned for one.
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
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from rich.console import Console

from mambahome_jax.datasets.prepared import detect
from mambahome_jax.errors import MambaHomeError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing.plan import is_given
from mambahome_jax.support.console import duration, protect_output, say
from mambahome_jax.support.devices import SHARE_VARIABLES, jax_share
from mambahome_jax.support.output_folder import locked
from mambahome_jax.support.paths import local_path
from mambahome_jax.support.processes import end_with_parent, environment
from mambahome_jax.training.contestants import as_planned
from mambahome_jax.training.distributed import launched_as_several
from mambahome_jax.training.folds import networks_of, rounds_of
from mambahome_jax.training.progress import train_line
from mambahome_jax.training.runs import SIGNALLED, run_folder, run_training

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Seconds between two looks at the processes.
_PAUSE = 0.2


class Job(NamedTuple):
    """A training to be done.

    title: said when it begins. name: said when it ends. log: the file that has what it says. begun: time.monotonic()
    from which its minutes count; None: when it begins.
    """

    title: str
    name: str
    flags: TrainConfig
    log: Path
    begun: float | None = None


class Slot(NamedTuple):
    """A place for a training: the GPU, as CUDA_VISIBLE_DEVICES names it, and the part of its memory; None: all of it.

    gpu: "" for whatever devices there are.
    """

    gpu: str
    memory: float | None = None


class Running(NamedTuple):
    """A training in a process of its own, which sends a message when it ends: why it was refused, or ""."""

    job: Job
    slot: Slot
    process: BaseProcess
    receiver: Connection

    def message(self) -> str:
        """Of a process that has ended."""
        try:
            return str(self.receiver.recv()) if self.receiver.poll() else ""
        except EOFError:
            return ""


def slots_of(gpus: Sequence[str], at_once: int = 1) -> list[Slot]:
    """Places for `at_once` trainings on each GPU, or on a CPU; the first ones on different GPUs."""
    memory = jax_share() / at_once if at_once > 1 else None
    return [Slot(gpu, memory) for _ in range(at_once) for gpu in gpus or [""]]


def run_jobs(
    waiting: deque[Job],
    slots: Sequence[Slot],
    console: Console,
    ended: Callable[[Job, int, str], None],
    started: float,
    loud: bool = False,
) -> int | None:
    """Begin each job as soon as a place is free, until all have ended; the signal that ended them before, or None.

    waiting: `ended` may change it. ended: told job, exit code and message of each that no signal to this process ended;
    an exception in it ends the others. loud: jobs say themselves what they do; else a line as each begins and ends.
    """
    free, running = list(slots), list[Running]()
    with forwarded_signals(lambda: [each.process for each in running]) as received:
        try:
            while running or (waiting and not received):
                if waiting and free and not received:
                    busy = [each.slot.gpu for each in running]
                    slot = min(free, key=lambda slot: busy.count(slot.gpu))
                    free.remove(slot)
                    job = waiting.popleft()
                    say(console, job.title + ("" if loud else f"{_place(slot)}; see {job.log}"))
                    running.append(_start(job, slot, loud))
                    if received:
                        running[-1].process.terminate()
                    continue
                time.sleep(_PAUSE)
                for each in [*running]:
                    if each.process.exitcode is not None:
                        running.remove(each)
                        free.append(each.slot)
                        code = each.process.exitcode
                        code = code if code >= 0 else SIGNALLED - code
                        if not loud:
                            said = f"ended with exit code {code}, {duration(time.monotonic() - started)} after"
                            say(console, f"{each.job.name} {said} the start{_others(running, waiting)}")
                        if not received:
                            ended(each.job, code, each.message())
        finally:
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.join()
    return received[0] if received else None


def _place(slot: Slot) -> str:
    return f" on GPU {slot.gpu}" if slot.gpu else ""


def _others(running: Sequence[Running], waiting: Sequence[Job]) -> str:
    names = ", ".join(each.job.name + _place(each.slot) for each in running)
    return (f". In progress: {names}" if names else "") + (f"; waiting: {len(waiting)}" if names and waiting else "")


def _start(job: Job, slot: Slot, loud: bool) -> Running:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    begun = time.monotonic() if job.begun is None else job.begun
    process = context.Process(target=train_apart, args=(job.flags, begun, loud, sender))
    # JAX refuses both variables of the share.
    share = next((name for name in SHARE_VARIABLES if os.environ.get(name)), SHARE_VARIABLES[-1])
    variables = {VISIBLE: slot.gpu} if slot.gpu else {}
    variables |= {share: f"{slot.memory:.3f}"} if slot.gpu and slot.memory else {}
    with environment(variables), _no_main_module():
        process.start()
    sender.close()
    return Running(job, slot, process, receiver)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep a process that starts meanwhile from running the script anew that began this without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def train_apart(flags: TrainConfig, begun: float, loud: bool, sender: Connection) -> None:
    """Train and exit, in a process of its own that says nothing unless it is loud: log.txt has it all.

    What to type next is for the command to say that began it.
    """
    end_with_parent()
    protect_output()
    message = ""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        try:
            console = Console() if loud else Console(file=nowhere)
            code = run_training(flags, console, begun, advise=False).exit_code
        except MambaHomeError as error:
            code, message = 2, str(error)
    sender.send(message)
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


# --- Folds -----------------------------------------------------------------------------------------------------------


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
    planned = as_planned(flags)
    if flags.max_minutes is None and planned.max_minutes is not None:  # those that are planned for folds in turn
        flags = replace(flags, max_minutes=planned.max_minutes / flags.networks * rounds_of(flags.networks, len(gpus)))
    folder = run_folder(planned)
    waiting, codes = deque[Job](), list[int]()
    for number, network in enumerate(networks_of(flags, folder, len(gpus))):
        fold, log = replace(network.flags, output_dir=folder, resume=True), network.folder / "log.txt"
        # The time of the first ones is that of the command.
        begun = started if number < len(gpus) else None
        waiting.append(Job(f"Fold {fold.fold}", f"Fold {fold.fold}", fold, log, begun))

    def ended(job: Job, code: int, message: str) -> None:
        codes.append(code)
        if message:
            print(f"Error: {job.name}: {message}", file=sys.stderr, flush=True)
        if code == 2 or code > SIGNALLED:  # refused, or stopped by a signal
            waiting.clear()

    with locked(folder, "train"):
        received = run_jobs(waiting, slots_of(gpus), console, ended, started)
    stopped = [code for code in codes if code == 2 or code > SIGNALLED]
    if received or stopped:
        say(console, f"Next, to continue: {train_line(flags, resume=True)}")
        return SIGNALLED + received if received else max(stopped)
    # All have ended but those that stopped themselves, which go on here and say why.
    os.environ[VISIBLE] = gpus[0]
    return run_training(replace(flags, resume=True), console, started, len(gpus)).exit_code
