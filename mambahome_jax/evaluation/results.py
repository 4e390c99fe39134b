"""Scores of one structure of one case: the files of an evaluation, means, intervals and tests, tables on a terminal."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from mambahome_jax.errors import DatasetError
from mambahome_jax.support.files import csv_name, read_json, read_name, write_csv

METRICS = ("dice", "hd95", "assd", "nsd")
# In mm: less is better. Of the others, which are shares, more is better.
DISTANCES = ("hd95", "assd")
VOLUMES = ("volume_ml", "reference_volume_ml", "volume_difference_ml")
COLUMNS = ("case", "structure", *METRICS, *VOLUMES)
_READ = (*METRICS, "volume_ml", "reference_volume_ml")


@dataclass(frozen=True)
class Score:
    """One row of metrics.csv. hd95, assd in mm."""

    case: str
    label: int
    structure: str
    dice: float
    hd95: float
    assd: float
    nsd: float
    volume_ml: float
    reference_volume_ml: float

    @property
    def volume_difference_ml(self) -> float:
        """Above 0 where the prediction is larger than the reference."""
        return self.volume_ml - self.reference_volume_ml

    @property
    def absolute_volume_difference_ml(self) -> float:
        return abs(self.volume_difference_ml)


@dataclass(frozen=True)
class Evaluation:
    """The rows of metrics.csv and the content of summary.json, {} where there is none."""

    scores: list[Score]
    summary: Mapping[str, Any]


def structures_of(scores: Iterable[Score]) -> list[str]:
    """Return the names in order of label."""
    return list(dict.fromkeys(name for _, name in sorted({(row.label, row.structure) for row in scores})))


def score_matrix(scores: Sequence[Score], metric: str, cases: Sequence[str], structures: Sequence[str]) -> np.ndarray:
    """Return one attribute of Score as (cases, structures) float64; nan where it is not finite or there is no row."""
    rows = {case: number for number, case in enumerate(cases)}
    columns = {name: number for number, name in enumerate(structures)}
    matrix = np.full((len(cases), len(structures)), np.nan)
    for score in scores:
        if score.case in rows and score.structure in columns:
            matrix[rows[score.case], columns[score.structure]] = getattr(score, metric)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix


def write_metrics(path: Path, scores: Iterable[Score]) -> None:
    """Write metrics.csv (COLUMNS; undefined values as nan and inf), whole or not at all. Raises OutputError."""
    rows = [
        (csv_name(row.case), csv_name(row.structure), *(f"{getattr(row, name):.6g}" for name in COLUMNS[2:]))
        for row in scores
    ]
    write_csv(path, COLUMNS, rows, "--output_dir", parents=True)


def read_evaluation(folder: Path) -> Evaluation:
    """Read an --output_dir of `evaluate`. Labels are numbered in the order of the summary's structures.

    Raises DatasetError: no metrics.csv, a damaged file, a missing column, a value that is no number, no row.
    """
    path, summary_file = folder / "metrics.csv", folder / "summary.json"
    action = "Name the --output_dir of `mambahome evaluate`."
    summary = read_json(summary_file, "Evaluate again.") if summary_file.exists() else {}
    structures = summary.get("structures")
    order = {name: number for number, name in enumerate(structures if isinstance(structures, dict) else (), 1)}
    scores = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: float(row[name]) for name in _READ}
                if None in (row["case"], row["structure"]):
                    raise ValueError("a row that ends early")
                case, name = read_name(row["case"]), read_name(row["structure"])
                scores.append(Score(case, order.setdefault(name, len(order) + 1), name, **numbers))
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=path, expected="an evaluation", action=action) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=path, action=action) from error
    except KeyError as error:
        columns = ", ".join(("case", "structure", *_READ))
        raise DatasetError(f"no column {error}", file=path, expected=columns, action=action) from error
    except (ValueError, TypeError, csv.Error) as error:
        raise DatasetError(f"damaged ({error})", file=path, expected="rows of numbers", action=action) from error
    if not scores:
        raise DatasetError("no case was scored", file=path, action="Look at failures in summary.json beside it.")
    return Evaluation(scores, summary)


DESCRIBED = (*METRICS, *VOLUMES)
COMPARED = (*METRICS, "absolute_volume_difference_ml")
RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
_BLOCK = 200  # resamples at a time: 8 bytes for each of them and each case
# metrics.csv has six digits: a difference below their rounding is none, and equal differences are ties.
_DECIMALS = 9
_INTERVALS = (
    "low, high: percentile bootstrap interval of the mean, drawing whole cases; overall: mean over structures of their "
    "means and of their medians over cases; nan and inf are left out; no interval for fewer than two cases"
)
_DIFFERENCES = (
    "difference: this evaluation minus the other, over cases where both have a finite value; low, high: bootstrap 95 % "
    "interval of the mean difference, drawing whole cases; p: two-sided Wilcoxon signed-rank test, not corrected for "
    "the number of structures; overall: mean over structures, its test over each case's mean over structures"
)


def finite_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the mean over what is finite along an axis; nan where nothing is."""
    known = np.isfinite(values)
    total, number = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def finite_median(values: np.ndarray) -> float:
    """Return the median of what is finite; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else np.nan


def summarise(scores: Iterable[Score]) -> dict[str, Any]:
    """Return {"mean": {metric: value}, "structures": {name: {metric: value, "cases": counts}}}.

    A structure's value is its mean over cases, the mean that over structures; nan and inf are left out, and where
    nothing is left the value is nan. counts: cases with the structure in "both" label maps, "missed" (reference only),
    "invented" (prediction only) and "absent" (neither).
    """
    rows = list(scores)
    number = len({row.case for row in rows})
    structures: dict[str, Any] = {}
    for name in structures_of(rows):
        own = [row for row in rows if row.structure == name]
        present = [(row.volume_ml > 0, row.reference_volume_ml > 0) for row in own]
        structures[name] = {
            metric: float(finite_mean(np.array([getattr(row, metric) for row in own]))) for metric in DESCRIBED
        } | {
            "cases": {
                "both": present.count((True, True)),
                "missed": present.count((False, True)),
                "invented": present.count((True, False)),
                "absent": number - len(present) + present.count((False, False)),
            }
        }
    means = {metric: np.array([entry[metric] for entry in structures.values()]) for metric in METRICS}
    return {"mean": {metric: float(finite_mean(values)) for metric, values in means.items()}, "structures": structures}


def describe(scores: Sequence[Score], resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """Return {"overall": {metric: entry}, "structures": {name: {metric: entry}}} of DESCRIBED, and how it was made.

    entry: mean, median, low, high (of the mean) and cases, the number that has a finite value; nan where nothing has.
    """
    cases, names = sorted({row.case for row in scores}), structures_of(scores)
    overall: dict[str, Any] = {}
    structures: dict[str, Any] = {name: {} for name in names}
    for metric in DESCRIBED:
        values = score_matrix(scores, metric, cases, names)
        columns, total = mean_intervals(values, resamples, seed)
        for name, column, interval in zip(names, values.T, columns, strict=True):
            structures[name][metric] = _entry(column, finite_median(column), interval)
        medians = np.array([structures[name][metric]["median"] for name in names])
        entry = _entry(finite_mean(values, axis=1), float(finite_mean(medians)), total)
        overall[metric] = entry | {"mean": float(finite_mean(finite_mean(values, axis=0)))}
    how = {"resamples": resamples, "seed": seed, "confidence": CONFIDENCE, "definition": _INTERVALS}
    return {"overall": overall, "structures": structures, **how}


def _entry(values: np.ndarray, median: float, interval: tuple[float, float]) -> dict[str, Any]:
    cases = int(np.isfinite(values).sum())
    return dict(mean=float(finite_mean(values)), median=median, low=interval[0], high=interval[1], cases=cases)


def compare_runs(
    scores: Sequence[Score], others: Sequence[Score], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Compare two evaluations, matching cases and structures by name.

    Returns:
        {"metrics": {metric: {"overall": entry, "structures": {name: entry}}}} of COMPARED, and what only one side has.
        entry: mean and other_mean of the paired cases, difference and median_difference (scores minus others), low,
        high, p, cases; nan where nothing is paired.
    """
    ours, theirs = ({row.case for row in side} for side in (scores, others))
    names, other_names = structures_of(scores), structures_of(others)
    cases, common = sorted(ours & theirs), [name for name in names if name in other_names]
    metrics: dict[str, Any] = {}
    for metric in COMPARED:
        values, other_values = (_as_written(score_matrix(side, metric, cases, common)) for side in (scores, others))
        metrics[metric] = _compare_metric(values, other_values, common, resamples, seed)
    return {
        "metrics": metrics,
        "cases": cases,
        "only_here": sorted(ours - theirs),
        "only_there": sorted(theirs - ours),
        "structures_only_here": [name for name in names if name not in common],
        "structures_only_there": [name for name in other_names if name not in common],
        "resamples": resamples,
        "seed": seed,
        "definition": _DIFFERENCES,
    }


def _compare_metric(
    ours: np.ndarray, theirs: np.ndarray, names: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    differences = ours - theirs
    ours, theirs = (np.where(np.isfinite(differences), side, np.nan) for side in (ours, theirs))
    columns, total = mean_intervals(differences, resamples, seed)
    structures = {
        name: _paired(ours[:, number], theirs[:, number], differences[:, number], columns[number])
        for number, name in enumerate(names)
    }
    overall = _paired(finite_mean(ours, 1), finite_mean(theirs, 1), finite_mean(differences, 1), total)
    # As everywhere, the mean over structures of means over cases; a case without a structure makes it another number.
    for key, array in (("mean", ours), ("other_mean", theirs), ("difference", differences)):
        overall[key] = float(finite_mean(finite_mean(array, axis=0)))
    return {"overall": overall, "structures": structures}


def _paired(
    ours: np.ndarray, theirs: np.ndarray, differences: np.ndarray, interval: tuple[float, float]
) -> dict[str, Any]:
    return {
        "cases": int(np.isfinite(differences).sum()),
        "mean": float(finite_mean(ours)),
        "other_mean": float(finite_mean(theirs)),
        "difference": float(finite_mean(differences)),
        "median_difference": finite_median(differences),
        "low": interval[0],
        "high": interval[1],
        "p": wilcoxon_p(differences),
    }


def _as_written(values: np.ndarray) -> np.ndarray:
    """Round to the six digits of metrics.csv: a run compared with itself, read back, has no difference."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[np.float64])(values)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Test differences (n,) by Wilcoxon's two-sided signed-rank test, nan left out and 0 dropped.

    1 where all are 0, nan where there is none.
    """
    known = np.round(differences[np.isfinite(differences)], _DECIMALS)
    if not known.size:
        return np.nan
    if not known.any():
        return 1.0
    # Here, as it takes longer to import than all else in this package.
    from scipy.stats import wilcoxon

    return float(wilcoxon(known[known != 0]).pvalue)


def mean_intervals(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return bootstrap intervals of each structure's mean over cases, and of the mean of these means.

    values: (cases, structures), nan where there is none. Cases are drawn whole, the same for all structures. (nan, nan)
    where fewer than two cases have a value.
    """
    means = bootstrap_means(values, resamples, seed)
    enough = np.isfinite(values).sum(axis=0) >= 2
    columns = [_bounds(means[:, number]) if enough[number] else (np.nan, np.nan) for number in range(len(enough))]
    several = np.isfinite(values).any(axis=1).sum() >= 2
    return columns, _bounds(finite_mean(means, axis=1)) if several else (np.nan, np.nan)


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Return (resamples, structures) means over as many cases as there are, drawn with replacement.

    values: (cases, structures). nan where none of the cases drawn has a value. Same values and seed, same means.
    """
    cases = len(values)
    known = np.isfinite(values).astype(np.float64)
    filled = np.where(known > 0, values, 0.0)
    means = np.full((resamples, values.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    for start in range(0, resamples if cases else 0, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = rng.multinomial(cases, np.full(cases, 1 / cases), size=size).astype(np.float64)
        number = drawn @ known
        means[start : start + size] = np.where(number > 0, (drawn @ filled) / np.maximum(number, 1), np.nan)
    return means


def _bounds(means: np.ndarray) -> tuple[float, float]:
    known = means[np.isfinite(means)]
    if not known.size:
        return np.nan, np.nan
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


# Columns of the terminal from which the table of results also shows medians, intervals and volume differences.
WIDE = 110


def results_table(summary: Mapping[str, Any], width: int = 80) -> Table:
    """One row a structure and one for the mean of all; more columns where the terminal has `width` for them."""
    wide = width >= WIDE
    plural = "case" if summary["cases"] == 1 else "cases"
    caption = f"HD95, ASSD in mm; NSD at {summary['tolerance_mm']:g} mm; missed: cases without the structure found"
    caption += "; 95 %: bootstrap interval of the mean Dice; diff.: prediction minus reference" if wide else ""
    spread, difference = (("95 %", "median"), ("diff. ml",)) if wide else ((), ())
    headings = ("Dice", *spread, "HD95", "ASSD", "NSD", "ml", "ref. ml", *difference, "missed")
    table = new_table(f"{summary['cases']} {plural}, mean of each structure", caption, headings)
    volumes = VOLUMES if wide else VOLUMES[:2]
    statistics = summary["statistics"]

    def metrics(entry: Mapping[str, Any], dice: Mapping[str, Any]) -> list[str]:
        cells = [number(entry[metric], 2 if metric in DISTANCES else 3) for metric in METRICS]
        return [cells[0], *((interval(dice, 3), number(dice["median"], 3)) if wide else ()), *cells[1:]]

    for name, entry in summary["structures"].items():
        cells = metrics(entry, statistics["structures"][name]["dice"])
        table.add_row(escape(name), *cells, *(number(entry[key], 1) for key in volumes), str(entry["cases"]["missed"]))
    table.add_section()
    cells = metrics(summary["mean"], statistics["overall"]["dice"])
    table.add_row("mean", *cells, *("" for _ in volumes), "", style="bold")
    return table


def new_table(title: str, caption: str, headings: tuple[str, ...], first: str = "structure") -> Table:
    """A table of structures, or what `first` calls them, with columns of numbers."""
    table = Table(title=title, caption=caption)
    table.add_column(first, overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number for a person; - where there is none."""
    return f"{value:{'+' if sign else ''}z.{digits}f}" if value is not None and math.isfinite(value) else "-"


def p_value(value: float, digits: int = 4) -> str:
    """A p value for a person: none is 0."""
    least = 10.0**-digits
    return f"<{least:.{digits}f}" if value < least / 2 else number(value, digits)


def interval(entry: Mapping[str, Any], digits: int, sign: bool = False) -> str:
    """ "low to high" of an entry; - where there is none."""
    low, high = (number(entry[key], digits, sign) for key in ("low", "high"))
    return "-" if "-" in (low, high) else f"{low} to {high}"
