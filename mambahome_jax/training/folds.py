"""The networks of one command: seeds of an ensemble (--members), or folds of a cross-validation and its scores.

A fold is a run like any other, with the cases that it holds out marked "val". It is validated on them for its curves,
but keeps its last weights, so that its scores are of a network that was chosen on nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mambahome_jax.datasets.base import Split
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, usable_cases
from mambahome_jax.datasets.splits import held_out_folds
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.evaluation.evaluate import make_summary, provenance_of
from mambahome_jax.evaluation.pairs import Pair
from mambahome_jax.evaluation.results import Score, finite_mean, number, read_evaluation, results_table, structures_of
from mambahome_jax.flags import EvaluateConfig, TrainConfig
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.plan import is_given
from mambahome_jax.support.console import counted, say
from mambahome_jax.support.files import read_json
from mambahome_jax.support.output_folder import open_output
from mambahome_jax.training import held_out
from mambahome_jax.training.checkpoints import holds_run
from mambahome_jax.training.run_report import earlier_report
from mambahome_jax.weights.model_path import CROSS_VALIDATION, FOLD, MEMBER

# The gain in Dice from which on only the largest part of a structure is kept; metrics.csv has six digits.
WORTH = 1e-4
# Settings that follow from the cases of a fold, or change nothing that it learns.
_OF_A_FOLD = {
    *("train_cases", "total_steps", "steps_per_period", "t_max", "labelled"),
    *("max_minutes", "num_workers", "use_checkpoint"),
}


@dataclass(frozen=True)
class Network:
    """One of several: the folder of its run, its flags, and the line with which it begins.

    scale: its part of the time of the command, to that with which it began; see `_minutes_of`.
    """

    folder: Path
    flags: TrainConfig
    title: str
    scale: float = 1.0


def networks_of(flags: TrainConfig, folder: Path, at_once: int = 1) -> list[Network]:
    """The networks of --folds or --members, in their order; none where `folder` is the run of a single one.

    at_once: networks that are trained at the same time, in the minutes of one. Raises ConfigError: flags that do not go
    together, a folder that holds other runs, or runs without --resume.
    """
    _check(flags)
    kind = MEMBER if flags.folds is None else FOLD
    several = flags.folds is not None or flags.members != 1
    for other, flag in ((FOLD, "--folds"), (MEMBER, "--members")):
        if holds_run(folder / f"{other}_0") and not (several and other == kind):
            raise ConfigError(f"{folder} holds several networks. Say {flag}, or name another --output_dir")
    if not several:
        return []
    if holds_run(folder):
        raise ConfigError(f"{folder} holds the run of one network already. Name another --output_dir")
    if flags.folds is not None and holds_run(folder / f"{FOLD}_{flags.folds}"):
        raise ConfigError(f"{folder} holds more than --folds {flags.folds}. Name another --output_dir")
    numbers = range(flags.folds or flags.members) if flags.fold is None else [flags.fold]
    networks = [_network(flags, folder / f"{kind}_{number}", number, len(numbers), at_once) for number in numbers]
    held = [network.folder for network in networks if holds_run(network.folder)]
    if held and not (flags.resume or flags.load_checkpoint):
        raise ConfigError(f"{held[0]} holds a run already. Continue all with --resume, or name another --output_dir")
    return networks


def _minutes_of(home: Path, share: float, shares: Sequence[float]) -> float:
    """The minutes of a network: its share, or that with which it began on another number of GPUs.

    shares: those of all numbers of GPUs. With other minutes of the command it is none of them, which the run refuses.
    """
    began = earlier_report(home).get("configuration", {}).get("max_minutes") if holds_run(home) else None
    return next((began for each in shares if began is not None and math.isclose(began, each)), share)


def rounds_of(networks: int, at_once: int) -> int:
    """How many times networks are begun, `at_once` each time."""
    return -(-networks // at_once)


def _check(flags: TrainConfig) -> None:
    if flags.members < 1:
        raise ConfigError(f"--members {flags.members}; expected 1 or more")
    if flags.folds is None:
        if flags.fold is not None:
            raise ConfigError(f"--fold {flags.fold} without --folds; expected both")
        return
    if flags.folds < 2:
        raise ConfigError(f"--folds {flags.folds}; expected 2 or more")
    if flags.fold is not None and not 0 <= flags.fold < flags.folds:
        raise ConfigError(f"--fold {flags.fold}; expected 0 to {flags.folds - 1} with --folds {flags.folds}")
    for name in ("data_val", "hold_out", "members"):
        if is_given(flags, name):
            raise ConfigError(f"--{name} with --folds; the folds say which cases are held out. Leave one of them out")


def _network(flags: TrainConfig, folder: Path, number: int, networks: int, at_once: int) -> Network:
    own, scale = replace(flags, output_dir=folder, checkpoint_name=""), 1.0
    if flags.max_minutes is not None:
        shares = [flags.max_minutes / rounds_of(networks, each) for each in range(1, networks + 1)]
        share = flags.max_minutes / rounds_of(networks, at_once)
        minutes = _minutes_of(folder, share, shares)
        # Minutes that are not positive are refused when a network begins.
        own, scale = replace(own, max_minutes=minutes), share / minutes if minutes > 0 else 1.0
    if flags.folds is not None:
        title = f"Fold {number} of 0 to {flags.folds - 1}, in {folder}"
        return Network(folder, replace(own, fold=number), title, scale)
    own = replace(own, members=1, seed=flags.seed + number)
    return Network(folder, own, f"Network {number + 1} of {flags.members}, seed {own.seed}, in {folder}", scale)


def divide_cases(prepared: Prepared, flags: TrainConfig) -> tuple[tuple[str, ...], ...]:
    """Ids of the cases that each of --folds holds out: by patient, structures and modalities spread evenly."""
    assert flags.folds is not None
    entries = map(Store(prepared.store).entry, [case.id for case in usable_cases(prepared)])
    traits = {entry.id: [entry.modality, *map(str, entry.foreground_counts)] for entry in entries}
    return held_out_folds(prepared, flags.folds, _fold_seed(flags), traits)


def _fold_seed(flags: TrainConfig) -> int:
    return flags.seed if flags.fold_seed is None else flags.fold_seed


def fold_lines(prepared: Prepared, held_out_cases: Sequence[Sequence[str]], flags: TrainConfig) -> list[str]:
    """Say how the cases were divided."""
    cases = usable_cases(prepared)
    how = (
        "the folds that come with the dataset"
        if cases[0].fold is not None
        else f"by patient, from seed {_fold_seed(flags)}"
    )
    sizes = ", ".join(str(len(part)) for part in held_out_cases)
    lines = [f"Cases held out by the {len(held_out_cases)} folds: {sizes}; {how}"]
    marked = Counter(case.split for case in cases)["val"]
    if marked and cases[0].fold is None:
        lines.append(
            f"Note: {counted(marked, 'case', 'are')} marked val by the dataset, but in the folds like all others"
        )
    return lines


# --- Scores of all folds ---------------------------------------------------------------------------------------------


def missing_folds(folder: Path, held_out_cases: Sequence[Sequence[str]]) -> dict[int, str]:
    """{fold: why its scores cannot be counted} of those in `folder` that have not ended, or hold other cases out."""
    missing = {}
    for fold, cases in enumerate(held_out_cases):
        report = earlier_report(folder / f"{FOLD}_{fold}")
        if report.get("status") != "finished":
            missing[fold] = str(report.get("status", "not begun"))
        elif {*report.get("data", {}).get("digests", {}).get("val", ())} != {*cases}:
            missing[fold] = f"it holds out other cases; remove {folder / f'{FOLD}_{fold}'} first"
    return missing


def cross_validate(folder: Path, prepared: Prepared, held_out_cases: Sequence[Sequence[str]]) -> Mapping[str, Any]:
    """Pool the scores of all folds in `folder`, write cross_validation/, and return its summary.

    Raises OutputError, and DatasetError: scores of a fold that cannot be read.
    """
    output = folder / CROSS_VALIDATION
    homes = [folder / f"{FOLD}_{fold}" / held_out.FOLDER for fold in range(len(held_out_cases))]
    summaries = [_summary(home, cases) for home, cases in zip(homes, held_out_cases, strict=True)]
    names = {int(value): name for summary in summaries for value, name in summary["labels"].items()}
    value_of = {name: value for value, name in names.items()}
    failures = {entry["case"]: entry["reason"] for summary in summaries for entry in summary["failures"]}
    failures |= {case: "no time was left" for summary in summaries for case in summary["not_segmented"]}
    scores: list[Score] = []
    splits: dict[str, Split] = {}
    for home, summary in zip(homes, summaries, strict=True):
        rows = read_evaluation(home).scores if summary["cases"] else []
        scores += [replace(row, label=value_of[row.structure]) for row in rows]
        provenance = summary["provenance"]
        splits |= {} if provenance["unknown"] else {row.case: "test" for row in rows}
        splits |= {case: "train" for case in provenance["trained_on_cases"]}
    scores.sort(key=lambda row: (row.case, row.label))
    scored = sorted({row.case for row in scores})
    config = EvaluateConfig(folder, prepared.root / "labels", output)
    pooled = make_summary(config, scores, len(scored), sorted(failures.items()), names) | {
        "provenance": provenance_of(scored, splits),
        "folds": {
            home.parent.name: {"cases": list(cases), "dice": summary["mean"]["dice"]}
            for home, cases, summary in zip(homes, held_out_cases, summaries, strict=True)
        },
        "largest_part": learn_largest(scores, [summary["largest_part"] for summary in summaries]),
        "note": "; ".join(differing_settings([home.parent for home in homes])),
    }
    open_output(output)
    held_out.forget_scores(output)
    home_of = {case: home for home, cases in zip(homes, held_out_cases, strict=True) for case in cases}
    stored = prepared.values or {value: value for value in names}
    values = {number: value for number, value in stored.items() if value in names}

    def pair(case: PreparedCase) -> Pair:
        return held_out.pair_of(home_of[case.id], prepared, case, names=names, values=values)

    held_out.write_scores(output, prepared, scores, pooled, pair)
    return pooled


def differing_settings(runs: Sequence[Path]) -> list[str]:
    """Say which folds were trained otherwise than the first, as another machine or other flags may have it."""
    reports = [read_json(run / "run.json") for run in runs]
    settings = [report.get("training", {}) | report.get("model", {}) for report in reports]
    lines = []
    for run, own in zip(runs, settings, strict=True):
        changes = [
            f"{name} {own.get(name)} instead of {value}"
            for name, value in settings[0].items()
            if name not in _OF_A_FOLD and own.get(name) != value
        ]
        lines += [f"{run.name} was trained with {', '.join(changes)}"] if changes else []
    return lines


def _summary(home: Path, cases: Sequence[str]) -> Mapping[str, Any]:
    """The summary of a fold's scores; where there is none, one of failures."""
    try:
        return read_json(home / held_out.SUMMARY)
    except DatasetError as error:
        failures = [{"case": case, "reason": f"{home.parent.name} has no scores: {error}"} for case in cases]
        provenance = {"unknown": 0, "trained_on_cases": []}
        nothing = {"labels": {}, "largest_part": {}, "not_segmented": [], "mean": {"dice": None}, "cases": 0}
        return nothing | {"failures": failures, "provenance": provenance}


def show_scores(folder: Path, summary: Mapping[str, Any], console: Console) -> None:
    """Print the table of the pooled scores, and what has to be known to read it."""
    if summary["cases"]:
        console.print(results_table(summary, console.width))
        text = f"Scores of {counted(summary['cases'], 'case')}, each by the network that was not trained on it"
        say(console, f"{text}, with the report, in {folder / CROSS_VALIDATION}")
        say(console, f"Dice of the folds: {', '.join(number(fold['dice'], 3) for fold in summary['folds'].values())}")
    if summary["provenance"]["trained_on"] or summary["provenance"]["unknown"]:
        say(console, f"Note: {summary['provenance']['summary']}")
    if summary["note"]:
        say(console, f"Note: {summary['note']}")
    for failure in summary["failures"]:
        say(console, f"Not scored: {failure['case']}: {failure['reason']}")
    for name, entry in summary["largest_part"].items():
        if entry["kept"]:
            both = f"Dice {number(entry['dice_of_largest_part'], 3)} instead of {number(entry['dice'], 3)}"
            say(console, f"Of {name}, infer keeps the largest part alone: {both}")


def learn_largest(
    scores: Sequence[Score], parts: Sequence[Mapping[str, Mapping[str, float | None]]]
) -> dict[str, dict[str, Any]]:
    """For each structure its mean Dice, that of its largest connected part alone, and whether infer keeps only that.

    parts: of each fold, structure -> case -> Dice of the largest part, None where the reference has no such structure.
    """
    table = {}
    for name in structures_of(scores):
        whole = {row.case: row.dice for row in scores if row.structure == name}
        part = {case: value for fold in parts for case, value in fold.get(name, {}).items() if case in whole}
        pairs = np.array([(whole[case], value) for case, value in part.items()], np.float64).reshape(-1, 2)
        dice, largest = finite_mean(pairs, axis=0).tolist()
        table[name] = {"dice": dice, "dice_of_largest_part": largest, "kept": largest > dice + WORTH}
    return table
