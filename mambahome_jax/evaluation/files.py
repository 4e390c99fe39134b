"""Text files of an evaluation, written whole or not at all, and read back."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambahome_jax.errors import DatasetError
from mambahome_jax.evaluation.scores import METRICS, Score
from mambahome_jax.support.csvtext import read_name
from mambahome_jax.support.files import write_text
from mambahome_jax.support.jsontext import parse_json

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
    summary = _read_summary(folder / "summary.json")
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; JSON has no nan or inf, they become null. Raises OutputError."""
    text = json.dumps(without_nan(content), indent=1, allow_nan=False)
    write_text(path, text + "\n", "--output_dir", parents=True)


def without_nan(value: Any) -> Any:
    """The same with None for nan and inf, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=path) from error
    except ValueError as error:
        action = "Evaluate again."
        raise DatasetError(f"not valid JSON ({error})", file=path, action=action) from error
    if not isinstance(content, dict):
        raise DatasetError(f"a JSON {type(content).__name__}", file=path, expected="an object with keys")
    return content
