"""A duel: contestants trained on the same folds, scored on the same cases, and what their differences come to.

OUT/<contestant>/seed_<n> is a run of `train` like any other, in a process of its own: what one leaves on a device, or
has compiled, is nothing to the next. A duel that was killed trains what has not ended, and writes the same scores.
"""

import csv
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from rich.console import Console

from mambahome_jax.errors import ConfigError, DatasetError, TrainingError
from mambahome_jax.evaluation.results import METRICS, read_evaluation, structures_of
from mambahome_jax.evaluation.systems import compare_systems
from mambahome_jax.flags import DuelConfig, TrainConfig
from mambahome_jax.recipes import as_typed
from mambahome_jax.reporting.duel import Cost, Standing, corrected_p, render_duel, verdicts
from mambahome_jax.reporting.report import without_folders
from mambahome_jax.support.console import command_line, counted, say
from mambahome_jax.support.devices import visible_gpus
from mambahome_jax.support.files import json_form, jsonable, read_json, write_json, write_text
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.training.contestants import Contestant, contestants_of
from mambahome_jax.training.distributed import launched_as_several
from mambahome_jax.training.held_out import FOLDER as VALIDATION
from mambahome_jax.training.held_out import SUMMARY
from mambahome_jax.training.run_report import all_flags, earlier_report
from mambahome_jax.training.runs import SIGNALLED
from mambahome_jax.training.side_by_side import Job, run_jobs, slots_of
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


@dataclass(frozen=True)
class DuelResult:
    """A duel that ended, or was stopped by a signal (exit code 128 + its number), then without standings.

    standings: the first contestant first. verdicts: a sentence for each of the others. failures: run or case -> reason.
    report: the page. shared: what is to be known of minutes where trainings shared a device.
    """

    folder: Path
    exit_code: int
    standings: tuple[Standing, ...] = ()
    verdicts: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    report: Path | None = None
    shared: str = ""


@shows_keywords(DuelConfig)
def duel(*, progress: bool = False, **flags: "Unpack[DuelFlags]") -> DuelResult:
    """Train and compare networks as `mambahome duel` does, silently; keywords are its flags.

    Raises:
        ConfigError, DatasetError, OutputError: before anything is trained.
        TrainingError: the first contestant could not be trained.
    """
    return run_duel(from_keywords(DuelConfig, flags), Console(quiet=not progress))


def run_duel(config: DuelConfig, console: Console) -> DuelResult:
    """Train and compare as `config` says; see `duel`."""
    _check(config)
    contestants, lines = contestants_of(config)
    output = config.output_dir
    open_output(output, (DUEL, PAGE))
    with locked(output, "duel"):
        record = {"configuration": asdict(config), "contestants": _recorded(config, contestants)}
        write_json(output / DUEL, record | {"status": "running"}, "--output_dir")
        trainings = _Trainings(config, contestants, console)
        for line in filter(None, (*lines, trainings.shared)):
            say(console, line)
        if number := trainings.run():
            say(console, f"Next, to continue: {_line(config)}")
            return DuelResult(output, SIGNALLED + number)
        standings = compare(output, contestants, range(config.seeds), trainings.failures)
        result = _write(config, record, standings, trainings.failures, trainings.shared)
    return result


class _Trainings:
    """The trainings of a duel: one after the other, or several at the same time, which train a fold each.

    failures: run -> why it has no scores. shared: what is to be known of minutes where several share a device.
    """

    def __init__(self, config: DuelConfig, contestants: Sequence[Contestant], console: Console):
        self.first, self.console = contestants[0], console
        gpus = [] if launched_as_several(os.environ) else visible_gpus()
        self.slots = slots_of(gpus, config.at_once)
        self.apart = len(self.slots) > 1
        # All contestants of a seed first, so that what was begun together is of all.
        pairs = product(range(config.seeds), contestants)
        self.runs = {_home(config.output_dir, one, seed): (one, seed) for seed, one in pairs}
        # How many trainings of a run are not over yet.
        self.left = dict.fromkeys(self.runs, 0)
        self.failures, self.waiting = dict[str, str](), deque[Job]()
        trainings = [(home, flags) for home in self.runs for flags in self._networks(home)]
        for number, (home, flags) in enumerate(trainings, 1):
            if not (_ended(home, self.runs[home][0].flags) or (self.apart and _all_finished(home, flags))):
                self._add(home, flags, f"Training {number} of {len(trainings)}: ")
        for home, (one, _) in self.runs.items():
            if not self.left[home] and not _ended(home, one.flags):
                self._add(home, self._flags(home))
        timed = self.first.minutes is not None
        self.shared = _shared_line(len(trainings), len(gpus) or 1, config.at_once, timed) if config.at_once > 1 else ""

    def _name(self, home: Path) -> str:
        one, seed = self.runs[home]
        return f"{one.name}, seed {seed}"

    def _flags(self, home: Path) -> TrainConfig:
        one, seed = self.runs[home]
        return replace(one.flags, seed=seed, output_dir=home)

    def _networks(self, home: Path) -> list[TrainConfig]:
        """The flags of each training of a run."""
        flags, minutes = self._flags(home), self.runs[home][0].minutes
        if flags.fold is not None or not self.apart:
            return [flags]
        return [replace(flags, fold=fold, max_minutes=minutes) for fold in range(flags.folds or 0)]

    def _add(self, home: Path, flags: TrainConfig, title: str = "") -> None:
        name = self._name(home)
        log = _folds(home, flags)[0] / "log.txt"
        if self.apart and flags.fold is None:
            name, log = f"{name}, scores of all folds", _scores(home, flags)
        elif self.apart and self.runs[home][0].flags.fold is None:
            name = f"{name}, fold {flags.fold}"
        self.left[home] += 1
        self.waiting.append(Job(title + name + ("" if self.apart else f", in {home}"), name, flags, log))

    def run(self) -> int | None:
        """Train what has not ended; the signal that stopped it, or None. Raises TrainingError: nothing to compare."""
        loud = not self.apart and not self.console.quiet
        return run_jobs(self.waiting, self.slots, self.console, self._note, time.monotonic(), loud)

    def _note(self, job: Job, code: int, message: str) -> None:
        """Note how a training ended, and what follows from that."""
        home = job.flags.output_dir
        assert home is not None  # see _flags
        one, name = self.runs[home][0], self._name(home)
        if code > SIGNALLED:
            # No signal to the duel: the system or a crash ended this one alone.
            message, code = f"its process was ended by {_ender(code)}", 1
        if not _ended(home, job.flags):
            reason = message or _why_not_ended(home, job.flags, code)
            self.failures.setdefault(name, reason)
            if self.apart:
                say(self.console, f"{job.name}: {reason}")
        self.left[home] -= 1
        for other in [each for each in self.waiting if each.flags.output_dir == home and code == 2]:
            self.waiting.remove(other)
            self.left[home] -= 1
        if not self.left[home] and _ended(home, one.flags):
            self.failures.pop(name, None)
        elif not self.left[home] and job.flags.fold != one.flags.fold and _all_finished(home, one.flags):
            self._add(home, self._flags(home))
        of_first = [home for home, (each, _) in self.runs.items() if each is self.first]
        over = name in self.failures and (code == 2 or not any(self.left[home] for home in of_first))
        if one is self.first and over and not any(_ended(home, one.flags) for home in of_first):
            # With nobody to compare with, the others would be trained for nothing.
            raise _untrained(one, self.failures)


def _shared_line(trainings: int, devices: int, at_once: int, timed: bool) -> str:
    """Say what minutes and speeds are worth where several trainings share a device, and whether all had as much."""
    line = f"Minutes and images/s are those of up to {at_once} trainings at the same time on each device"
    places = devices * at_once
    if timed and trainings % (places if trainings > places else devices):
        line += (
            f". {trainings} trainings do not fill {places} places evenly: those with fewer beside them do more steps"
        )
    return line


def _check(config: DuelConfig) -> None:
    for name in ("folds", "seeds", "at_once"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} {getattr(config, name)}; expected 1 or more")
    for name in ("steps", "max_minutes"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ConfigError(f"--{name} {getattr(config, name)}; expected a positive number")
    if config.steps is not None and config.max_minutes is not None:
        raise ConfigError(f"--steps {config.steps} with --max_minutes {config.max_minutes:g}; expected one of the two")
    if not config.against:
        raise ConfigError("--against names nobody; expected a network, or flags such as mixer=conv")


def _recorded(config: DuelConfig, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Flags of all contestants that took part so far. Raises ConfigError where one of today has other flags."""
    output = config.output_dir
    record, before = _earlier(output / DUEL)
    now = {one.name: jsonable(asdict(replace(one.flags, given=(), max_minutes=one.minutes))) for one in contestants}
    changes = []
    for name, flags in now.items():
        earlier = all_flags(before[name]["flags"]) if name in before else flags
        differ = [flag for flag in flags if flags[flag] != earlier.get(flag)]
        if differ:
            changes.append(
                f"{name}: " + "; ".join(f"{flag} was {earlier.get(flag)}, now {flags[flag]}" for flag in differ)
            )
    at_once = record.get("at_once", DuelConfig.at_once)
    if before and at_once != config.at_once and contestants[0].minutes is not None:
        changes.append(f"at_once was {at_once}, now {config.at_once}, which share the minutes otherwise")
    if changes:
        action = "Give the flags that it began with, or name another --output_dir"
        raise ConfigError(f"{output} holds a duel of other settings: {changes[0]}. {action}")
    return before | {name: {"flags": flags} for name, flags in now.items()}


def _earlier(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and contestants of the duel of a folder. Raises DatasetError: not as a duel writes them."""
    action = "Remove it: what was trained stays, and the duel writes it anew"
    record = read_json(file, action) if file.is_file() else {}
    parts = [record.get(name, {}) for name in ("configuration", "contestants")]
    entries = [*parts, *(parts[1].values() if isinstance(parts[1], dict) else ())]
    entries += [entry.get("flags") for entry in entries[2:] if isinstance(entry, dict)]
    for found in entries:
        if not isinstance(found, dict):
            expected = "configuration, contestants and the flags of each to be objects"
            raise DatasetError(f"{json_form(found)} in it", file=file, expected=expected, action=action)
    return parts[0], parts[1]


def _home(output: Path, one: Contestant, seed: int) -> Path:
    return output / one.folder / f"seed_{seed}"


def _folds(home: Path, flags: TrainConfig) -> list[Path]:
    """Folders of the folds of a run."""
    return [home / f"{FOLD}_{fold}" for fold in (range(flags.folds or 0) if flags.fold is None else [flags.fold])]


def _scores(home: Path, flags: TrainConfig) -> Path:
    """The folder of a run's scores of the cases held out."""
    return home / CROSS_VALIDATION if flags.fold is None else home / f"{FOLD}_{flags.fold}" / VALIDATION


def _ended(home: Path, flags: TrainConfig) -> bool:
    """Whether a run came to its end and has scores."""
    try:
        cases = read_json(_scores(home, flags) / SUMMARY).get("cases")
    except DatasetError:
        return False
    return bool(cases) and _all_finished(home, flags)


def _all_finished(home: Path, flags: TrainConfig) -> bool:
    """Whether all networks of a run came to their end."""
    return all(earlier_report(network).get("status") == "finished" for network in _folds(home, flags))


def _why_not_ended(home: Path, flags: TrainConfig, code: int) -> str:
    """What its networks say, such as numbers that are not finite; else the exit code."""
    found = {network.name: earlier_report(network).get("status", "not begun") for network in _folds(home, flags)}
    said = "; ".join(f"{name}: {status}" for name, status in found.items() if status != "finished")
    return said or f"train ended with exit code {code}, without scores"


def _line(config: DuelConfig) -> str:
    """The command line of a duel."""
    words = [str(config.folder), "--against", *config.against, "--output_dir", str(config.output_dir)]
    for name in ("model", "folds", "max_minutes", "steps", "seeds", "equal", "at_once"):
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
    return [read_json(network / "run.json").get("data", {}).get("digests") for network in _folds(home, flags)]


def _given(report: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a network, by its run.json."""
    configuration = {name: report.get("configuration", {}).get(name) for name in ("model", "recipe", "strides")}
    settings = configuration | {"device": report.get("device")} | dict(report.get("training", {}))
    settings |= {f"network: {name}": value for name, value in report.get("model", {}).items()}
    given = {name: value for name, value in settings.items() if name not in _NOT_GIVEN and value is not None}
    return {name: as_typed(value) or "none" for name, value in given.items()}


def _standing(one: Contestant, homes: Sequence[Path], alike: Sequence[str], first: Standing | None) -> Standing:
    seeds = tuple(tuple(read_evaluation(_scores(home, one.flags)).scores) for home in homes)
    networks = [network for home in homes for network in _folds(home, one.flags)]
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
        training_minutes=float(np.mean(known(rows[-1]["seconds"] if rows else None for rows in tables))) / 60,
        steps=float(np.mean(known(report.get("step") for report in reports))),
        minutes=float(np.mean(known(report.get("seconds") for report in reports))) / 60,
    )


def _write(
    config: DuelConfig,
    record: Mapping[str, Any],
    standings: tuple[Standing, ...],
    failures: Mapping[str, str],
    shared: str,
) -> DuelResult:
    """Write duel.json and the page. shared: see `_Trainings`. Raises OutputError."""
    output, code = config.output_dir, int(bool(failures))
    corrected = {metric: corrected_p(standings, metric) for metric in METRICS}
    entries = {
        one.name: {
            "seeds": len(one.seeds),
            "scores": {metric: one.mean(metric) for metric in METRICS},
            "differences": {metric: asdict(found) for metric, found in one.differences.items()},
            "structures": {name: asdict(found) for name, found in one.structures.items()},
            "p_holm": {metric: p[one.name] for metric, p in corrected.items() if one.name in p},
            "cost": one.cost._asdict(),
        }
        for one in standings
    }
    contestants = {name: entry | entries.get(name, {}) for name, entry in record["contestants"].items()}
    said = verdicts(standings)
    cases = len({row.case for scores in standings[0].seeds for row in scores})
    flags = record["contestants"][standings[0].name]["flags"]
    unit = next(name for name in ("max_minutes", "steps", "epochs") if flags[name] is not None)
    lead = (
        f"{len(standings)} networks, {counted(cases, 'case')} held out, {counted(config.seeds, 'seed')}, "
        f"{flags[unit]:g} {unit.removeprefix('max_')} of training each." + f" {shared}." * bool(shared)
    )
    told = [(what, without_folders(reason, [output, config.folder])) for what, reason in failures.items()]
    page = render_duel(standings, told, lead)
    write_text(output / PAGE, page, "--output_dir")
    ended = {"status": "finished", "exit_code": code, "verdicts": said, "failures": failures}
    write_json(output / DUEL, {**record, "contestants": contestants, **ended}, "--output_dir")
    return DuelResult(output, code, standings, tuple(said), failures, output / PAGE, shared)


def _ender(code: int) -> str:
    """Name the signal of a process that ended so; Windows has none, and gives a number of its own."""
    try:
        name = signal.Signals(code - SIGNALLED).name
    except ValueError:
        return f"the system, with exit code {code:#x}"
    return f"{name}, most likely for want of memory" if name == "SIGKILL" else name
