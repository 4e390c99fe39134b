"""Tables of scores for a terminal."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.results import DISTANCES, METRICS, VOLUMES

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


def interval(entry: Mapping[str, Any], digits: int, sign: bool = False) -> str:
    """ "low to high" of an entry; - where there is none."""
    low, high = (number(entry[key], digits, sign) for key in ("low", "high"))
    return "-" if "-" in (low, high) else f"{low} to {high}"
