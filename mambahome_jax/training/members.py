"""Several networks in one training command: what they share, and one after the other."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console

from mambahome_jax.datasets.prepared import Prepared
from mambahome_jax.errors import ConfigError, MambaHomeError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.recipes import AugmentationConfig, OptimizerConfig
from mambahome_jax.support.files import jsonable
from mambahome_jax.training.report import earlier_report, say_ensemble, say_member, write_report
from mambahome_jax.weights.checkpoint import read_checkpoint_config

SIGNALLED = 128
# Of how a run was started; it may be another way of starting that finds it finished.
OF_THE_START = {
    *("resume", "load_checkpoint", "output_dir", "checkpoint_name"),
    *("coordinator_address", "num_processes", "process_id"),
}
Program = tuple[nnx.GraphDef, AugmentationConfig | None, OptimizerConfig]


@dataclass
class Shared:
    """What one network of a command leaves to the next.

    folder: where data is stored that is not preprocessed. data: what was opened, by its path. programs: compiled steps
    by all that may differ between them; JAX's own cache would not know one again, as Pallas numbers the kernels of a
    process. seconds, parts: the time left to all networks still to come, and their number; None without a budget.
    """

    folder: Path
    data: dict[Path, tuple[Prepared, list[tuple[str, str]]]] = field(default_factory=dict)
    programs: dict[Program, Callable] = field(default_factory=dict)
    seconds: float | None = None
    parts: int = 1


def member_folder(folder: Path, number: int) -> Path:
    """Where the run of a network is."""
    return folder / f"member_{number}"


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint to resume."""
    return any((folder / "checkpoints" / name).is_dir() for name in ("last", "last.previous"))


def run_members(
    folder: Path,
    config: TrainConfig,
    begun: float,
    console: Console,
    run: Callable[[Path, TrainConfig, float, Console, Shared], int],
    require_same_data: Callable[[Path, TrainConfig, Console, Shared], None],
) -> int:
    """Train config.members networks, each a run of its own with a seed of its own; returns the largest exit code.

    Those that an earlier run finished on the same data stay as they are. A signal ends all. Raises ConfigError,
    OutputError.
    """
    homes = [member_folder(folder, number) for number in range(config.members)]
    resume = config.resume or config.load_checkpoint
    if config.members < 1:
        raise ConfigError(f"--members {config.members}; expected 1 or more")
    if holds_run(folder):
        raise ConfigError(f"{folder} holds the run of one network already. Name another --output_dir")
    there = [home for home in homes if holds_run(home)]
    if there and not resume:
        raise ConfigError(f"{there[0]} holds a run already. Continue all with --resume, or name another --output_dir")
    shared = Shared(folder)
    report: dict[str, Any] = {
        "command": "train",
        "status": "running",
        "configuration": jsonable(dataclasses.asdict(config)),
        "members": [home.name for home in homes],
    }
    write_report(folder, report)
    code, minutes, ended = 0, config.max_minutes, begun
    left = None if minutes is None else minutes * 60
    for number, home in enumerate(homes):
        earlier = earlier_report(home) if resume else {}
        member = dataclasses.replace(
            config,
            members=1,
            seed=config.seed + number,
            max_minutes=None if minutes is None else minutes / config.members,
            output_dir=home,
            checkpoint_name="",
        )
        finished = holds_run(home) and is_finished(earlier, member)
        say_member(number, config.members, member.seed, home, finished, console)
        shared.seconds, shared.parts = left, config.members - number
        if finished:
            require_same_data(home, member, console, shared)
        try:
            code = max(code, earlier.get("exit_code") or 0 if finished else run(home, member, ended, console, shared))
        except MambaHomeError as error:
            write_report(folder, report | {"status": str(error), "exit_code": 2})
            raise
        if code > SIGNALLED:
            break
        if left is not None:
            before = read_checkpoint_config(home / "checkpoints" / "last") if holds_run(home) else {}
            now = time.monotonic()
            # What it took in this process, or what its checkpoint says of all that it took.
            left, ended = max(left - max(now - ended, before.get("seconds_spent", 0.0)), 0.0), now
    else:
        best = [home / "checkpoints" / "best" for home in homes]
        say_ensemble([path for path in best if path.is_dir()], len(best), console)
    status = "stopped by a signal" if code > SIGNALLED else "finished"
    write_report(folder, report | {"status": status, "exit_code": code})
    return code


def is_finished(report: dict[str, Any], config: TrainConfig) -> bool:
    """Whether run.json tells of a run with these flags that came to its end; one with others says what does not fit."""
    before, now = report.get("configuration"), jsonable(dataclasses.asdict(config))
    same = isinstance(before, dict) and all(before.get(name) == now[name] for name in now if name not in OF_THE_START)
    return same and report.get("status") == "finished"
