"""The training loop: batches in, checkpoints and metrics out; stops on request and on numbers that are not finite."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mambahome_jax.errors import TrainingError
from mambahome_jax.training.checkpoints import CheckpointWriter
from mambahome_jax.training.distributed import Votes, gather
from mambahome_jax.training.progress import Display, MetricsLog, duration
from mambahome_jax.training.sharding import put_batch
from mambahome_jax.training.step import Batch, TrainState

Metrics = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Validation:
    """Mean Dice over structures, nan where no case had any, and that of each structure."""

    dice: float
    structures: Mapping[str, float]
    failures: tuple[tuple[str, str], ...] = ()


# (params, asked to stop?) -> result, or None where it was interrupted
Validate = Callable[[Any, Callable[[], bool]], Validation | None]


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps. `validated_until`: the step up to which a resumed run has been validated.

    keep_last: checkpoints kept beside the best.
    """

    total_steps: int
    steps_per_epoch: int
    val_every: int
    checkpoint_every: int | None = None
    validated_until: int = 0
    keep_last: int = 1

    def validates(self, step: int) -> bool:
        return step % self.val_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return self.validates(step) or bool(self.checkpoint_every and step % self.checkpoint_every == 0)


@dataclass
class Progressed:
    """Where a run is: what config.json of its checkpoints tells beside the configuration."""

    step: int = 0
    best: dict[str, Any] | None = None
    validated_until: int = 0
    last_loss: float | None = None
    last_validation: Validation | None = None
    failures: dict[str, str] = field(default_factory=dict)
    signal: int | None = None


@dataclass(frozen=True)
class Parts:
    """What the loop drives. `config`: entries for config.json of each checkpoint. `validate`: None to go without."""

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    mesh: Mesh
    case_ids: Sequence[str]
    validate: Validate | None
    folder: Path
    config: Mapping[str, Any]
    log: MetricsLog
    display: Display


@dataclass(frozen=True)
class _Fetched:
    arrays: Batch
    cases: tuple[str, ...]
    state_after: dict[str, Any]


@dataclass(frozen=True)
class _Running:
    step: int
    metrics: Metrics
    cases: tuple[str, ...]


def train(state: TrainState, batches: Iterator, parts: Parts, plan: Plan, progressed: Progressed) -> TrainState:
    """Train from `state` to plan.total_steps, or until SIGTERM or SIGINT (progressed.signal then says which).

    Args:
        batches: endless iterator of {"image", "label", "case"} with get_state(), which stands after `progressed.step`
            batches; the caller closes it.
        progressed: changed in place.

    Checkpoints: RUN/checkpoints/last after each validation, every plan.checkpoint_every steps and on a stop;
    RUN/checkpoints/best, parameters alone, after the best validation (after each one, where there is no score).
    Raises TrainingError when loss, gradient or update is no longer finite, with step and cases of that batch; the
    checkpoints before stay. OutputError when a checkpoint cannot be written.
    """
    with CheckpointWriter() as writer, _StopOnSignal(parts.display, parts.mesh) as stop:
        run = _Run(parts, plan, progressed, writer, stop)
        if progressed.step and plan.validates(progressed.step) and progressed.validated_until < progressed.step:
            # The run before was stopped between this step and its validation.
            run.validate(state)
        fetched = run.fetch(batches) if progressed.step < plan.total_steps else None
        running: _Running | None = None
        unsaved: _Fetched | None = None
        while fetched is not None and not stop.requested():
            step = progressed.step + 1
            with jax.transfer_guard("disallow"):
                state, metrics = parts.train_step(state, fetched.arrays)
            done, fetched = fetched, None
            if step < plan.total_steps and not stop.requested():
                # While the device works on this step; the state of the iterator is kept with each batch for that.
                fetched = run.fetch(batches)
            run.finish(running)
            stop.agree()
            progressed.step, running, unsaved = step, _Running(step, metrics, done.cases), done
            if plan.saves(step):
                row = run.finish(running, write=False)
                run.write(row, run.validate(state) if plan.validates(step) else None)
                run.save_last(state, done.state_after)
                running = unsaved = None
        run.finish(running)
        if unsaved is not None:
            run.save_last(state, unsaved.state_after)
        progressed.signal = stop.requested()
    return state


class _Run:
    """The steps of `train` that need its parts."""

    def __init__(
        self, parts: Parts, plan: Plan, progressed: Progressed, writer: CheckpointWriter, stop: "_StopOnSignal"
    ):
        self.parts, self.plan, self.progressed, self.writer, self.stop = parts, plan, progressed, writer, stop
        self.begun = time.perf_counter()

    def fetch(self, batches: Iterator) -> _Fetched:
        """The next batch, on its way to the devices, with the iterator's state after it."""
        batch = dict(next(batches))
        indices = np.asarray(batch.pop("case"))
        cases = tuple(self.parts.case_ids[index] for index in indices)
        return _Fetched(put_batch(batch, self.parts.mesh), cases, batches.get_state())  # type: ignore[attr-defined]

    def finish(self, running: _Running | None, write: bool = True) -> dict[str, Any]:
        """Wait for a step and check it. Its values are written at once, unless a validation is to join them."""
        if running is None:
            return {}
        values = {name: float(value) for name, value in jax.device_get(running.metrics).items()}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            cases = [case for share in gather(running.cases) for case in share]
            raise TrainingError(
                f"step {running.step}: {', '.join(wrong)}; cases of this batch: {', '.join(cases)}. Stopped; "
                "the checkpoints before it are kept. Look at these cases, or use a lower --lr or --precision fp32"
            )
        rate = self.parts.display.tick(running.step)
        self.progressed.last_loss = values["loss"]
        self.parts.display.update(running.step, values["loss"], rate)
        row = {
            "step": running.step,
            "epoch": (running.step - 1) // self.plan.steps_per_epoch + 1,
            "images_per_second": rate,
            "seconds": time.perf_counter() - self.begun,
            **values,
        }
        if write:
            self.write(row, None)
        return row

    def write(self, row: dict[str, Any], validation: Validation | None) -> None:
        """Into metrics.csv and TensorBoard, flushed when a validation is with it."""
        if validation is None:
            self.parts.log.write(row)
            return
        extra = {f"val_dice/{name}": value for name, value in validation.structures.items() if math.isfinite(value)}
        self.parts.log.write(row | {"val_dice": _finite(validation.dice)}, extra)
        self.parts.log.flush()

    def validate(self, state: TrainState) -> Validation | None:
        """Validate, and write `best` where that is the best so far. None without cases, and when interrupted."""
        display, step = self.parts.display, self.progressed.step
        validation = None
        if self.parts.validate is not None:
            begun = time.perf_counter()
            validation = self.parts.validate(state.params, self.stop.noticed)
            self.stop.agree(at_once=True)
            display.pause()
            if validation is None:
                return None
            display.say(
                f"step {step}: validation Dice {validation.dice:.4f} ({_structures(validation)}) "
                f"in {duration(time.perf_counter() - begun)}"
            )
            self.progressed.last_validation = validation
            self.progressed.failures.update(validation.failures)
        self.progressed.validated_until = step
        score = None if validation is None else _finite(validation.dice)
        best = self.progressed.best
        if best is None or best["val_dice"] is None or (score is not None and score > best["val_dice"]):
            self.progressed.best = {"step": step, "val_dice": score}
            self.writer.save(self.parts.folder / "best", state, self._config())
        return validation

    def save_last(self, state: TrainState, data: dict[str, Any]) -> None:
        # A run that is killed goes on from this checkpoint, and the metrics up to it have to be there.
        self.parts.log.flush()
        self.writer.save(self.parts.folder / "last", state, self._config(), data, self.plan.keep_last)

    def _config(self) -> dict[str, Any]:
        step = self.progressed.step
        return {
            **self.parts.config,
            "step": step,
            "epoch": step // self.plan.steps_per_epoch,
            "best": self.progressed.best,
            "validated_until": self.progressed.validated_until,
        }


class _StopOnSignal(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT, so that the step is finished and a checkpoint written; the second SIGINT interrupts.

    Several processes stop after the same step, whichever of them was asked to: each step they vote.
    """

    def __init__(self, display: Display, mesh: Mesh):
        self.received: int | None = None
        self._decided: int | None = None
        self._votes = Votes(mesh) if jax.process_count() > 1 else None
        self._display = display
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopOnSignal":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noticed(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def requested(self) -> int | None:
        """The signal to stop for, None for none: the same answer in every process."""
        return self.received if self._votes is None else self._decided

    def agree(self, at_once: bool = False) -> None:
        """Take part in a vote; without `at_once` its result counts from the next one on, when it is there anyway."""
        if self._votes is not None and self._decided is None:
            vote = self._votes.settle if at_once else self._votes.cast
            self._decided = vote(self.received or 0) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._display.say(f"{signal.Signals(number).name}: finishing this step and writing a checkpoint")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _structures(validation: Validation) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in validation.structures.items())
