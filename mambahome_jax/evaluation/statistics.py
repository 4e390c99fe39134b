"""How sure a mean over cases is: medians and bootstrap intervals of scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mambahome_jax.evaluation.scores import METRICS, Score, finite_mean, score_matrix, structures_of

DESCRIBED = (*METRICS, "volume_ml", "reference_volume_ml", "volume_difference_ml")
RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
_BLOCK = 200  # resamples at a time: 8 bytes for each of them and each case
DEFINITION = (
    "low, high: percentile bootstrap interval of the mean, drawing whole cases; overall: mean over structures of their "
    "means and of their medians over cases; nan and inf are left out; no interval for fewer than two cases"
)


def describe(scores: Sequence[Score], resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """{"overall": {metric: entry}, "structures": {name: {metric: entry}}} of DESCRIBED, and how it was made.

    entry: mean, median, low, high (of the mean) and cases, the number that has a finite value; nan where nothing has.
    """
    cases, names = sorted({row.case for row in scores}), structures_of(scores)
    overall: dict[str, Any] = {}
    structures: dict[str, Any] = {name: {} for name in names}
    for metric in DESCRIBED:
        values = score_matrix(scores, metric, cases, names)
        columns, total = mean_intervals(values, resamples, seed)
        medians = [finite_median(values[:, number]) for number in range(len(names))]
        for number, name in enumerate(names):
            structures[name][metric] = _entry(values[:, number], medians[number], columns[number])
        entry = _entry(finite_mean(values, axis=1), float(finite_mean(np.array(medians))), total)
        overall[metric] = entry | {"mean": float(finite_mean(finite_mean(values, axis=0)))}
    how = {"resamples": resamples, "seed": seed, "confidence": CONFIDENCE, "definition": DEFINITION}
    return {"overall": overall, "structures": structures, **how}


def mean_intervals(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Bootstrap intervals of each structure's mean over cases, and of the mean of these means.

    values: (cases, structures), nan where there is none. Cases are drawn whole, the same for all structures. (nan, nan)
    where fewer than two cases have a value.
    """
    means = bootstrap_means(values, resamples, seed)
    enough = np.isfinite(values).sum(axis=0) >= 2
    columns = [_interval(means[:, number]) if enough[number] else (np.nan, np.nan) for number in range(len(enough))]
    several = np.isfinite(values).any(axis=1).sum() >= 2
    return columns, _interval(finite_mean(means, axis=1)) if several else (np.nan, np.nan)


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(resamples, structures) means over as many cases as there are, drawn with replacement from (cases, structures).

    nan where none of the cases drawn has a value. Same values and seed, same means.
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


def finite_median(values: np.ndarray) -> float:
    """Median of what is finite; nan where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else np.nan


def _entry(values: np.ndarray, median: float, interval: tuple[float, float]) -> dict[str, Any]:
    cases = int(np.isfinite(values).sum())
    return {
        "mean": float(finite_mean(values)),
        "median": median,
        "low": interval[0],
        "high": interval[1],
        "cases": cases,
    }


def _interval(means: np.ndarray) -> tuple[float, float]:
    known = means[np.isfinite(means)]
    if not known.size:
        return np.nan, np.nan
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)
