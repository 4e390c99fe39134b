"""What a training command says of itself: its ingredients, its length, and what made it."""

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mambahome_jax.datasets.patients import split_notes
from mambahome_jax.datasets.prepared import Prepared
from mambahome_jax.datasets.splits import outside_note, outside_split
from mambahome_jax.datasets.structures import describe_numbering
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.console import command_line, duration, say
from mambahome_jax.support.devices import device_line, versions
from mambahome_jax.support.files import jsonable, read_json, write_json
from mambahome_jax.support.paths import working_folder
from mambahome_jax.training.data import case_digests, trained_on_notes
from mambahome_jax.training.distributed import is_first
from mambahome_jax.training.loop import Plan, Validation
from mambahome_jax.training.setup import Setup, training_settings

PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def say_ingredients(setup: Setup) -> str:
    """The ingredients that are used, as one line."""
    used, optimizer = setup.recipe.ingredients(), setup.optimizer
    parts = [f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"]
    if optimizer.name != "SGD":
        parts.append(f"eps {optimizer.eps:g}")
    if optimizer.name == "SGD" and optimizer.momentum:
        parts.append(f"momentum {optimizer.momentum}")
    names = ("warmup_steps", "clip_norm", "ema_decay", "dropout", "deep_supervision", "class_balanced")
    parts += [f"{name} {used[name]}" for name in names if used[name]]
    if setup.augmentation is None:
        parts.append("no augmentation")
    else:
        mirrors = [f"axis {axis}, {len(pairs)} pairs of labels swapped" for axis, pairs in setup.augmentation.mirror]
        parts.append(f"mirrored along {'; '.join(mirrors)}" if mirrors else "not mirrored")
    return ", ".join(parts)


def say_plan(plan: Plan) -> str:
    """How long the run is, and when it validates."""
    length = f"{plan.total_steps} steps"
    if plan.budget is not None:
        length = f"{duration(plan.budget.seconds)}, of which {duration(plan.budget.spent())} are spent"
        if plan.budget.parts > 1:
            length = f"1/{plan.budget.parts} of what the first step leaves of {length}"
    validation = "validation as time allows" if plan.val_every is None else f"validation every {plan.val_every} steps"
    return f"{length}; {plan.steps_per_epoch} steps an epoch; {validation}"


def dataset_fingerprint(prepared: Prepared, cases: Sequence[str]) -> str:
    """SHA-256 of what the store says of these cases (see `case_digests`) and of the label table: equal for the same
    data, wherever it lies."""
    content = [sorted(prepared.labels.items()), sorted(case_digests(prepared, cases).items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """{"commit", "changed": files that differ from it} of the checkout that this code, or `folder`, lies in; None where
    there is none."""
    folder = folder or Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}


def new_report(folder: Path, config: TrainConfig, setup: Setup, skipped: list[tuple[str, str]]) -> dict[str, Any]:
    """What run.json says of a run that begins in a folder."""
    return {
        "command": "train",
        "status": "starting",
        "configuration": jsonable(dataclasses.asdict(config)),
        "working_folder": working_folder(folder),
        "model": jsonable(dataclasses.asdict(setup.model)),
        "data": {
            "name": setup.prepared.name,
            "fingerprint": dataset_fingerprint(setup.prepared, [*setup.train_cases]),
            **setup.properties.to_json(),
            "train": list(setup.train_cases),
            "val": list(setup.val_cases),
            "digests": {part: dict(cases) for part, cases in setup.digests.items()},
            "outside_split": outside_split(setup.prepared),
            "skipped": [{"id": case, "reason": reason} for case, reason in skipped],
        },
        "training": jsonable(training_settings(config, setup)),
        "seed": config.seed,
        "versions": versions(PACKAGES),
        "git": git_state(),
        "device": device_line(),
        "outputs": {"best": "checkpoints/best", "last": "checkpoints/last", "metrics": "metrics.csv"},
    }


def earlier_report(folder: Path) -> dict[str, Any]:
    """What run.json says of the run that is being continued; empty where it says nothing."""
    try:
        return read_json(folder / "run.json")
    except DatasetError:
        return {}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write run.json, in the first process only. Raises OutputError."""
    if is_first():
        write_json(folder / "run.json", report)


def say_start(
    setup: Setup,
    abstract: Any,
    devices: list[jax.Device],
    plan: Plan,
    start: int,
    console: Console,
    recipe: str = "published",
) -> None:
    """Print what is about to be trained, on what and for how long."""
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    patch = " x ".join(map(str, setup.patch_size))
    held_out = f"{len(setup.val_cases)} to validate on" if setup.val_cases else "none to validate on"
    names = ", ".join(setup.structures.values())
    lines = [
        f"{setup.prepared.name}: {len(setup.train_cases)} cases to train on, {held_out}; {setup.properties.modality}",
        f"{setup.model.out_chans} classes: background, {names}",
        *label_lines(setup),
        f"{parameters / 1e6:.2f} M parameters; patches of {patch}, {setup.global_batch} a step, {setup.precision}, "
        f"on {len(devices)} x {devices[0].device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        say_plan(plan),
    ]
    lines.append(f"recipe {recipe}: {say_ingredients(setup)}")
    lines += [*setup.mirror_lines, *_say_patients(setup)]
    lines += [f"Note: {note}" for note in data_notes(setup)]
    if start:
        lines.append(f"Resuming after step {start}")
    for line in lines:
        say(console, line)


def data_notes(setup: Setup) -> tuple[str, ...]:
    """What to know of the cases before a training: those in no list of the split, and those on both sides of it."""
    homes = [prepared.root.resolve() for prepared in (setup.prepared, setup.prepared_val) if prepared]
    same_folder = len(homes) == 2 and homes[0] == homes[1]
    both = trained_on_notes(setup.trained_on, len(setup.val_cases), same_folder)
    return outside_note(outside_split(setup.prepared)) + both


def _say_patients(setup: Setup) -> tuple[str, ...]:
    patients = {case.id: case.patient for case in setup.prepared.cases}
    known = setup.prepared.patients is not None or any(case != patient for case, patient in patients.items())
    return split_notes(patients, known, setup.train_cases, () if setup.prepared_val else setup.val_cases)


def label_lines(setup: Setup) -> list[str]:
    """A line on label values that are not 1, 2, 3, ..., as they are stored or in a folder of an earlier version."""
    lines = []
    if setup.prepared_val is not None and setup.val_values is not None:
        left = [name for value, name in setup.prepared_val.labels.items() if value not in setup.val_values]
        lines += [f"Note: {', '.join(left)} of --data_val: not trained, so background there"] if left else []
    if setup.properties.values:
        return [*lines, f"Labels: {describe_numbering(dict(setup.properties.values))}"]
    largest = max(setup.structures)
    if largest == len(setup.structures):
        return lines
    found = f"{largest - len(setup.structures)} output channels stand for no structure"
    return [*lines, f"Note: {found}, as label values go up to {largest}; preprocess.py numbers them without gaps"]


def say_end(folder: Path, report: dict[str, Any], code: int, console: Console) -> None:
    """Print how it ended and what to type next."""
    best = report["best"]
    lines = [f"{report['status']}: step {report['step']} after {duration(report['seconds'])}"]
    if best is not None:
        score = "" if best["val_dice"] is None else f", validation Dice {best['val_dice']:.4f}"
        lines.append(f"Best: step {best['step']}{score}, in {folder / 'checkpoints' / 'best'}")
    if code in (130, 143):
        lines.append("The same command with --resume continues")
    elif best is not None:
        lines.append(f"Next: {_infer_line([folder / 'checkpoints' / 'best'])}")
    for line in lines:
        say(console, line)


def say_member(number: int, members: int, seed: int, folder: Path, finished: bool, console: Console) -> None:
    """Print which of several networks is about to be trained, or has been."""
    line = f"Network {number + 1} of {members}, seed {seed}, in {folder}" + (": finished already" if finished else "")
    say(console, line)


def say_ensemble(checkpoints: Sequence[Path], members: int, console: Console) -> None:
    """Print what to type to segment with all networks together, as far as they came to a checkpoint."""
    line = f"{len(checkpoints)} of {members} networks have a checkpoint. "
    line = "All together: " if len(checkpoints) == members else line
    if checkpoints:
        line += _infer_line(checkpoints)
    say(console, line)


def _infer_line(checkpoints: Sequence[Path]) -> str:
    return command_line("infer", "--data_path", "SCANS", "--model_path", *checkpoints, "--output_dir", "PRED")


def scores_of(validation: Validation | None) -> dict[str, float | None] | None:
    """Dice of each structure, None where no case had it."""
    if validation is None:
        return None
    return {name: value if np.isfinite(value) else None for name, value in validation.structures.items()}
