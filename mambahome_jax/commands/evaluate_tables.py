"""What evaluate prints: the scores of a run, and their differences to another."""

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.scores import DISTANCES, METRICS

# Columns of the terminal from which the table of results also shows medians, intervals and volume differences.
WIDE = 110
_LABELS = {"dice": "Dice", "hd95": "HD95", "assd": "ASSD", "nsd": "NSD", "absolute_volume_difference_ml": "|diff.| ml"}


def results_table(summary: Mapping[str, Any], width: int = 80) -> Table:
    """One row a structure and one for the mean of all; more columns where the terminal has `width` for them."""
    wide = width >= WIDE
    plural = "case" if summary["cases"] == 1 else "cases"
    caption = f"HD95, ASSD in mm; NSD at {summary['tolerance_mm']:g} mm; missed: cases without the structure found"
    caption += "; 95 %: bootstrap interval of the mean Dice; diff.: prediction minus reference" if wide else ""
    table = Table(title=f"{summary['cases']} {plural}, mean of each structure", caption=caption)
    table.add_column("structure", overflow="fold", min_width=12)
    spread = ("95 %", "median") if wide else ()
    difference = ("diff. ml",) if wide else ()
    for heading in ("Dice", *spread, "HD95", "ASSD", "NSD", "ml", "ref. ml", *difference, "missed"):
        table.add_column(heading, justify="right", no_wrap=True)
    volumes = ("volume_ml", "reference_volume_ml", *(("volume_difference_ml",) if wide else ()))
    statistics = summary["statistics"]
    for name, entry in summary["structures"].items():
        cells = _metrics(entry, statistics["structures"][name]["dice"] if wide else None)
        table.add_row(escape(name), *cells, *(number(entry[key], 1) for key in volumes), str(entry["cases"]["missed"]))
    table.add_section()
    cells = _metrics(summary["mean"], statistics["overall"]["dice"] if wide else None)
    table.add_row("mean", *cells, *("" for _ in volumes), "", style="bold")
    return table


def comparison_table(comparison: Mapping[str, Any], metric: str = "dice") -> Table:
    """One row a structure and one for all: both means, their difference, its interval and the test's p."""
    found = comparison["metrics"][metric]
    digits = 2 if metric in DISTANCES else 3
    cases = f"{len(comparison['cases'])} cases of both"
    caption = "diff.: this run minus the other; 95 %: its bootstrap interval; p: Wilcoxon signed-rank, uncorrected"
    table = Table(title=f"{_LABELS[metric]}, {cases}", caption=caption)
    table.add_column("structure", overflow="fold", min_width=12)
    for heading in ("this", "other", "diff.", "95 %", "p", "cases"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [*found["structures"].items(), ("mean", found["overall"])]
    for position, (name, entry) in enumerate(rows):
        last = position == len(rows) - 1
        if last:
            table.add_section()
        values = (number(entry[key], digits) for key in ("mean", "other_mean"))
        difference = number(entry["difference"], digits, sign=True)
        cells = (*values, difference, interval(entry, digits, sign=True), probability(entry["p"]), str(entry["cases"]))
        table.add_row(escape(name), *cells, style="bold" if last else None)
    return table


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number for a person; - where there is none."""
    return f"{value:{'+' if sign else ''}z.{digits}f}" if math.isfinite(value) else "-"


def interval(entry: Mapping[str, Any], digits: int, sign: bool = False) -> str:
    """ "low to high" of an entry; - where there is none."""
    low, high = (number(entry[key], digits, sign) for key in ("low", "high"))
    return "-" if "-" in (low, high) else f"{low} to {high}"


def probability(p: float) -> str:
    """A p value with two digits."""
    if not math.isfinite(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _metrics(entry: Mapping[str, Any], statistics: Mapping[str, Any] | None) -> list[str]:
    """Cells of METRICS, with interval and median after Dice where `statistics` of it are given."""
    cells = [number(entry[metric], 2 if metric in DISTANCES else 3) for metric in METRICS]
    if statistics is not None:
        cells[1:1] = [interval(statistics, 3), number(statistics["median"], 3)]
    return cells
