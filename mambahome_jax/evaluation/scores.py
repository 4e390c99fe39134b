"""One structure of one case in numbers, and tables of such numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("dice", "hd95", "assd", "nsd")
# In mm: less is better. Of the others, which are shares, more is better.
DISTANCES = ("hd95", "assd")


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


def structures_of(scores: Sequence[Score]) -> list[str]:
    """Names in order of label."""
    return list(dict.fromkeys(name for _, name in sorted({(row.label, row.structure) for row in scores})))


def score_matrix(scores: Sequence[Score], metric: str, cases: Sequence[str], structures: Sequence[str]) -> np.ndarray:
    """(cases, structures) float64 of one attribute of Score; nan where it is not finite or there is no such row."""
    rows = {case: number for number, case in enumerate(cases)}
    columns = {name: number for number, name in enumerate(structures)}
    matrix = np.full((len(cases), len(structures)), np.nan)
    for score in scores:
        if score.case in rows and score.structure in columns:
            matrix[rows[score.case], columns[score.structure]] = getattr(score, metric)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix


def finite_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean over what is finite along an axis; nan where nothing is."""
    known = np.isfinite(values)
    total, number = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
