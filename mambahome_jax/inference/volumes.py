"""What infer says of its results when it is done: volumes.csv, and a table of the structures."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mambahome_jax.support.files import csv_name, write_csv

COLUMNS = ("case", "structure", "volume_ml")


def write_volumes(path: Path, cases: Iterable[Mapping[str, Any]]) -> None:
    """Write a line for each case and structure (COLUMNS), whole or not at all.

    cases: entries of run.json; those without "volume_ml" have no lines. Names are as `csv_name` makes them.
    Raises OutputError: it cannot be written.
    """
    write_csv(
        path,
        COLUMNS,
        [
            (csv_name(case["id"]), csv_name(name), ml)
            for case in cases
            for name, ml in case.get("volume_ml", {}).items()
        ],
    )


def volumes_by_structure(cases: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Structure -> its millilitres in each case that has any of it, for entries of run.json."""
    found: dict[str, list[float]] = {}
    for case in cases:
        for name, ml in case.get("volume_ml", {}).items():
            found.setdefault(name, []).extend([ml] if ml > 0 else [])
    return found


def volumes_table(cases: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each structure: the cases in which it was found, and its volume there."""
    table = Table()
    for name in ("structure", "cases", "median ml", "smallest", "largest"):
        table.add_column(name, justify="left" if name == "structure" else "right")
    for name, values in volumes_by_structure(cases).items():
        numbers = (statistics.median(values), min(values), max(values)) if values else ()
        table.add_row(escape(name), str(len(values)), *(f"{number:.4g}" for number in numbers))
    return table
