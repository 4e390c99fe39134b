"""The training loop: batches in, checkpoints and metrics out; stops on request and on numbers that are not finite."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mambahome_jax.errors import TrainingError
from mambahome_jax.support.console import duration
from mambahome_jax.training.budget import Decision, TimeBudget
from mambahome_jax.training.checkpoints import CheckpointWriter
from mambahome_jax.training.distributed import gather
from mambahome_jax.training.progress import Display, MetricsLog, Shown, device_memory, dice_table
from mambahome_jax.training.sharding import put_batch, put_tree, replicated
from mambahome_jax.training.step import Batch, TrainState, deployed_params
from mambahome_jax.training.stopping import StopOnSignal

Metrics = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Validation:
    """Mean Dice over structures, nan where no case had any, and that of each structure."""

    dice: float
    structures: Mapping[str, float]
    failures: tuple[tuple[str, str], ...] = ()
    seconds_again: float | None = None
    """How long the same would take once more, where that is known: the first one compiles."""
    picture: np.ndarray | None = None
    """RGB (rows, columns, 3) uint8 of a case, the same one each time."""


# (params, asked to stop?) -> result, or None where it was interrupted
Validate = Callable[[Any, Callable[[], bool]], Validation | None]


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps. `validated_until`: the step up to which a resumed run has been validated.
    keep_last: checkpoints kept beside the best.

    With a budget, `total_steps` is None and the end a matter of time; then `val_every` None leaves the validations to
    the budget too.
    """

    total_steps: int | None
    steps_per_epoch: int
    val_every: int | None
    checkpoint_every: int | None = None
    validated_until: int = 0
    budget: TimeBudget | None = None
    keep_last: int = 1

    def goes_on_after(self, step: int) -> bool:
        return self.total_steps is None or step < self.total_steps

    def validates(self, step: int) -> bool:
        return bool(self.val_every and step % self.val_every == 0) or step == self.total_steps

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
    """What the loop drives. `config`: entries for config.json of each checkpoint. `validate`: None to go without.

    labelled: (cases, classes) bool, the classes that each case's dataset has labels of; None where all have all.
    """

    train_step: Callable[..., tuple[TrainState, Metrics]]
    mesh: Mesh
    case_ids: Sequence[str]
    validate: Validate | None
    folder: Path
    config: Mapping[str, Any]
    log: MetricsLog
    display: Display
    labelled: np.ndarray | None = None


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
    with CheckpointWriter() as writer, StopOnSignal(parts.display, parts.mesh) as stop:
        run = _Run(parts, plan, progressed, writer, stop)
        if progressed.step and plan.validates(progressed.step) and progressed.validated_until < progressed.step:
            # The run before was stopped between this step and its validation.
            run.complete(run.validate(state))
        decision = run.decide()
        fetched = run.fetch(batches) if plan.goes_on_after(progressed.step) and not decision.last else None
        running: _Running | None = None
        unsaved: _Fetched | None = None
        while fetched is not None and not stop.requested():
            step = progressed.step + 1
            timed = run.timed(decision)
            with jax.transfer_guard("disallow"):
                state, metrics = parts.train_step(state, fetched.arrays, *timed)
            run.dispatched = metrics
            done, fetched = fetched, None
            if plan.goes_on_after(step) and not stop.requested():
                # While the device works on this step; the state of the iterator is kept with each batch for that.
                fetched = run.fetch(batches)
            run.finish(running)
            stop.agree()
            progressed.step, running, unsaved = step, _Running(step, metrics, done.cases), done
            decision = run.decide()
            if decision.last:
                fetched = None
            validates = plan.validates(step) or decision.validate or decision.last
            if validates or plan.saves(step):
                row = run.finish(running, write=False)
                run.write(row, run.validate(state) if validates else None)
                run.save_last(state, done.state_after)
                running = unsaved = None
                decision = run.decide()
                fetched = None if decision.last else fetched
        run.finish(running)
        if unsaved is not None:
            run.save_last(state, unsaved.state_after)
        progressed.signal = stop.requested()
    return state


class _Run:
    """The steps of `train` that need its parts."""

    def __init__(
        self, parts: Parts, plan: Plan, progressed: Progressed, writer: CheckpointWriter, stop: "StopOnSignal"
    ):
        self.parts, self.plan, self.progressed, self.writer, self.stop = parts, plan, progressed, writer, stop
        self.begun = self.stepped = time.perf_counter()
        self.waited = 0.0
        self.dispatched: Metrics | None = None

    def decide(self) -> Decision:
        """What the time budget says; without one nothing happens but what the plan says in steps."""
        return Decision(False, False, 0.0) if self.plan.budget is None else self.plan.budget.decide()

    def timed(self, decision: Decision) -> tuple[jax.Array, ...]:
        """The further argument of the training step where the learning rate follows the time."""
        if self.plan.budget is None:
            return ()
        return (put_tree(np.float32(decision.fraction), replicated(self.parts.mesh)),)

    def fetch(self, batches: Iterator) -> _Fetched:
        """The next batch, on its way to the devices, with the iterator's state after it."""
        begun = time.perf_counter()
        batch = dict(next(batches))
        if self.dispatched is not None and self.dispatched["loss"].is_ready():  # type: ignore[attr-defined]
            # The device had nothing more to do when the batch came: at most so long.
            self.waited += time.perf_counter() - begun
        indices = np.asarray(batch.pop("case"))
        cases = tuple(self.parts.case_ids[index] for index in indices)
        if self.parts.labelled is not None:
            batch["labelled"] = self.parts.labelled[indices]
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
        if self.plan.budget is not None:
            self.plan.budget.step_ended()
        rate = self.parts.display.tick(running.step)
        self.progressed.last_loss = values["loss"]
        now = time.perf_counter()
        waiting = self.waited / max(now - self.stepped, 1e-9)
        self.waited, self.stepped = 0.0, now
        memory = device_memory(self.parts.mesh.local_devices)
        self.parts.display.update(running.step, Shown(values["loss"], values["lr"], rate, memory, waiting))
        row = {
            "step": running.step,
            "epoch": (running.step - 1) // self.plan.steps_per_epoch + 1,
            "images_per_second": rate,
            "data_wait": waiting,
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
        else:
            self._with(validation, row, self.parts.log.write)

    def complete(self, validation: Validation | None) -> None:
        """Into the row of a step that an earlier run wrote without its validation."""
        if validation is not None:
            self._with(validation, {"step": self.progressed.step}, self.parts.log.complete)

    def _with(self, validation: Validation, row: dict[str, Any], write: Callable[..., None]) -> None:
        extra = {f"val_dice/{name}": value for name, value in validation.structures.items() if math.isfinite(value)}
        write(row | {"val_dice": _finite(validation.dice)}, extra)
        if validation.picture is not None:
            self.parts.log.picture("validation", validation.picture, row["step"])
        self.parts.log.flush()

    def validate(self, state: TrainState) -> Validation | None:
        """Validate, and write `best` where that is the best so far. None without cases, and when interrupted."""
        display, step, budget = self.parts.display, self.progressed.step, self.plan.budget
        validation, before = None, self.progressed.last_validation
        begun = time.perf_counter()
        # Without cases too: the checkpoints that follow need their pause.
        with contextlib.nullcontext() if budget is None else budget.validating():
            if self.parts.validate is not None:
                validation = self.parts.validate(deployed_params(state), self.must_stop)
        if self.parts.validate is not None:
            self.stop.agree(at_once=True)
            display.pause()
            self.waited, self.stepped = 0.0, time.perf_counter()
            if validation is None:
                self._give_up(state)
                return None
            if budget is not None:
                budget.expect_validation(validation.seconds_again)
            display.say(
                f"step {step}: validation Dice {validation.dice:.4f} in {duration(time.perf_counter() - begun)}\n"
                + dice_table(validation.structures, before.structures if before else None)
            )
            self.progressed.last_validation = dataclasses.replace(validation, picture=None)
            self.progressed.failures.update(validation.failures)
        self.progressed.validated_until = step
        score = None if validation is None else _finite(validation.dice)
        best = self.progressed.best
        if best is None or best["val_dice"] is None or (score is not None and score > best["val_dice"]):
            self.progressed.best = {"step": step, "val_dice": score}
            self.writer.save(self.parts.folder / "best", state, self._config())
        return validation

    def must_stop(self) -> bool:
        """Whether a validation is to be given up: a signal came, or the time is up."""
        return self.stop.noticed() or (self.plan.budget is not None and self.plan.budget.must_save())

    def _give_up(self, state: TrainState) -> None:
        """A validation was given up. Where that was for lack of time, `best` is not to be missing at the end."""
        if not self.stop.requested():
            self.parts.display.say("validation given up: the time is nearly over")
            best = self.progressed.best
            if best is None or best["val_dice"] is None:
                self.progressed.best = {"step": self.progressed.step, "val_dice": None}
                self.writer.save(self.parts.folder / "best", state, self._config())

    def save_last(self, state: TrainState, data: dict[str, Any]) -> None:
        """Write `last`; with a time budget wait for it, which tells how long that takes."""
        # A run that is killed goes on from this checkpoint, and the metrics up to it have to be there.
        self.parts.log.flush()
        with contextlib.ExitStack() as measured:
            if self.plan.budget is not None:
                measured.enter_context(self.plan.budget.saving())
            self.writer.save(self.parts.folder / "last", state, self._config(), data, self.plan.keep_last)
            if self.plan.budget is not None:
                self.writer.wait()

    def _config(self) -> dict[str, Any]:
        step = self.progressed.step
        return {
            **self.parts.config,
            "step": step,
            "epoch": step // self.plan.steps_per_epoch,
            "best": self.progressed.best,
            "validated_until": self.progressed.validated_until,
        } | _time_spent(self.plan.budget)


def _time_spent(budget: TimeBudget | None) -> dict[str, Any]:
    """What a run of a given time has to know of itself to be continued."""
    if budget is None:
        return {}
    return {
        "seconds_in_all": budget.seconds,
        "seconds_spent": budget.spent(),
        "seconds_to_first_step": budget.to_first_step,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
