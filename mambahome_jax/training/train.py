"""The training of one network, to be read downwards: data, network, state, step, validation, loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from mambahome_jax.errors import TrainingError
from mambahome_jax.imaging.normalisation import normalisations
from mambahome_jax.model.networks import make_network
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store
from mambahome_jax.recipes import AugmentationConfig
from mambahome_jax.support.console import say
from mambahome_jax.support.files import jsonable
from mambahome_jax.support.processes import fitting_workers
from mambahome_jax.training.callbacks import Callback, following, run_files
from mambahome_jax.training.checkpoints import CheckpointWriter, checkpoint_settings, recorded_cases, restore_state
from mambahome_jax.training.disk import require_disk, shared_batch_bytes
from mambahome_jax.training.distributed import (
    StopOnSignal,
    device_put_tree,
    gather,
    is_first,
    make_mesh,
    on_host,
    own_device,
    put_batch,
    replicated,
)
from mambahome_jax.training.held_out import FOLDER as VALIDATION
from mambahome_jax.training.held_out import forget_scores, score_held_out
from mambahome_jax.training.losses import DeepSupervision, recipe_loss
from mambahome_jax.training.memory import StepMemory, device_memory_errors, require_fit, step_memory
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.pretrained import Transfer, transfer
from mambahome_jax.training.progress import Display
from mambahome_jax.training.schedule import Clock, Due, Schedule, Timeline
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.step import (
    Batch,
    TrainState,
    TrainStep,
    abstract_batch,
    abstract_state,
    compile_step,
    deployed_params,
    init_state,
    make_train_step,
    with_seed,
)
from mambahome_jax.training.validation import (
    Validate,
    Validation,
    finite_or_none,
    open_validation,
    validation_steps,
)
from mambahome_jax.weights.weights import read_weights

# Compiled steps by all that differs between the networks of one command. JAX's own cache would not know one again, as
# Pallas numbers the kernels of a process.
Programs = dict[tuple[nnx.GraphDef, AugmentationConfig | None, tuple[tuple[str, Any], ...]], TrainStep]


def train_network(
    setup: Setup,
    folder: Path,
    earlier: Mapping[str, Any] | None,
    devices: Sequence[jax.Device],
    clock: Clock,
    programs: Programs,
    console: Console,
    begin: Callable[[Schedule, int, Transfer | None], None],
    callbacks: Sequence[Callback] = (),
) -> "TrainingRun":
    """Train one network in `folder`; how far it came, and what stopped it, is in the result.

    earlier: config.json of the last checkpoint, to go on from that; None for a new run. begin: called with schedule,
    number of parameters and what was transferred, once the weights are accepted (else CheckpointError). Raises
    DeviceMemoryError: the step does not fit, or a device ran out of memory before the first checkpoint.
    """
    flags, recipe, timeline = setup.flags, setup.recipe, Timeline(clock.started)

    # --- Network and optimizer -----------------------------------------------------------------------------------
    mesh, optimizer = make_mesh(list(devices)), make_optimizer(setup.schedule.optimizer)
    graphdef, trained_graphdef, params, transferred = build_networks(setup, new=earlier is None)
    abstract = abstract_state(params, optimizer, recipe.ema_decay > 0)

    # --- State: new, or from the last checkpoint -----------------------------------------------------------------
    if earlier is None:
        state, position = init_state(params, optimizer, mesh, flags.strategy, recipe.ema_decay > 0), None
    else:
        params = None  # or they lie in the device's memory beside the state
        state, position = restore_state(folder / "checkpoints" / "last", abstract, mesh, flags.strategy)
    del params

    # --- Schedule ------------------------------------------------------------------------------------------------
    schedule = dataclasses.replace(setup.schedule, budget=clock.budget(earlier))
    schedule.budget.held_out = len(setup.held_out) / max(len(setup.val_cases), 1)
    schedule.budget.validation_steps = validation_steps(setup)
    due = schedule.after(int(state.step))  # now, as a run of little time is to take a step after it has compiled
    say(console, require_disk(folder, setup, abstract, ended=due.stop))
    begin(schedule, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params)), transferred)

    with contextlib.ExitStack() as stack:
        # --- Step and validation, compiled -----------------------------------------------------------------------
        display = stack.enter_context(Display(console, schedule, int(state.step), setup.global_batch))
        batches = stack.enter_context(open_batches(setup, position, display.say, ahead=not due.stop))
        validation = partial(open_validation, graphdef, deployed_params(state), setup, devices, display.say)
        program = (setup, trained_graphdef, optimizer, mesh, programs, state, display, timeline, validation)
        train_step, compiled = (None, {"validate": validation()}) if due.stop else compiled_step(*program)

        # --- The loop --------------------------------------------------------------------------------------------
        run = TrainingRun.resumed(
            earlier or {},
            folder=folder / "checkpoints",
            settings=checkpoint_settings(setup, transferred.trained_on if transferred else recorded_cases(earlier)),
            schedule=schedule,
            display=display,
            mesh=mesh,
            case_ids=setup.train_cases,
            labelled=setup.labelled,
            keep_last=flags.keep_last,
            due=due,
            keeps_best=flags.folds is None,
            timeline=timeline,
            **compiled,
        )
        if is_first():
            if earlier is None:
                forget_scores(folder / VALIDATION)
            stack.enter_context(followed(run, folder, setup, callbacks))
        try:
            train(state, batches, train_step, run)
        except TrainingError as error:
            run.error = str(error)
        del state

        # --- Scores of the cases held out ------------------------------------------------------------------------
        if run.error is None and run.signal is None and setup.held_out:
            timeline.begin("held_out")
            with StopOnSignal(display.say, mesh, "finishing this case") as run.stop:
                score_held_out(folder, setup, run, graphdef, own_device(devices))
    return run


def followed(
    run: "TrainingRun", folder: Path, setup: Setup, callbacks: Sequence[Callback]
) -> contextlib.AbstractContextManager[None]:
    """Tell of the run: the files of its folder, then the terminal, then the callbacks of the caller."""
    structures = tuple(setup.structures.values()) if setup.val_cases else ()
    run.callbacks = [*run_files(structures, run.display.say), run.display, *callbacks]
    settings = jsonable({**dataclasses.asdict(setup.flags), "network": setup.model.to_json()})
    return following(run.callbacks, folder, settings, run.step, lambda: run.status)


# --- Data --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_batches(
    setup: Setup, position: dict[str, Any] | None, say: Callable[[str], None], ahead: bool
) -> Iterator[Any]:
    """Open the training batches from `position` on; closed at the end, or their threads and processes would live on.

    ahead: begin to read before the first is asked for.
    """
    workers = fitting_workers(setup.num_workers, shared_batch_bytes(setup))
    if workers.why_fewer:
        say(f"Note: {workers.why_fewer}")
    loader = make_loader(
        Store(setup.prepared.store),
        setup.train_cases,
        setup.patch_size,
        setup.global_batch,
        seed=setup.flags.seed,
        num_workers=workers.count,
        positive_fraction=setup.recipe.positive_fraction,
        class_balanced=setup.recipe.class_balanced,
        normalise=normalisations(setup.properties.ct_normalisation, setup.flags.modality),
        share=(jax.process_index(), jax.process_count()),
    )
    iterator = iter(loader)
    try:
        if position is not None:
            iterator.set_state(position)
        if ahead:
            iterator.start_prefetch()
        yield iterator
    finally:
        iterator.close()


# --- Network -----------------------------------------------------------------------------------------------------


def build_networks(setup: Setup, new: bool) -> tuple[nnx.GraphDef, nnx.GraphDef, Any, Transfer | None]:
    """The network's structure, that of what is trained (with heads for deep supervision), and the latter's parameters.

    new: start from --use_pretrained, whose account comes last; else the run goes on with parameters of its own.
    Raises CheckpointError where the weights to start from are of another network.
    """
    seed, source, transferred = setup.flags.seed, setup.flags.use_pretrained, None
    # Not traced by nnx.eval_shape where values are not needed: that takes longer than to draw them.
    with on_host():
        model = make_network(setup.model, rngs=nnx.Rngs(seed), precision=setup.precision, metadata=setup.properties)
    graphdef, params = _split(model)
    if new and source not in ("", "False"):
        params, transferred = transfer(read_weights(source), params, setup.model, setup.properties, source)
        model = nnx.merge(graphdef, params)
    if not setup.recipe.deep_supervision:
        return graphdef, graphdef, params, transferred
    with on_host():
        trained = DeepSupervision(model, rngs=nnx.Rngs(seed + 1), precision=setup.precision)
    return graphdef, *_split(trained), transferred


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


# --- Step --------------------------------------------------------------------------------------------------------


def compiled_step(
    setup: Setup,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    programs: Programs,
    state: TrainState,
    display: Display,
    timeline: Timeline,
    validation: Callable[..., Validate | None],
) -> tuple[TrainStep, dict[str, Any]]:
    """The training step with this network's seed, of the programs or compiled and added to them, and of TrainingRun:
    its memory, the seconds that it took, and what `validation`, open_validation of its last argument, gives.

    Raises DeviceMemoryError: it does not fit.
    """
    flags, recipe = setup.flags, setup.recipe
    image = (setup.global_batch, *setup.patch_size, setup.model.in_chans)
    batch = abstract_batch(image, None if setup.labelled is None else setup.model.out_chans, mesh)
    program, begun = (graphdef, setup.augmentation, tuple(batch.items())), time.perf_counter()
    if program not in programs:
        display.state("Compiling")
        display.say("Compiling the training step, once; the first step follows")
        train_step = make_train_step(
            *(graphdef, optimizer, recipe_loss(recipe), mesh, flags.seed),
            *(setup.augmentation, flags.strategy, recipe.ema_decay, flags.freeze_encoder, recipe.dropout),
        )
        with timeline.doing("compile"):
            programs[program], validate = compile_step(train_step, state, batch, mesh, meanwhile=validation)
    else:
        validate = validation()
    memory = step_memory(programs[program], state, mesh)
    require_fit(memory, setup)
    seconds = round(time.perf_counter() - begun, 1)
    parts = {"memory": memory, "compile_seconds": seconds, "validate": validate}
    return with_seed(programs[program], flags.seed, mesh), parts


# --- Loop --------------------------------------------------------------------------------------------------------


def train(state: TrainState, batches: Iterator, train_step: TrainStep | None, run: "TrainingRun") -> TrainState:
    """Train from `state` until the schedule ends, or SIGTERM or SIGINT comes, which `run.signal` then names.

    `batches`, endless {"image", "label", "case"} with get_state(), stand after `run.step` of them; the caller closes
    them. `last` is written after each validation, every --checkpoint_every steps and on a stop; `best`, parameters
    alone, after the best validation (after each one, where there is no score). Raises TrainingError: loss, gradient or
    update is no longer finite, or a device has no memory left; the checkpoints before stay. OutputError: something
    cannot be written.
    """
    writer, stop = CheckpointWriter(), StopOnSignal(run.display.say, run.mesh)
    run.timeline.begin("training")
    with device_memory_errors(lambda: run.saved), writer as run.writer, stop as run.stop:
        # The run before may have been stopped between its last step and the validation of that.
        overdue = run.step and run.schedule.validates(run.step) and run.validated_until < run.step
        if overdue:
            run.validate_and_keep_best(state)
        due, saved = run.due or run.schedule.after(run.step), run.step
        ended = due.stop
        while not due.stop and (batch := run.fetch(batches)) is not None:
            rate = device_put_tree(np.float32(due.rate), replicated(run.mesh))
            assert train_step is not None
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch, rate)
            # The step before; the devices work on this one meanwhile.
            run.log_step()
            run.step_started(metrics)
            run.stop.agree()
            due = run.schedule.after(run.step)
            if due.save:
                run.log_step(state if due.validate else None)
                run.save_last(state)
                saved, ended = run.step, due.stop
                due = run.schedule.after(run.step)
        run.log_step()
        if run.step > saved or due.stop > ended:  # a checkpoint of the end says so
            run.save_last(state)
        run.signal = run.stop.requested()
        run.timeline.begin("checkpoints")  # which are being written
    return state


@dataclass
class TrainingRun:
    """A run under way: what its loop drives, and how far it is.

    folder: of the checkpoints; settings: entries of their config.json. validated_until: the step up to which that is
    done. due: before its first step, where that was decided already. error: why it ended before its time. saved:
    whether it has written a checkpoint. memory, compile_seconds: of its step, where it has one. held_out: the summary
    of the scores of the cases held out. keeps_best: whether validations choose `best`; else it is the last validated.
    seconds: of the processes that trained it before, up to the checkpoint it goes on from where that was killed.
    """

    folder: Path
    settings: Mapping[str, Any]
    schedule: Schedule
    display: Display
    mesh: Mesh
    case_ids: Sequence[str]
    labelled: np.ndarray | None = None
    callbacks: Sequence[Callback] = ()
    validate: Validate | None = None
    keep_last: int = 1
    due: Due | None = None
    memory: StepMemory | None = None
    compile_seconds: float | None = None
    keeps_best: bool = True
    timeline: Timeline = field(default_factory=Timeline)
    step: int = 0
    best: dict[str, Any] | None = None
    validated_until: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation: Validation | None = None
    failures: dict[str, str] = field(default_factory=dict)
    signal: int | None = None
    error: str | None = None
    saved: bool = False
    held_out: Mapping[str, Any] | None = None
    writer: CheckpointWriter = field(init=False)
    stop: StopOnSignal = field(init=False)
    _pending: dict[str, jax.Array] | None = None
    _cases: Sequence[str] = ()
    _next_cases: Sequence[str] = ()
    _position: dict[str, Any] = field(default_factory=dict)
    _begun: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _step_ended: float = field(default_factory=time.perf_counter)

    @classmethod
    def resumed(cls, config: Mapping[str, Any], **parts: Any) -> "TrainingRun":
        """A run that goes on from the checkpoint with this config.json; a new one where that is empty."""
        kept = ("step", "best", "validated_until", "seconds")
        return cls(**parts, **{name: config[name] for name in kept if name in config})

    @property
    def status(self) -> str:
        """How it ended, if it has ended."""
        return self.error or ("finished" if self.signal is None else "stopped by a signal")

    def fetch(self, batches: Iterator) -> Batch | None:
        """Start the transfer of the next batch; None where the run is to stop, also since this was called."""
        if self.stop.requested():
            return None
        begun = time.perf_counter()
        batch = dict(next(batches))
        if self._pending is not None and self._pending["loss"].is_ready():  # type: ignore[attr-defined]
            # The devices had nothing more to do when the batch came: at most so long.
            self._waited += time.perf_counter() - begun
        indices = np.asarray(batch.pop("case"))
        if self.labelled is not None:
            batch["labelled"] = self.labelled[indices]
        arrays = put_batch(batch, self.mesh)
        if self.stop.requested():
            return None
        self._position, self._next_cases = batches.get_state(), [self.case_ids[n] for n in indices]  # type: ignore
        return arrays

    def step_started(self, metrics: dict[str, jax.Array]) -> None:
        """Note that the devices have been given the batch that was fetched last."""
        self.step += 1
        self._pending, self._cases = metrics, self._next_cases

    def log_step(self, state: TrainState | None = None) -> None:
        """Wait for the step that was started last, check it, and tell of it; with `state` validate that then."""
        if self._pending is None:
            return
        row = self._finish_step(self._pending)
        self._pending = None
        for callback in self.callbacks:
            callback.step(row)
        if state is not None:
            self.validate_and_keep_best(state)

    def _finish_step(self, metrics: dict[str, jax.Array]) -> dict[str, Any]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            all_cases = [case for share in gather(self._cases) for case in share]
            raise TrainingError(
                f"step {self.step}: {', '.join(wrong)}; cases of this batch: {', '.join(all_cases)}. Stopped; "
                "the checkpoints before it are kept. Look at these cases, or use a lower --lr or --precision fp32"
            )
        self.schedule.budget.step_ended()
        self.loss = values["loss"]
        now = time.perf_counter()
        waiting = self._waited / max(now - self._step_ended, 1e-9)
        self._waited, self._step_ended = 0.0, now
        return {
            "step": self.step,
            "epoch": (self.step - 1) // self.schedule.steps_per_epoch + 1,
            "images_per_second": self.display.tick(self.step),
            "data_wait": waiting,
            "seconds": now - self._begun,
            **values,
        }

    def validate_and_keep_best(self, state: TrainState) -> None:
        """Validate, write `best` where that is the best so far, and tell of it; of nothing without cases."""
        validation = None
        begun = time.perf_counter()
        # Without cases too: the checkpoints that follow need their pause.
        with self.schedule.budget.validating(), self.timeline.doing("validation"):
            if self.validate is not None:
                self.display.state("Validating")
                validation = self.validate(deployed_params(state), self._must_stop)
        if validation is not None:
            self.schedule.budget.expect_validation(validation.seconds_again)
        if self.validate is not None:
            self.stop.agree(at_once=True)
            self.display.pause()
            self.display.state("Training")
            self._waited, self._step_ended = 0.0, time.perf_counter()
            if validation is None:
                if not self.stop.requested():
                    self.display.say("validation given up: the time is nearly over")
                    # `best` is not to be missing at the end.
                    self._keep_best(state, None)
                return
            validation = dataclasses.replace(validation, seconds=time.perf_counter() - begun)
            self.validation = dataclasses.replace(validation, picture=None)
            self.failures.update(validation.failures)
        self.validated_until = self.step
        score = None if validation is None or not self.keeps_best else finite_or_none(validation.dice)
        self._keep_best(state, score)
        if validation is not None:
            for callback in self.callbacks:
                callback.validation(self.step, validation)

    def _must_stop(self) -> bool:
        """Whether a validation is to be given up: a signal came, or the time is up."""
        return self.stop.noticed() or self.schedule.budget.must_save()

    def _keep_best(self, state: TrainState, score: float | None) -> None:
        best = None if self.best is None else self.best["val_dice"]
        if best is None or (score is not None and score > best):
            self.best, self.saved = {"step": self.step, "val_dice": score}, True
            with self.timeline.doing("checkpoints"):
                self.writer.save(self.folder / "best", state, self._config())

    def save_last(self, state: TrainState) -> None:
        """Write `last`; with a time budget wait for it, which tells how long that takes."""
        # A run that is killed goes on from this checkpoint; the callbacks were told of all steps up to it.
        self.saved = True
        with self.schedule.budget.saving(), self.timeline.doing("checkpoints"):
            self.writer.save(self.folder / "last", state, self._config(), self._position, self.keep_last)
            if self.schedule.budget.limited:
                self.writer.wait()

    def _config(self) -> dict[str, Any]:
        return {
            **self.settings,
            "step": self.step,
            "epoch": self.step // self.schedule.steps_per_epoch,
            "best": self.best,
            "validated_until": self.validated_until,
            "seconds": round(self.seconds + sum(self.timeline.to_json().values()), 1),
        } | self.schedule.budget.to_json(self.validated_until == self.step)
