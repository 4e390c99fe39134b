"""Two evaluations of the same cases: differences case by case, and whether they could be chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mambahome_jax.evaluation.scores import METRICS, Score, finite_mean, score_matrix, structures_of
from mambahome_jax.evaluation.statistics import RESAMPLES, SEED, finite_median, mean_intervals

COMPARED = (*METRICS, "absolute_volume_difference_ml")
DEFINITION = (
    "difference: this evaluation minus the other, over cases where both have a finite value; low, high: bootstrap 95 % "
    "interval of the mean difference, drawing whole cases; p: two-sided Wilcoxon signed-rank test, not corrected for "
    "the number of structures; overall: mean over structures, its test over each case's mean over structures"
)
# metrics.csv has six digits: a difference below their rounding is none, and equal differences are ties.
_DECIMALS = 9


def compare_runs(
    scores: Sequence[Score], others: Sequence[Score], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """{"metrics": {metric: {"overall": entry, "structures": {name: entry}}}} of COMPARED, and what only one side has.

    Cases and structures are matched by name. entry: mean and other_mean of the paired cases, difference and
    median_difference (scores minus others), low, high, p, cases; nan where nothing is paired.
    """
    ours, theirs = ({row.case for row in side} for side in (scores, others))
    names, other_names = structures_of(scores), structures_of(others)
    cases, common = sorted(ours & theirs), [name for name in names if name in other_names]
    metrics: dict[str, Any] = {}
    for metric in COMPARED:
        here = _as_written(score_matrix(scores, metric, cases, common))
        there = _as_written(score_matrix(others, metric, cases, common))
        metrics[metric] = _compare(here, there, common, resamples, seed)
    return {
        "metrics": metrics,
        "cases": cases,
        "only_here": sorted(ours - theirs),
        "only_there": sorted(theirs - ours),
        "structures_only_here": [name for name in names if name not in common],
        "structures_only_there": [name for name in other_names if name not in common],
        "resamples": resamples,
        "seed": seed,
        "definition": DEFINITION,
    }


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank test of differences (n,), nan left out and 0 dropped.

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


def _compare(here: np.ndarray, there: np.ndarray, names: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    differences = here - there
    paired = np.isfinite(differences)
    here, there = np.where(paired, here, np.nan), np.where(paired, there, np.nan)
    columns, total = mean_intervals(differences, resamples, seed)
    structures = {}
    for number, name in enumerate(names):
        structures[name] = _entry(here[:, number], there[:, number], differences[:, number], columns[number])
    overall = _entry(finite_mean(here, axis=1), finite_mean(there, axis=1), finite_mean(differences, axis=1), total)
    # As everywhere, the mean over structures of means over cases; a case without a structure makes it another number.
    for key, array in (("mean", here), ("other_mean", there), ("difference", differences)):
        overall[key] = float(finite_mean(finite_mean(array, axis=0)))
    return {"overall": overall, "structures": structures}


def _entry(
    here: np.ndarray, there: np.ndarray, differences: np.ndarray, interval: tuple[float, float]
) -> dict[str, Any]:
    return {
        "cases": int(np.isfinite(differences).sum()),
        "mean": float(finite_mean(here)),
        "other_mean": float(finite_mean(there)),
        "difference": float(finite_mean(differences)),
        "median_difference": finite_median(differences),
        "low": interval[0],
        "high": interval[1],
        "p": wilcoxon_p(differences),
    }


def _as_written(values: np.ndarray) -> np.ndarray:
    """With the six digits of metrics.csv: a run compared with itself, read back, has no difference."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[np.float64])(values)
