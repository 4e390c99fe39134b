"""What a training command says of itself: its ingredients, its length, and what made it."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambahome_jax.commands.train_setup import Setup
from mambahome_jax.data.store import Store
from mambahome_jax.datasets.prepared import Prepared
from mambahome_jax.training.loop import Plan
from mambahome_jax.training.progress import duration


def say_ingredients(setup: Setup) -> str:
    """The ingredients that are used, as one line."""
    used, optimizer = setup.ingredients, setup.optimizer
    parts = [f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"]
    if optimizer.name != "SGD":
        parts.append(f"eps {optimizer.eps:g}")
    names = ["warmup_steps", "clip_norm", "ema_decay", "label_smoothing", "deep_supervision", "class_balanced"]
    if optimizer.momentum:
        names.insert(0, "momentum")
    parts += [f"{name} {getattr(used, name)}" for name in names if getattr(used, name)]
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
    validation = "validation as time allows" if plan.val_every is None else f"validation every {plan.val_every} steps"
    return f"{length}; {plan.steps_per_epoch} steps an epoch; {validation}"


def dataset_fingerprint(prepared: Prepared, cases: Sequence[str]) -> str:
    """SHA-256 of what the store says of these cases (shapes, affines, intensities, voxels a class) and of the label
    table: equal for the same data, wherever it lies."""
    store = Store(prepared.store)
    content = [sorted(prepared.labels.items()), [repr(store.entry(case)) for case in sorted(cases)]]
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
