"""Text files of an evaluation, written whole or not at all, and read back."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambahome_jax.errors import DatasetError
from mambahome_jax.evaluation.scores import METRICS, Score
from mambahome_jax.support.files import read_json, read_name

_NUMBERS = (*METRICS, "volume_ml", "reference_volume_ml")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote: the rows of metrics.csv and the content of summary.json, {} where there is none."""

    scores: list[Score]
    summary: Mapping[str, Any]


def read_evaluation(folder: Path) -> Evaluation:
    """Read an --output_dir of `evaluate`. Labels are numbered in the order of the summary's structures.

    Raises DatasetError: no metrics.csv, a damaged file, a missing column, a value that is no number, no row.
    """
    path = folder / "metrics.csv"
    action = "Name the --output_dir of `mambahome evaluate`."
    summary_file = folder / "summary.json"
    summary = read_json(summary_file, "Evaluate again.") if summary_file.exists() else {}
    structures = summary.get("structures")
    order = {name: number for number, name in enumerate(structures if isinstance(structures, dict) else (), 1)}
    scores = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: float(row[name]) for name in _NUMBERS}
                if None in (row["case"], row["structure"]):
                    raise ValueError("a row that ends early")
                case, name = read_name(row["case"]), read_name(row["structure"])
                scores.append(Score(case, order.setdefault(name, len(order) + 1), name, **numbers))
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=path, expected="an evaluation", action=action) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=path, action=action) from error
    except KeyError as error:
        columns = ", ".join(("case", "structure", *_NUMBERS))
        raise DatasetError(f"no column {error}", file=path, expected=columns, action=action) from error
    except (ValueError, TypeError, csv.Error) as error:
        raise DatasetError(f"damaged ({error})", file=path, expected="rows of numbers", action=action) from error
    if not scores:
        raise DatasetError("no case was scored", file=path, action="Look at failures in summary.json beside it.")
    return Evaluation(scores, summary)
