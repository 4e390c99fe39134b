"""evaluate: label maps against references, into metrics.csv, summary.json and a table, and against another run."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mambahome_jax.commands.evaluate_tables import comparison_table, results_table
from mambahome_jax.datasets.files import common_name, counterparts, fault_of_name, listing, scan_files, twins_note
from mambahome_jax.datasets.prepared import unlisted_files
from mambahome_jax.datasets.scans import of_labels, search
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError
from mambahome_jax.evaluation.evaluate import (
    DEFINITIONS,
    DEFINITIONS_BY_AREA,
    Pair,
    evaluate_case,
    summarise,
    write_metrics,
    write_summary,
)
from mambahome_jax.evaluation.files import Evaluation, read_evaluation
from mambahome_jax.evaluation.label_tables import named_pairs
from mambahome_jax.evaluation.paired import compare_runs
from mambahome_jax.evaluation.scores import Score
from mambahome_jax.evaluation.statistics import describe
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.imaging.dicom_series import files_in, sort_out
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, alternatives, scan_stem
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.support.console import command_line, progress_bar, say
from mambahome_jax.support.files import write_json
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import real_path
from mambahome_jax.support.processes import run_jobs, usable_cores

# Starting a process takes about as long as a handful of small cases; files below this many bytes are small.
SMALL_BYTES = 20_000_000
SHOWN = 10
_REFERENCE = "reference_volume_ml"
_DICOM = "DICOM, which is not compared. Convert it, or segment with --output_format nii.gz"


def run(config: EvaluateConfig) -> int:
    """Score config.predictions against config.references; returns the exit code.

    0 all cases scored, 1 some have no counterpart or cannot be scored, 2 none could be scored.
    Raises DatasetError (no pairs, no names where they were asked for, no evaluation at config.compare), ConfigError and
    OutputError.
    """
    console = Console()
    require_scale(config.spacing_scale)
    if not config.tolerance_mm >= 0:
        raise ConfigError(f"--tolerance_mm {config.tolerance_mm}; expected 0 or more")
    if config.num_workers is not None and config.num_workers < 0:
        raise ConfigError(f"--num_workers {config.num_workers}; expected 0 or more")
    pairs, alone = find_pairs(config.predictions, config.references, {}, config.tolerance_mm)
    pairs, names, values, source = named_pairs(pairs, config.predictions, config.references, config.labels)
    pairs = [dataclasses.replace(pair, surface=config.surface, spacing_scale=config.spacing_scale) for pair in pairs]
    if values is not None:
        text = ", ".join(f"{old} is {new} ({names.get(new, f'label_{new}')})" for old, new in values.items())
        say(console, f"The references name other values than the predictions; compared by name: {text}")
    for note in twins_note(path for pair in pairs for path in (pair.prediction, pair.reference)):
        say(console, f"Note: {note}")
    say(console, f"Names of the structures: {source or 'none found (--labels FILE gives them)'}")
    other = _other_run(config, {pair.case for pair in pairs})
    files = ["metrics.csv", "summary.json", *(["comparison.json"] if other else [])]
    with locked(config.output_dir, "evaluate"):
        open_output(config.output_dir, files)
        scores, failed = _score(pairs, config.num_workers, console)
        failures = alone + failed
        summary = summarise(scores)
        summary |= {
            "statistics": describe(scores),
            "cases": len(pairs) - len(failed),
            "failures": [{"case": case, "reason": reason} for case, reason in failures],
            "tolerance_mm": config.tolerance_mm,
            "spacing_scale": config.spacing_scale,
            "labels": {str(value): name for value, name in names.items()},
            "reference_values": None if values is None else {str(old): new for old, new in values.items()},
            "predictions": str(config.predictions),
            "references": str(config.references),
            "surface": config.surface,
            "definitions": DEFINITIONS | (DEFINITIONS_BY_AREA if config.surface == "area" else {}),
        }
        console.print(results_table(summary, console.width))
        if apart := _values_apart(scores):
            say(console, f"Note: {apart}. If they are the same structures, say by --labels what the values mean")
        for case, reason in failures[:SHOWN]:
            say(console, f"Not scored: {case}: {reason}")
        if len(failures) > SHOWN:
            say(console, f"and {len(failures) - SHOWN} more, all in {config.output_dir / 'summary.json'}")
        # After the table: scores that took hours are not lost to a disk that filled up meanwhile.
        write_metrics(config.output_dir / "metrics.csv", scores)
        write_summary(config.output_dir / "summary.json", summary)
        if other is None:
            # One of an earlier evaluation does not belong to these scores.
            with contextlib.suppress(OSError):
                (config.output_dir / "comparison.json").unlink(missing_ok=True)
        else:
            comparison = _compare(scores, other, console)
            write_json(config.output_dir / "comparison.json", comparison | {"other": str(config.compare)})
        say(console, f"Written in {config.output_dir}: {', '.join(files)}")
        if summary["cases"] == 0:
            return 2
        folders = ("--predictions", config.predictions, "--references", config.references)
        say(console, f"Next: {command_line('report', '--evaluation', config.output_dir, *folders)}")
        return 1 if failures else 0


def _values_apart(scores: list[Score]) -> str:
    """What to say where each side holds structures, but none that the other has in any case; else nothing."""
    ours, theirs = ({row.label for row in scores if getattr(row, name) > 0} for name in ("volume_ml", _REFERENCE))
    if not ours or not theirs or ours & theirs:
        return ""
    found, expected = (", ".join(map(str, sorted(values)[:SHOWN])) for values in (ours, theirs))
    return f"the predictions hold label values {found}, the references {expected}, and none of these"


def find_pairs(
    predictions: Path, references: Path, names: Mapping[int, str], tolerance_mm: float = 1.0
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Pairs of the same case in two folders (or of two files), and (case, reason) of what has no counterpart.

    Names are equal, or differ in nnU-Net's number of a channel (`counterparts`), which is no part of the case.

    Raises DatasetError: a folder is missing or without label maps, or no name is in both.
    """
    if predictions.is_file() and references.is_file():
        if not scan_stem(predictions).isprintable():
            raise DatasetError(fault_of_name(scan_stem(predictions)), file=repr(str(predictions)))
        return [Pair(scan_stem(predictions), predictions, references, names, tolerance_mm)], []
    ours, unlisted = _label_maps(predictions)
    theirs, of_no_case = _label_maps(references)
    unlisted |= of_no_case
    both = counterparts(ours, theirs)
    # A table of lines, in UTF-8, cannot have them.
    unfit = [(_shown(case), fault_of_name(case)) for case in both if not case.isprintable()]
    pairs = [
        Pair(common_name(case, other), ours[case], theirs[other], names, tolerance_mm)
        for case, other in both.items()
        if case.isprintable()
    ]
    alone = unfit + [(_shown(case), f"no prediction in {predictions}") for case in theirs.keys() - both.values()]
    alone += [(_shown(case), f"no reference in {references}") for case in ours.keys() - both.keys()]
    alone = [(case, unlisted.pop(case, reason)) for case, reason in alone] + list(unlisted.items())
    if not pairs and unfit:
        raise DatasetError(f"{unfit[0][0]}: {unfit[0][1]}", file=predictions)
    if not pairs:
        example = f"{next(iter(ours.values())).name} in the one, {next(iter(theirs.values())).name} in the other"
        raise DatasetError("no file name is in both folders", file=predictions, expected="equal names", action=example)
    return pairs, sorted(alone)


def _label_maps(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """{case: file} of a folder, and {case: reason} of what else there could be one: what a preprocessed folder does not
    name in its dataset.json, other formats, DICOM, label maps in folders below.

    Raises DatasetError: no such folder, no label map.
    """
    if not folder.is_dir():
        raise DatasetError("no such folder", file=folder)
    files = scan_files(folder)
    reasons = unlisted_files(folder, [path.name for path in files.values()])
    listed = {case: path for case, path in files.items() if path.name not in reasons}
    missed = _not_compared(folder)
    if not listed:
        below = [f"Name its folder {name}." for name in listing(folder)[0] if of_labels(name)]
        found = next(iter((*reasons.values(), *below, *missed.values())), "")
        raise DatasetError(
            f"no {alternatives(SCAN_SUFFIXES)} file", file=folder, expected="label maps", action=found or None
        )
    return listed, missed | {_shown(case): reasons[path.name] for case, path in files.items() if path.name in reasons}


def _not_compared(folder: Path) -> dict[str, str]:
    """{case: reason} of what could be a label map, but is no scan file of the folder itself."""
    found = search(folder)
    # Of two forms of one file here the first is compared, and a note says so.
    reasons = {_shown(name): reason for name, reason in found.failures if name not in found.alike}
    for one in (*found.scans, *(one for alike in found.alike.values() for one in alike)):
        if one.path.is_dir():
            reasons[_shown(one.name)] = f"{one.path}: {_DICOM}"
        elif one.depth:
            reason = "in a folder below; only files of the folder itself are compared. Name that folder, or move it"
            reasons[_shown(one.name)] = f"{one.path}: {reason}"
    return reasons | {_shown(path.stem): f"{path}: {_DICOM}" for path in sort_out(files_in(folder)).beside}


def _shown(case: str) -> str:
    return case if case.isprintable() else repr(case)[1:-1]


def _other_run(config: EvaluateConfig, cases: set[str]) -> Evaluation | None:
    """The evaluation to compare with, looked at before the work: None where none was asked for.

    Raises DatasetError: no evaluation, or none of `cases` in it. ConfigError: NSD at another tolerance, other
    definitions of distance, or the evaluation would be overwritten.
    """
    if config.compare is None:
        return None
    if real_path(config.compare) == real_path(config.output_dir):
        raise ConfigError(f"--compare {config.compare} is the --output_dir itself. Name another --output_dir")
    other = read_evaluation(config.compare)
    tolerance = other.summary.get("tolerance_mm", config.tolerance_mm)
    if tolerance != config.tolerance_mm:
        found = (
            f"--compare {config.compare}: NSD was taken at {tolerance} mm there; expected {config.tolerance_mm:g} mm"
        )
        raise ConfigError(f"{found}. Pass --tolerance_mm {tolerance}, or evaluate the other run again")
    surface = other.summary.get("surface", "voxels")
    if surface != config.surface:
        found = f"--compare {config.compare}: distances were taken of {surface} there; expected {config.surface}"
        raise ConfigError(f"{found}. Pass --surface {surface}, or evaluate the other run again")
    theirs = sorted({row.case for row in other.scores})
    ours = counterparts(theirs, cases)
    if not ours:
        expected = f"some of the cases of --predictions, such as {min(cases)}"
        action = "Name the evaluation of the same cases."
        raise DatasetError(f"other cases, such as {theirs[0]}", file=config.compare, expected=expected, action=action)
    scores = [dataclasses.replace(row, case=ours.get(row.case, row.case)) for row in other.scores]
    return dataclasses.replace(other, scores=scores)


def _compare(scores: list[Score], other: Evaluation, console: Console) -> dict[str, Any]:
    """Differences to another run; prints those of Dice and HD95 and names what only one side has."""
    comparison = compare_runs(scores, other.scores)
    for metric in ("dice", "hd95"):
        console.print(comparison_table(comparison, metric))
    for key, text in (
        ("only_here", "Cases that the other run lacks"),
        ("only_there", "Cases that only the other run has"),
        ("structures_only_here", "Structures that the other run lacks"),
        ("structures_only_there", "Structures that only the other run has"),
    ):
        names = comparison[key]
        if names:
            more = f" and {len(names) - SHOWN} more, all in comparison.json" if len(names) > SHOWN else ""
            say(console, f"{text}: {', '.join(names[:SHOWN])}{more}")
    return comparison


def _score(pairs: list[Pair], num_workers: int | None, console: Console) -> tuple[list[Score], list[tuple[str, str]]]:
    workers = min(usable_cores() if num_workers is None else num_workers, len(pairs))
    small = sum(pair.reference.stat().st_size for pair in pairs) < SMALL_BYTES
    scores: list[Score] = []
    failed: list[tuple[str, str]] = []
    with progress_bar(console, "Evaluating") as progress:
        bar = progress.add_task("", total=len(pairs))
        for pair, result in run_jobs(evaluate_case, pairs, max(workers, 1), threads=workers <= 1 or small):
            progress.advance(bar)
            if not isinstance(result, BaseException):
                scores += result
            elif isinstance(result, MambaHomeError | OSError | MemoryError):
                failed.append((pair.case, str(result) or type(result).__name__))
            else:
                raise result
    return sorted(scores, key=lambda row: (row.case, row.label)), sorted(failed)
