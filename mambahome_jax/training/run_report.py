"""run.json of a training: what it says of the run, and how another command finds that run finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from mambahome_jax.datasets.splits import outside_split
from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.devices import device_line, git_state, versions
from mambahome_jax.support.files import earlier_json, jsonable, write_json
from mambahome_jax.training.checkpoints import PACKAGES
from mambahome_jax.training.distributed import is_first
from mambahome_jax.training.setup import Setup

# Flags that say how a run was started; it may be another way of starting that finds it finished.
_OF_THE_START = {
    *("resume", "load_checkpoint", "output_dir", "checkpoint_name", "given"),
    *("coordinator_address", "num_processes", "process_id", "tracker"),
}


def new_report(folder: Path, setup: Setup, skipped: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What run.json says of a run that begins in a folder."""
    return {
        "command": "train",
        "status": "starting",
        "configuration": asdict(setup.flags),
        "model": setup.model.to_json(),
        "data": {
            "name": setup.prepared.name,
            "fingerprint": dataset_fingerprint(setup.prepared.labels, setup.digests["train"]),
            **setup.properties.to_json(),
            "train": list(setup.train_cases),
            "val": list(setup.val_cases),
            "digests": {part: dict(cases) for part, cases in setup.digests.items()},
            "outside_split": outside_split(setup.prepared),
            "skipped": [{"id": case, "reason": reason} for case, reason in skipped],
        },
        "training": setup.settings(),
        "seed": setup.flags.seed,
        "versions": versions(PACKAGES),
        "git": git_state(),
        "device": device_line(),
        "outputs": {
            **{"best": "checkpoints/best", "last": "checkpoints/last", "metrics": "metrics.csv"},
            **{"curves": "progress.png", "log": "log.txt", "held_out": "validation"},
        },
    }


def is_finished(report: Mapping[str, Any], flags: TrainConfig) -> bool:
    """Whether run.json tells of a run with these flags that came to its end."""
    recorded, now = report.get("configuration"), jsonable(asdict(flags))
    if not isinstance(recorded, dict) or report.get("status") != "finished":
        return False
    before = all_flags(recorded)
    return all(before.get(name) == now[name] for name in {*now} - _OF_THE_START)


def all_flags(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of train in a record; one that an earlier version did not have was not given then."""
    defaults = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    return jsonable(defaults) | dict(recorded)


def held_out_entry(summary: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What run.json says of the scores of the cases held out: mean Dice, of each structure, and of which checkpoint."""
    if summary is None:
        return None
    return {"checkpoint": {key: summary["checkpoint"][key] for key in ("name", "step")}} | scores_entry(summary)


def scores_entry(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The mean Dice of a summary of scores, and that of each structure."""
    return {
        "cases": summary["cases"],
        "dice": summary["mean"]["dice"],
        "structures": {name: entry["dice"] for name, entry in summary["structures"].items()},
    }


def earlier_report(folder: Path) -> dict[str, Any]:
    """What run.json says of the run that is being continued; empty where it says nothing."""
    return earlier_json(folder / "run.json")


def save_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write run.json, in the first process only. Raises OutputError."""
    if is_first():
        write_json(folder / "run.json", report)


def dataset_fingerprint(labels: Mapping[int, str], digests: Mapping[str, str]) -> str:
    """SHA-256 of the label table and the `case_digests` of the cases: equal for the same data anywhere."""
    content = [sorted(labels.items()), sorted(digests.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
