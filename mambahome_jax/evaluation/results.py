"""Scores of one structure of one case, tables of them, and the files of an evaluation."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
