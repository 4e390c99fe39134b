"""A duel: contestants trained in turn on the same folds, scored on the same cases, and what their differences come to.

OUT/<contestant>/seed_<n> is a run of `train` like any other, in a process of its own: what one leaves on a device, or
has compiled, is nothing to the next. A duel that was killed trains what has not ended, and writes the same scores.
"""

import contextlib
import csv
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from rich.console import Console

from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, TrainingError
from mambahome_jax.evaluation.results import METRICS, read_evaluation, structures_of
from mambahome_jax.evaluation.systems import compare_systems
from mambahome_jax.flags import DuelConfig, TrainConfig
from mambahome_jax.recipes import as_typed
from mambahome_jax.reporting.duel import Cost, Standing, render_duel, verdicts
from mambahome_jax.reporting.report import without_folders
from mambahome_jax.support.console import command_line, protect_output, say
from mambahome_jax.support.devices import visible_gpus
from mambahome_jax.support.files import jsonable, read_json, write_json, write_text
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.processes import end_with_parent
from mambahome_jax.training.contestants import Contestant, contestants_of
from mambahome_jax.training.held_out import FOLDER as VALIDATION
from mambahome_jax.training.held_out import SUMMARY
from mambahome_jax.training.run_report import all_flags, earlier_report
from mambahome_jax.training.runs import SIGNALLED, run_training
from mambahome_jax.training.side_by_side import forwarded_signals, train_side_by_side, wants_side_by_side
from mambahome_jax.weights.model_path import CROSS_VALIDATION, FOLD

if TYPE_CHECKING:
    from mambahome_jax.keywords import DuelFlags

DUEL, PAGE = "duel.json", "report.html"
# Settings in run.json that follow from the fold, the seed or the machine.
_NOT_GIVEN = {"train_cases", "seed", "labelled", "num_workers"}
# What all contestants have alike -> the flag that one of them may have of its own. A plan that was edited, or another
# machine that went on with the duel, makes it differ all the same.
_ALIKE = {
    **{"device": "", "precision": "precision", "recipe": "recipe"},
    **{"patch_size": "patch_size", "global_batch": "batch_size"},
}
# Trains by flags: exit code as of `train`, and why it was refused.
Train = Callable[[TrainConfig, Console], tuple[int, str]]


@dataclass(frozen=True)
class DuelResult:
    """A duel that ended, or was stopped by a signal (exit code 128 + its number), then without standings.

    standings: the first contestant first. verdicts: a sentence for each of the others. failures: run or case -> reason.
    report: the page.
    """

    folder: Path
    exit_code: int
    standings: tuple[Standing, ...] = ()
    verdicts: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    report: Path | None = None


@shows_keywords(DuelConfig)
def duel(*, progress: bool = False, **flags: "Unpack[DuelFlags]") -> DuelResult:
    """Train and compare networks as `mambahome duel` does, silently; keywords are its flags.

    Raises:
        ConfigError, DatasetError, OutputError: before anything is trained.
        TrainingError: the first contestant could not be trained.
    """
    return run_duel(from_keywords(DuelConfig, flags), Console(quiet=not progress))


def train_in_own_process(flags: TrainConfig, console: Console) -> tuple[int, str]:
    """Train as the command does, in a new process, which a signal stops with a checkpoint."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(flags, console.quiet, sender))
    with forwarded_signals(lambda: [process] if process.pid else []) as received:
        with _no_main_module():
            process.start()
        sender.close()
        if received:
            process.terminate()
        try:
            message = str(receiver.recv())
        except EOFError:
            message = ""
        process.join()
    code = process.exitcode or 0
    if received:
        return SIGNALLED + received[0], message
    if code < 0 or code > SIGNALLED:
        # No signal to the duel: the system or a crash ended this one alone.
        number = -code if code < 0 else code - SIGNALLED
        why = ", most likely for want of memory" if number == signal.SIGKILL else ""
        return 1, f"its process was ended by {signal.Signals(number).name}{why}"
    return code, message


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep a process that starts meanwhile from running the script anew that called `duel` without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _train(flags: TrainConfig, quiet: bool, sender: Connection) -> None:
    end_with_parent()
    protect_output()
    console, started, message = Console(quiet=quiet), time.monotonic(), ""
    try:
        gpus = visible_gpus() if flags.folds else []
        if wants_side_by_side(flags, gpus):
            code = train_side_by_side(flags, gpus, console, started)
        else:
            code = run_training(flags, console, started).exit_code
    except MambaHomeError as error:
        code, message = 2, str(error)
    sender.send(message)
    sys.exit(code)


def run_duel(config: DuelConfig, console: Console, train: Train = train_in_own_process) -> DuelResult:
    """Train and compare as `config` says; see `duel`."""
    _check(config)
    contestants, lines = contestants_of(config)
    output = config.output_dir
    open_output(output, (DUEL, PAGE))
    with locked(output, "duel"):
        record = {"configuration": asdict(config), "contestants": _recorded(output, contestants)}
        write_json(output / DUEL, record | {"status": "running"}, "--output_dir")
        for line in lines:
            say(console, line)
        failures: dict[str, str] = {}
        # All contestants of a seed first, so that what was begun together is of all.
        pairs = [*product(range(config.seeds), contestants)]
        for number, (seed, one) in enumerate(pairs, 1):
            home = _home(output, one, seed)
            if _ended(home, one.flags):
                continue
            say(console, f"Training {number} of {len(pairs)}: {one.name}, seed {seed}, in {home}")
            code, message = train(replace(one.flags, seed=seed, output_dir=home), console)
            if code > SIGNALLED:
                say(console, f"Next, to continue: {_line(config)}")
                return DuelResult(output, code)
            if not _ended(home, one.flags):
                failures[f"{one.name}, seed {seed}"] = message or _why_not_ended(home, one.flags, code)
            last_of_first = one is contestants[0] and (code == 2 or seed == config.seeds - 1)
            if last_of_first and not any(_ended(_home(output, one, n), one.flags) for n in range(config.seeds)):
                # With nobody to compare with, the others would be trained for nothing.
                raise _untrained(one, failures)
        standings = compare(output, contestants, range(config.seeds), failures)
        result = _write(output, config, record, standings, failures)
    return result


def _check(config: DuelConfig) -> None:
    for name in ("folds", "seeds"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}; expected 1 or more")
    for name in ("steps", "max_minutes"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ConfigError(f"--{name} {getattr(config, name)}; expected a positive number")
    if config.steps is not None and config.max_minutes is not None:
        raise ConfigError(f"--steps {config.steps} with --max_minutes {config.max_minutes:g}; expected one of the two")
    if not config.against:
        raise ConfigError("--against names nobody; expected a network, or flags such as mixer=conv")


def _recorded(output: Path, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Flags of all contestants that took part so far. Raises ConfigError where one of today has other flags."""
    before = read_json(output / DUEL).get("contestants", {}) if (output / DUEL).is_file() else {}
    now = {one.name: jsonable(asdict(replace(one.flags, given=(), max_minutes=one.minutes))) for one in contestants}
    for name, flags in now.items():
        earlier = all_flags(before[name]["flags"]) if name in before else flags
        differ = [flag for flag in flags if flags[flag] != earlier.get(flag)]
        if changed := [f"{flag} was {earlier.get(flag)}, now {flags[flag]}" for flag in differ]:
            action = "Give the flags that it began with, or name another --output_dir"
            raise ConfigError(f"{output} holds a duel of other settings: {name}: {'; '.join(changed)}. {action}")
    return before | {name: {"flags": flags} for name, flags in now.items()}


def _home(output: Path, one: Contestant, seed: int) -> Path:
    return output / one.folder / f"seed_{seed}"


def _networks(home: Path, flags: TrainConfig) -> list[Path]:
    """Folders of the folds of a run."""
    return [home / f"{FOLD}_{fold}" for fold in (range(flags.folds or 0) if flags.fold is None else [flags.fold])]


def _scores(home: Path, flags: TrainConfig) -> Path:
    """The folder of a run's scores of the cases held out."""
    return home / CROSS_VALIDATION if flags.fold is None else home / f"{FOLD}_{flags.fold}" / VALIDATION


def _ended(home: Path, flags: TrainConfig) -> bool:
    """Whether a run came to its end and has scores."""
    try:
        reports = [read_json(network / "run.json") for network in _networks(home, flags)]
        cases = read_json(_scores(home, flags) / SUMMARY).get("cases")
    except DatasetError:
        return False
    return bool(cases) and all(report.get("status") == "finished" for report in reports)


def _why_not_ended(home: Path, flags: TrainConfig, code: int) -> str:
    """What its networks say, such as numbers that are not finite; else the exit code."""
    found = {network.name: earlier_report(network).get("status", "not begun") for network in _networks(home, flags)}
    said = "; ".join(f"{name}: {status}" for name, status in found.items() if status != "finished")
    return said or f"train ended with exit code {code}, without scores"


def _line(config: DuelConfig) -> str:
    """The command line of a duel."""
    words = [str(config.folder), "--against", *config.against, "--output_dir", str(config.output_dir)]
    for name in ("model", "folds", "max_minutes", "steps", "seeds", "equal"):
        value = getattr(config, name)
        words += [f"--{name}", as_typed(value)] if value != getattr(DuelConfig, name) else []
    return command_line("duel", *words)


# --- Comparing -------------------------------------------------------------------------------------------------------


def compare(
    output: Path, contestants: Sequence[Contestant], seeds: Sequence[int], failures: dict[str, str]
) -> tuple[Standing, ...]:
    """What each contestant reached beside the first, by the runs in `output` that have ended.

    failures: gets the cases without a score. Raises TrainingError: the first contestant has no run that ended.
    """
    standings: list[Standing] = []
    data: dict[int, Any] = {}
    for one in contestants:
        homes = {seed: home for seed in seeds if _ended(home := _home(output, one, seed), one.flags)}
        for seed, home in [*homes.items()]:
            own = _data(home, one.flags)
            if data.setdefault(seed, own) != own:
                failures[f"{one.name}, seed {seed}"] = f"{home} was trained or scored on other cases"
                del homes[seed]
            for entry in read_json(_scores(home, one.flags) / SUMMARY).get("failures", ()):
                failures[f"{one.name}, seed {seed}, {entry['case']}"] = str(entry["reason"])
        if not standings and not homes:
            raise _untrained(one, failures)
        if homes:
            changed = {flag for flag, value in vars(one.flags).items() if value != getattr(contestants[0].flags, flag)}
            alike = [name for name, flag in _ALIKE.items() if flag not in changed]
            if "batch_size" not in one.flags.given:  # it fills the memory
                alike.remove("global_batch")
            standings.append(_standing(one, [*homes.values()], alike, standings[0] if standings else None))
    return tuple(standings)


def _untrained(first: Contestant, failures: Mapping[str, str]) -> TrainingError:
    reason = next(iter(failures.values()), "none of its runs has ended")
    return TrainingError(f"{first.name}, the first contestant, could not be trained: {reason}")


def _data(home: Path, flags: TrainConfig) -> list[Any]:
    """What tells the cases of each fold from others."""
    return [read_json(network / "run.json").get("data", {}).get("digests") for network in _networks(home, flags)]


def _given(report: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a network, by its run.json."""
    configuration = {name: report.get("configuration", {}).get(name) for name in ("model", "recipe", "strides")}
    settings = configuration | {"device": report.get("device")} | dict(report.get("training", {}))
    settings |= {f"network: {name}": value for name, value in report.get("model", {}).items()}
    return {name: as_typed(value) for name, value in settings.items() if name not in _NOT_GIVEN and value is not None}


def _standing(one: Contestant, homes: Sequence[Path], alike: Sequence[str], first: Standing | None) -> Standing:
    seeds = tuple(tuple(read_evaluation(_scores(home, one.flags)).scores) for home in homes)
    networks = [network for home in homes for network in _networks(home, one.flags)]
    reports = [read_json(network / "run.json") for network in networks]
    tables = [[*_rows(network / "metrics.csv")] for network in networks]
    given = [*map(_given, reports)]
    known = given[0] if first is None else first.given
    unlike = tuple(name for name in alike if any(each.get(name) != known.get(name) for each in given))
    curves = tuple(map(tuple, map(_curve, tables)))
    standing = Standing(one.name, seeds, _cost(reports, tables), curves, given[0], unlike=unlike)
    if first is None:
        return standing
    structures = structures_of(row for scores in (*seeds, *first.seeds) for row in scores)
    return replace(
        standing,
        differences={metric: compare_systems(seeds, first.seeds, metric) for metric in METRICS},
        structures={name: compare_systems(seeds, first.seeds, "dice", name) for name in structures},
    )


def _rows(file: Path) -> Iterator[dict[str, float]]:
    """Rows of a metrics.csv as numbers, without what is empty; seconds go on where a resumed run counts anew."""
    earlier = last = 0.0
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            numbers = {name: float(text) for name, text in row.items() if text}
            if numbers["seconds"] < last:
                earlier += last
            last = numbers["seconds"]
            yield numbers | {"seconds": earlier + last}


def _curve(rows: Sequence[Mapping[str, float]]) -> list[tuple[float, float, float]]:
    validated = (row for row in rows if math.isfinite(row.get("val_dice", math.nan)))
    return [(row["seconds"] / 60, row["step"], row["val_dice"]) for row in validated]


def _cost(reports: Sequence[Mapping[str, Any]], tables: Sequence[Sequence[Mapping[str, float]]]) -> Cost:
    def known(values: Any) -> list[float]:
        return [float(value) for value in values if value is not None] or [math.nan]

    speeds = known(row.get("images_per_second") for rows in tables for row in rows)
    return Cost(
        parameters=known(report.get("parameters") for report in reports)[0] / 1e6,
        gib=max(known((report.get("memory") or {}).get("xla_gib") for report in reports)),
        images_per_second=float(np.median(speeds)),
        compile_seconds=max(known(report.get("compile_seconds") for report in reports)),
        steps=float(np.mean(known(report.get("step") for report in reports))),
        minutes=float(np.mean(known(report.get("seconds") for report in reports))) / 60,
    )


def _write(
    output: Path,
    config: DuelConfig,
    record: Mapping[str, Any],
    standings: tuple[Standing, ...],
    failures: Mapping[str, str],
) -> DuelResult:
    """Write duel.json and the page. Raises OutputError."""
    code = int(bool(failures))
    entries = {
        one.name: {
            "seeds": len(one.seeds),
            "scores": {metric: one.mean(metric) for metric in METRICS},
            "differences": {metric: asdict(found) for metric, found in one.differences.items()},
            "structures": {name: asdict(found) for name, found in one.structures.items()},
            "cost": one.cost._asdict(),
        }
        for one in standings
    }
    contestants = {name: entry | entries.get(name, {}) for name, entry in record["contestants"].items()}
    said = verdicts(standings)
    cases = len({row.case for scores in standings[0].seeds for row in scores})
    lead = f"{len(standings)} networks, {cases} cases held out, {config.seeds} seed{'s' * (config.seeds != 1)}."
    told = [(what, without_folders(reason, [output, config.folder])) for what, reason in failures.items()]
    page = render_duel(standings, told, lead)
    write_text(output / PAGE, page, "--output_dir")
    ended = {"status": "finished", "exit_code": code, "verdicts": said, "failures": failures}
    write_json(output / DUEL, {**record, "contestants": contestants, **ended}, "--output_dir")
    return DuelResult(output, code, standings, tuple(said), failures, output / PAGE)
