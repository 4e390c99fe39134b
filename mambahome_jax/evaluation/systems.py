"""Systems that were scored on the same cases, with one or several seeds each: differences, and what they come to.

Seeds alone move the mean of some 80 cases by 0.002 (docs/experiments/hippocampus.md), so intervals draw seeds anew too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mambahome_jax.evaluation.results import Score, finite_mean, score_matrix, structures_of, wilcoxon_p

RESAMPLES = 10_000
# An interval of few cases that all differ the same way, as two do every other time by chance, leaves out 0 too.
_CHANCE = 0.05


@dataclass(frozen=True)
class Difference:
    """Mean of a system minus that of another, over the cases that both have; nan where there are none.

    low, high: 95 % bootstrap interval of the difference, nan for fewer than two cases; p: two-sided Wilcoxon
    signed-rank test over the cases. of_cases: case -> its own difference.
    """

    mean: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    of_cases: dict[str, float]

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0 and p is below 0.05."""
        return (self.low > 0 or self.high < 0) and self.p < _CHANCE


def score_array(
    seeds: Sequence[Sequence[Score]], metric: str, cases: Sequence[str], structures: Sequence[str]
) -> np.ndarray:
    """(seeds, cases, structures) of an attribute of Score; nan where there is no finite value."""
    return np.stack([score_matrix(scores, metric, cases, structures) for scores in seeds])


def compare_systems(
    ours: Sequence[Sequence[Score]], others: Sequence[Sequence[Score]], metric: str, structure: str = ""
) -> Difference:
    """Compare two systems by the scores of their seeds, in each case's mean over structures, or in one structure."""
    rows = [row for scores in (*ours, *others) for row in scores]
    cases, structures = sorted({row.case for row in rows}), [structure] if structure else structures_of(rows)
    arrays = [score_array(side, metric, cases, structures) for side in (ours, others)]
    # What a seed of one side lacks counts on neither: the means would be of other structures.
    known = np.isfinite(np.concatenate(arrays)).all(axis=0)
    mine, theirs = (finite_mean(np.where(known, array, np.nan), axis=2)[:, known.any(axis=1)] for array in arrays)
    kept = [case for case, some in zip(cases, known.any(axis=1), strict=True) if some]
    differences = finite_mean(mine, axis=0) - finite_mean(theirs, axis=0)
    low, high = paired_interval(mine, theirs) if len(kept) > 1 else (np.nan, np.nan)
    return Difference(
        mean=float(finite_mean(finite_mean(mine, axis=0))),
        other=float(finite_mean(finite_mean(theirs, axis=0))),
        difference=float(finite_mean(differences)),
        low=low,
        high=high,
        p=wilcoxon_p(differences),
        of_cases=dict(zip(kept, differences.tolist(), strict=True)),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values after Holm's correction for their number; nan is no test, and stays nan."""
    corrected, largest = [np.nan] * len(values), 0.0
    order = sorted((value, place) for place, value in enumerate(values) if np.isfinite(value))
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min(value * (len(order) - rank), 1.0))
        corrected[place] = largest
    return corrected


def verdict(name: str, other: str, found: Difference, seeds: int, corrected: float | None = None) -> str:
    """Say in a sentence what a difference in Dice comes to: better, worse, or not distinguishable.

    corrected: p after Holm's correction, where there are several contestants.
    """
    cases = f"{len(found.of_cases)} case{'s' * (len(found.of_cases) != 1)}"
    over = f"over {cases} and {seeds} seed{'s' * (seeds != 1)}"
    if not np.isfinite(found.low):
        return f"{name} and {other} are not distinguishable {over}, which give no interval"
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, p {found.p:.2g}"
    interval += f" ({corrected:.2g} after Holm's correction)" if corrected is not None else ""
    numbers = f"Dice {found.difference:+.4f}, {interval}, {over}"
    if not found.distinguishable:
        return f"{name} and {other} are not distinguishable: {numbers}"
    limit = "; with that correction they are not distinguishable" if (corrected or 0.0) >= _CHANCE else ""
    limit += "; another seed may change that" if seeds == 1 else ""
    return f"{name} is {'better' if found.difference > 0 else 'worse'} than {other}: {numbers}{limit}"


def paired_interval(ours: np.ndarray, theirs: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % of the difference of two means, where cases are drawn anew for both, and the seeds of each for itself.

    ours, theirs: (seeds, cases), nan where there is no score.
    """
    rng = np.random.default_rng(0)
    cases = rng.multinomial(ours.shape[1], np.full(ours.shape[1], 1 / ours.shape[1]), size=resamples)

    def means(values: np.ndarray) -> np.ndarray:
        # One fewer than there are: as many would vary by (n - 1) / n of the true variance, by half of it for two.
        seeds = rng.multinomial(max(len(values) - 1, 1), np.full(len(values), 1 / len(values)), size=resamples)
        known = np.isfinite(values)
        total = np.einsum("rs,rc,sc->r", seeds, cases, np.where(known, values, 0.0), optimize=True)
        return total / np.maximum(np.einsum("rs,rc,sc->r", seeds, cases, known * 1.0, optimize=True), 1)

    low, high = np.percentile(means(ours) - means(theirs), [2.5, 97.5])
    return float(low), float(high)
