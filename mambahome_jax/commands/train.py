"""train: a preprocessed folder (or the published layout) in, checkpoints, metrics and a report of the run out."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from mambahome_jax.commands.preprocess import prepare
from mambahome_jax.commands.train_setup import Setup, make_setup, training_settings
from mambahome_jax.commands.validation import ValidationSettings, make_validate
from mambahome_jax.config import AugmentationConfig, TrainConfig
from mambahome_jax.data.loader import make_loader
from mambahome_jax.data.store import Store
from mambahome_jax.datasets import prepared as prepared_layout
from mambahome_jax.datasets.prepared import Prepared, read_prepared, write_json
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError, MambaHomeError, OutputError, TrainingError
from mambahome_jax.model.network import MambaHoME
from mambahome_jax.model.weights import load_model
from mambahome_jax.training.checkpoints import check_settings, restore_state
from mambahome_jax.training.distributed import ending_together, is_first, join_processes, require_same
from mambahome_jax.training.loop import Parts, Plan, Progressed, train
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.progress import Display, MetricsLog, NoLog, duration
from mambahome_jax.training.sharding import choose_devices, make_mesh
from mambahome_jax.training.step import abstract_state, init_state, make_train_step

PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(config: TrainConfig) -> int:
    """Train as `config` says; returns the exit code.

    0 done, 1 done but some cases could not be used, or stopped by numbers that are not finite, 128 + n stopped by
    signal n (SIGTERM 143, SIGINT 130) with a checkpoint from which --resume continues.
    Raises ConfigError, DatasetError, CheckpointError and OutputError before anything is trained. One of several
    processes does not raise but ends itself, with the same codes, and so the others.
    """
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    with ending_together():
        return _run(config)


def _run(config: TrainConfig) -> int:
    console = Console(quiet=not is_first(), force_terminal=None if is_first() else False)
    folder = config.output_dir or Path("runs") / (config.checkpoint_name or config.model)
    resume = _may_start(config, folder, console)
    devices = choose_devices(config.parallel, config.num_devices)
    prepared, skipped = _open_data(config.data_train, folder / "data", config, console)
    prepared_val = None
    if config.data_val is not None:
        prepared_val, more = _open_data(config.data_val, folder / "data_val", config, console)
        skipped += more
    setup = make_setup(config, prepared, prepared_val, len(devices))
    started = time.perf_counter()
    report = _report(config, setup, skipped)
    _write_report(folder, report)
    progressed = Progressed()
    try:
        _train(config, setup, folder, resume, devices, progressed, console)
        status, code = "finished", int(bool(skipped or progressed.failures))
        if progressed.signal is not None:
            status, code = "stopped by a signal", 128 + progressed.signal
    except TrainingError as error:
        console.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        status, code = str(error), 1
    except MambaHomeError as error:
        with contextlib.suppress(OutputError):
            _write_report(folder, report | {"status": str(error), "exit_code": 2})
        raise
    last = progressed.last_validation
    report |= {
        "status": status,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 3),
        "step": progressed.step,
        "loss": progressed.last_loss,
        "best": progressed.best,
        "last_validation": last and {name: _number(value) for name, value in last.structures.items()},
        "failures": [{"id": case, "reason": reason} for case, reason in progressed.failures.items()],
    }
    _write_report(folder, report)
    _say_end(folder, report, code, console)
    return code


def _train(
    config: TrainConfig,
    setup: Setup,
    folder: Path,
    resume: bool,
    devices: list[jax.Device],
    progressed: Progressed,
    console: Console,
) -> None:
    mesh, optimizer = make_mesh(devices), make_optimizer(setup.optimizer)
    settings = {
        "model": _json(dataclasses.asdict(setup.model.replace(use_checkpoint=False))),
        "data": setup.properties.to_json(),
        "training": _json(training_settings(config, setup)),
        "versions": _versions(),
    }
    require_same("The configuration", settings)
    last = folder / "checkpoints" / "last"
    graphdef, abstract = _split(nnx.eval_shape(lambda: _new_model(config, setup)))
    data_state = None
    if resume:
        found = check_settings(last, settings)
        state, data_state = restore_state(last, abstract_state(abstract, optimizer), mesh, config.strategy)
        progressed.step, progressed.best = int(state.step), found["best"]
        progressed.validated_until = found["validated_until"]
    else:
        state = init_state(_initial_params(config, setup), optimizer, mesh, config.strategy)
    plan = Plan(
        setup.total_steps, setup.steps_per_epoch, setup.val_every, config.checkpoint_every, keep_last=config.keep_last
    )
    _say_start(setup, abstract, devices, plan, progressed.step, console)

    store = Store(setup.prepared.store)
    validate = None
    if setup.val_cases:
        val_store = Store(setup.prepared_val.store) if setup.prepared_val else store
        validation = ValidationSettings(
            setup.val_cases, setup.structures, setup.patch_size, config.overlap, config.modality, config.batch_size
        )
        here = next(device for device in devices if device.process_index == jax.process_index())
        validate = make_validate(graphdef, val_store, validation, here)
    train_step = make_train_step(
        graphdef,
        optimizer,
        dice_ce,
        mesh,
        config.seed,
        AugmentationConfig() if config.augment else None,
        config.strategy,
    )
    with (
        MetricsLog(folder, progressed.step) if is_first() else NoLog() as log,
        Display(console, plan.total_steps, progressed.step, setup.global_batch) as display,
        _batches(config, setup, store, data_state) as batches,
    ):
        if progressed.step < plan.total_steps:
            display.say("Compiling the training step, once; the first step follows")
        parts = Parts(train_step, mesh, setup.train_cases, validate, folder / "checkpoints", settings, log, display)
        train(state, batches, parts, plan, progressed)


@contextlib.contextmanager
def _batches(config: TrainConfig, setup: Setup, store: Store, data_state: dict[str, Any] | None) -> Iterator[Any]:
    """Iterator of training batches, closed at the end: its threads or processes would outlive it."""
    loader = make_loader(
        store,
        setup.train_cases,
        setup.patch_size,
        setup.global_batch,
        seed=config.seed,
        num_workers=setup.num_workers,
        class_balanced=config.class_balanced,
        modality=config.modality,
        share=(jax.process_index(), jax.process_count()),
    )
    iterator = iter(loader)
    try:
        if data_state is not None:
            iterator.set_state(data_state)
        yield iterator
    finally:
        iterator.close()


def _new_model(config: TrainConfig, setup: Setup) -> MambaHoME:
    return MambaHoME(setup.model, rngs=nnx.Rngs(config.seed), precision=setup.precision, metadata=setup.properties)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def _initial_params(config: TrainConfig, setup: Setup) -> Any:
    """Fresh parameters, or those of --use_pretrained. Raises CheckpointError where these are of another network."""
    if config.use_pretrained in ("", "False"):
        return _split(_new_model(config, setup))[1]
    loaded = load_model(config.use_pretrained, precision=setup.precision)
    wanted, found = (dataclasses.asdict(c.replace(use_checkpoint=False)) for c in (setup.model, loaded.config))
    differ = [f"{name} is {found[name]}, expected {wanted[name]}" for name in wanted if wanted[name] != found[name]]
    if differ:
        advice = "Choose --model, --classes and --feature_size as they were"
        raise CheckpointError(f"{config.use_pretrained} is of another configuration: {'; '.join(differ)}. {advice}")
    return _split(loaded)[1]


def _may_start(config: TrainConfig, folder: Path, console: Console) -> bool:
    """Whether to resume. Raises where a new run would destroy an earlier one, or the folder cannot be written."""
    there = _checkpoint_in(folder)
    # Before the first process can write one, so that all of them see the same.
    require_same(f"Whether {folder} holds a checkpoint", there)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"mambahome")
        probe.unlink()
    except OSError as error:
        reason = f"{folder}: cannot be written: {error.strerror or error}"
        raise OutputError(f"{reason}. Free some space or name another --output_dir") from error
    if config.resume or config.load_checkpoint:
        if not there:
            console.print(f"No checkpoint in {folder} yet: starting from the beginning", markup=False, soft_wrap=True)
        return there
    if there:
        raise ConfigError(f"{folder} holds a run already. Continue it with --resume, or name another --output_dir")
    return False


def _checkpoint_in(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).is_dir() for name in ("last", "last.previous"))


def _open_data(data: Path, work: Path, config: TrainConfig, console: Console) -> tuple[Prepared, list[tuple[str, str]]]:
    """A preprocessed folder as it is; any other layout brought into a patch store of its own, at its own spacing."""
    if data.is_dir() and prepared_layout.detect(data):
        return read_prepared(data), []
    if jax.process_count() > 1:
        raise ConfigError(f"{data} is not preprocessed. With several processes run preprocess.py first")
    dataset = load_dataset(data)
    console.print(
        f"{data} is not preprocessed: storing its scans in {work}, at their own spacing", markup=False, soft_wrap=True
    )
    summary = prepare(
        dataset, work, spacing=None, modality=config.modality, num_workers=None, nifti=False, console=console
    )
    if not summary.entries:
        raise DatasetError("none of its cases can be used", file=data, expected="scans with labels")
    return summary.prepared, list(summary.failed)


def _report(config: TrainConfig, setup: Setup, skipped: list[tuple[str, str]]) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "command": "train",
        "status": "running",
        "configuration": _json(dataclasses.asdict(config)),
        "model": _json(dataclasses.asdict(setup.model)),
        "data": {
            "name": setup.prepared.name,
            **setup.properties.to_json(),
            "train": list(setup.train_cases),
            "val": list(setup.val_cases),
            "skipped": [{"id": case, "reason": reason} for case, reason in skipped],
        },
        "training": _json(training_settings(config, setup)),
        "versions": _versions(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "outputs": {"best": "checkpoints/best", "last": "checkpoints/last", "metrics": "metrics.csv"},
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    if is_first():
        write_json(folder / "run.json", report)


def _say_start(
    setup: Setup, abstract: Any, devices: list[jax.Device], plan: Plan, start: int, console: Console
) -> None:
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    patch = " x ".join(map(str, setup.patch_size))
    held_out = f"{len(setup.val_cases)} to validate on" if setup.val_cases else "none to validate on"
    names = ", ".join(setup.structures.values())
    lines = [
        f"{setup.prepared.name}: {len(setup.train_cases)} cases to train on, {held_out}; {setup.properties.modality}",
        f"{setup.model.out_chans} classes: background, {names}",
        f"{parameters / 1e6:.2f} M parameters; patches of {patch}, {setup.global_batch} a step, {setup.precision}, "
        f"on {len(devices)} x {devices[0].device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        f"{plan.total_steps} steps, {plan.steps_per_epoch} an epoch; validation every {plan.val_every} steps",
    ]
    if start:
        lines.append(f"Resuming after step {start}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _say_end(folder: Path, report: dict[str, Any], code: int, console: Console) -> None:
    best = report["best"]
    lines = [f"{report['status']}: step {report['step']} after {duration(report['seconds'])}"]
    if best is not None:
        score = "" if best["val_dice"] is None else f", validation Dice {best['val_dice']:.4f}"
        lines.append(f"Best: step {best['step']}{score}, in {folder / 'checkpoints' / 'best'}")
    if code in (130, 143):
        lines.append("The same command with --resume continues")
    elif best is not None:
        lines.append(
            f"Next: python infer.py --data_path SCANS --model_path {folder / 'checkpoints' / 'best'} --output_dir PRED"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
