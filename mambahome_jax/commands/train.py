"""train: a preprocessed folder (or the published layout) in, checkpoints, metrics and a report of the run out."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from mambahome_jax.datasets import prepared as prepared_layout
from mambahome_jax.datasets.prepared import Prepared, read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.splits import with_split_file
from mambahome_jax.datasets.structures import consecutive
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError, TrainingError
from mambahome_jax.flags import PreprocessConfig, TrainConfig
from mambahome_jax.imaging.normalisation import normalisations
from mambahome_jax.model.network import MambaHoME
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.dataset import prepare_dataset
from mambahome_jax.support.console import say, tracked
from mambahome_jax.support.devices import choose_devices, versions
from mambahome_jax.support.files import jsonable
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import local_path, require_letters
from mambahome_jax.support.processes import batch_bytes, fitting_workers
from mambahome_jax.training.budget import TimeBudget
from mambahome_jax.training.checkpoints import check_settings, restore_state
from mambahome_jax.training.data import data_differences, data_summary
from mambahome_jax.training.deep_supervision import DeepSupervision, at_all_levels
from mambahome_jax.training.distributed import ending_together, is_first, join_processes, require_same
from mambahome_jax.training.loop import Parts, Plan, Progressed, train
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.members import SIGNALLED, Shared, holds_run, is_finished, member_folder, run_members
from mambahome_jax.training.mirrors import recorded_mirrors
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.pretrained import transfer
from mambahome_jax.training.progress import Display, MetricsLog, NoLog
from mambahome_jax.training.report import (
    PACKAGES,
    earlier_report,
    new_report,
    say_end,
    say_start,
    scores_of,
    write_report,
)
from mambahome_jax.training.setup import Setup, make_setup, training_settings
from mambahome_jax.training.sharding import make_mesh
from mambahome_jax.training.step import abstract_state, init_state, make_train_step, with_seed
from mambahome_jax.training.validation import ValidationSettings, make_validate
from mambahome_jax.weights.weights import read_weights


def run(config: TrainConfig, begun: float | None = None) -> int:
    """Train as `config` says; returns the exit code. `begun`: time.monotonic() at the start of the program.

    0 done, 1 done but some cases could not be used, or stopped by numbers that are not finite, 128 + n stopped by
    signal n (SIGTERM 143, SIGINT 130) with a checkpoint from which --resume continues.
    Raises ConfigError, DatasetError, CheckpointError and OutputError before anything is trained. One of several
    processes does not raise but ends itself, with the same codes, and so the others.
    """
    begun = time.monotonic() if begun is None else begun
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    console = Console(quiet=not is_first(), force_terminal=None if is_first() else False)
    folder = local_path(config.output_dir or Path("runs") / (config.checkpoint_name or config.model))
    with ending_together():
        if config.members != 1:
            with locked(folder, "train") if is_first() else contextlib.nullcontext():
                return run_members(folder, config, begun, console, _run, _require_same_data)
        if holds_run(member_folder(folder, 0)):
            raise ConfigError(f"{folder} holds several networks. Say --members, or name another --output_dir")
        return _run(folder, config, begun, console, Shared(folder))


def _run(folder: Path, config: TrainConfig, begun: float, console: Console, shared: Shared) -> int:
    # The other processes of the same run write to it too.
    with locked(folder, "train") if is_first() else contextlib.nullcontext():
        return _run_in(folder, config, begun, console, shared)


def _run_in(folder: Path, config: TrainConfig, begun: float, console: Console, shared: Shared) -> int:
    resume = _may_start(config, folder, console)
    devices = choose_devices(config.parallel, config.num_devices)
    setup, skipped = _set_up(config, len(devices), console, shared, folder if resume else None)
    started = time.perf_counter()
    earlier = earlier_report(folder) if resume else {}
    if config.max_minutes is not None and is_finished(earlier, config):
        _require_same_run(folder, _checkpoint_settings(config, setup), setup)
        # What it had kept free for its end would be time again.
        say(console, f"{folder}: finished already")
        return earlier["exit_code"]
    report = new_report(folder, config, setup, skipped)
    if "pretrained" in earlier:
        report["pretrained"] = earlier["pretrained"]
    progressed = Progressed()
    try:
        _train(config, setup, folder, resume, devices, progressed, console, begun, report, shared)
        status, code = "finished", int(bool(skipped or progressed.failures))
        if progressed.signal is not None:
            status, code = "stopped by a signal", SIGNALLED + progressed.signal
    except TrainingError as error:
        say(console, f"Error: {error}")
        status, code = str(error), 1
    except MambaHomeError as error:
        if report["status"] == "running" or not earlier:
            with contextlib.suppress(OutputError):
                write_report(folder, report | {"status": str(error), "exit_code": 2})
        raise
    report |= {
        "status": status,
        "exit_code": code,
        "seconds": round(earlier.get("seconds", 0.0) + time.perf_counter() - started, 3),
        "step": progressed.step,
        # A finished run that is resumed trains nothing more.
        "loss": earlier.get("loss") if progressed.last_loss is None else progressed.last_loss,
        "best": progressed.best,
        "last_validation": scores_of(progressed.last_validation) or earlier.get("last_validation"),
        "failures": [{"id": case, "reason": reason} for case, reason in progressed.failures.items()],
    }
    write_report(folder, report)
    say_end(folder, report, code, console)
    return code


def _set_up(
    config: TrainConfig, devices: int, console: Console, shared: Shared, run: Path | None
) -> tuple[Setup, list[tuple[str, str]]]:
    """The setup, and (id, reason) of the cases that cannot be used. run: the folder of a run to be resumed."""
    prepared, skipped = _open_data(config.data_train, "data", config, console, shared)
    prepared_val = None
    if config.data_val is not None:
        prepared_val, more = _open_data(config.data_val, "data_val", config, console, shared)
        skipped += more
    return make_setup(config, prepared, prepared_val, devices, recorded_mirrors(run) if run else ()), skipped


def _require_same_data(folder: Path, config: TrainConfig, console: Console, shared: Shared) -> None:
    """Raises CheckpointError, ConfigError: a finished run of another network, other settings or other data."""
    setup, _ = _set_up(config, len(choose_devices(config.parallel, config.num_devices)), console, shared, folder)
    _require_same_run(folder, _checkpoint_settings(config, setup), setup)


def _train(
    config: TrainConfig,
    setup: Setup,
    folder: Path,
    resume: bool,
    devices: list[jax.Device],
    progressed: Progressed,
    console: Console,
    begun: float,
    report: dict[str, Any],
    shared: Shared,
) -> None:
    mesh, optimizer = make_mesh(devices), make_optimizer(setup.optimizer)
    settings = _checkpoint_settings(config, setup)
    require_same("The configuration", settings)
    last = folder / "checkpoints" / "last"
    graphdef, trained_graphdef, params = _networks(config, setup, None if resume else report, console)
    recipe = setup.recipe
    ema = recipe.ema_decay > 0
    abstract = abstract_state(params, optimizer, ema)
    data_state, found = None, dict[str, Any]()
    if resume:
        del params  # or they lie in the device's memory beside the state
        found = _require_same_run(folder, settings, setup)
        state, data_state = restore_state(last, abstract, mesh, config.strategy)
        progressed.step, progressed.best = int(state.step), found["best"]
        progressed.validated_until = found["validated_until"]
    else:
        state = init_state(params, optimizer, mesh, config.strategy, ema)
        del params
    budget = None
    if config.max_minutes is not None:
        given = config.max_minutes * 60 if shared.seconds is None else shared.seconds
        budget = TimeBudget(
            found.get("seconds_in_all", given),
            begun,
            found.get("seconds_spent", 0.0),
            found.get("seconds_to_first_step", 0.0) if resume else None,
            parts=1 if resume else shared.parts,
            own_validations=setup.val_every is None,
        )
    plan = Plan(
        setup.total_steps,
        setup.steps_per_epoch,
        setup.val_every,
        config.checkpoint_every,
        keep_last=config.keep_last,
        budget=budget,
    )
    # Not before: a run that cannot be continued with these flags keeps its report.
    report["status"] = "running"
    write_report(folder, report)
    say_start(setup, abstract.params, devices, plan, progressed.step, console, config.recipe)

    store = Store(setup.prepared.store)
    validate = None
    if setup.val_cases:
        val_store = Store(setup.prepared_val.store) if setup.prepared_val else store
        validation = ValidationSettings(
            *(setup.val_cases, setup.structures, setup.patch_size, config.overlap),
            normalise=normalisations(setup.properties.ct_normalisation, config.modality),
            sw_batch_size=config.batch_size,
            values=setup.val_values,
        )
        here = next(device for device in devices if device.process_index == jax.process_index())
        validate = make_validate(graphdef, val_store, validation, here)
    program = (trained_graphdef, setup.augmentation, setup.optimizer)
    compiles = program not in shared.programs
    if compiles:
        shared.programs[program] = make_train_step(
            trained_graphdef,
            optimizer,
            at_all_levels(dice_ce) if recipe.deep_supervision else dice_ce,
            mesh,
            config.seed,
            setup.augmentation,
            config.strategy,
            recipe.ema_decay,
            config.freeze_encoder,
            recipe.dropout,
        )
    train_step = with_seed(shared.programs[program], config.seed, mesh)
    with (
        MetricsLog(folder, progressed.step, partial(say, console)) if is_first() else NoLog() as log,
        Display(console, plan.total_steps, progressed.step, setup.global_batch, budget) as display,
        _batches(config, setup, store, data_state, display.say) as batches,
    ):
        if compiles and plan.goes_on_after(progressed.step):
            display.say("Compiling the training step, once; the first step follows")
        parts = Parts(
            train_step,
            mesh,
            setup.train_cases,
            validate,
            folder / "checkpoints",
            settings,
            log,
            display,
            setup.labelled,
        )
        train(state, batches, parts, plan, progressed)


def _checkpoint_settings(config: TrainConfig, setup: Setup) -> dict[str, Any]:
    """What config.json of every checkpoint says of its run, in values of JSON."""
    return {
        "model": jsonable(dataclasses.asdict(setup.model.replace(use_checkpoint=False))),
        "data": jsonable(setup.properties.to_json()),
        "cases": data_summary(setup.digests),
        "training": jsonable(training_settings(config, setup)),
        "versions": versions(PACKAGES),
    }


def _require_same_run(folder: Path, settings: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """config.json of the last checkpoint. Raises CheckpointError, ConfigError: of another network, settings or data."""
    recorded = earlier_report(folder).get("data", {}).get("digests", {})
    changed = partial(data_differences, now=settings, recorded=recorded, digests=setup.digests)
    return check_settings(folder / "checkpoints" / "last", settings, changed)


@contextlib.contextmanager
def _batches(
    config: TrainConfig, setup: Setup, store: Store, data_state: dict[str, Any] | None, say: Callable[[str], None]
) -> Iterator[Any]:
    """Iterator of training batches, closed at the end: its threads or processes would outlive it."""
    size = batch_bytes(setup.global_batch // jax.process_count(), setup.patch_size, setup.model.in_chans)
    workers = fitting_workers(setup.num_workers, size)
    if workers.why_fewer:
        say(f"Note: {workers.why_fewer}")
    loader = make_loader(
        store,
        setup.train_cases,
        setup.patch_size,
        setup.global_batch,
        seed=config.seed,
        num_workers=workers.count,
        class_balanced=setup.recipe.class_balanced,
        normalise=normalisations(setup.properties.ct_normalisation, config.modality),
        share=(jax.process_index(), jax.process_count()),
    )
    iterator = iter(loader)
    try:
        if data_state is not None:
            iterator.set_state(data_state)
        yield iterator
    finally:
        iterator.close()


def _networks(
    config: TrainConfig, setup: Setup, report: dict[str, Any] | None, console: Console
) -> tuple[nnx.GraphDef, nnx.GraphDef, Any]:
    """The network's structure, that of what is trained (with heads for deep supervision), and the latter's parameters.

    report: of a new run, which lists what --use_pretrained loaded; None for one that goes on with its own parameters.
    Raises CheckpointError where the weights to start from are of another network.
    """
    # Not traced by nnx.eval_shape where values are not needed: that takes longer than to draw them.
    model = MambaHoME(setup.model, rngs=nnx.Rngs(config.seed), precision=setup.precision, metadata=setup.properties)
    graphdef, params = _split(model)
    if report is not None and config.use_pretrained not in ("", "False"):
        weights = read_weights(config.use_pretrained)
        params, found = transfer(weights, params, setup.model, setup.properties, config.use_pretrained)
        say(console, f"{config.use_pretrained}: {found}")
        report["pretrained"] = {"path": config.use_pretrained, **jsonable(dataclasses.asdict(found))}
        model = nnx.merge(graphdef, params)
    if not setup.recipe.deep_supervision:
        return graphdef, graphdef, params
    trained = DeepSupervision(model, rngs=nnx.Rngs(config.seed + 1), precision=setup.precision)
    return graphdef, *_split(trained)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def _may_start(config: TrainConfig, folder: Path, console: Console) -> bool:
    """Whether to resume. Raises where a new run would destroy an earlier one, or the folder cannot be written."""
    require_letters(folder)
    there = holds_run(folder)
    # Before the first process can write one, so that all of them see the same.
    require_same(f"Whether {folder} holds a checkpoint", there)
    open_output(folder)
    open_output(folder / "checkpoints")
    if config.resume or config.load_checkpoint:
        if not there:
            say(console, f"No checkpoint in {folder} yet: starting from the beginning")
        return there
    if there:
        raise ConfigError(f"{folder} holds a run already. Continue it with --resume, or name another --output_dir")
    return False


def _open_data(
    data: Path, name: str, config: TrainConfig, console: Console, shared: Shared
) -> tuple[Prepared, list[tuple[str, str]]]:
    """A preprocessed folder as it is; any other layout brought into a patch store of its own, at its own spacing."""
    if data not in shared.data:
        shared.data[data] = _opened(data, shared.folder / name, config, console)
    return shared.data[data][0], list(shared.data[data][1])


def _opened(data: Path, work: Path, config: TrainConfig, console: Console) -> tuple[Prepared, list[tuple[str, str]]]:
    if data.is_dir() and prepared_layout.detect(data):
        prepared, notes = with_split_file(read_prepared(data))
        for note in notes:
            say(console, f"Note: {note}")
        return prepared, []
    if jax.process_count() > 1:
        raise ConfigError(f"{data} is not preprocessed. With several processes run preprocess.py first")
    dataset = consecutive(load_dataset(data))
    say(console, f"{data} is not preprocessed: storing its scans in {work}, at their own spacing")
    flags = PreprocessConfig(data, work, modality=config.modality)
    track = tracked(console, "Preprocessing")
    result = prepare_dataset(dataset, flags, store_only=True, say=partial(say, console), track=track)
    if not result.entries:
        action = "Run preprocess.py on it with the flags that the reasons above name, and train on what it writes."
        raise DatasetError("none of its cases can be used", file=data, expected="scans with labels", action=action)
    return result.prepared, list(result.failed)
