"""evaluate: label maps against references, into metrics.csv, summary.json and a table, and against another run."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.evaluate import Evaluated, evaluate_folders
from mambahome_jax.evaluation.results import DISTANCES, METRICS, VOLUMES
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.support.console import command_line, say, tracked

SHOWN = 10
# Columns of the terminal from which the table of results also shows medians, intervals and volume differences.
WIDE = 110
_LABELS = {"dice": "Dice", "hd95": "HD95", "assd": "ASSD", "nsd": "NSD", "absolute_volume_difference_ml": "|diff.| ml"}
_ALONE = {
    "only_here": "Cases that the other run lacks",
    "only_there": "Cases that only the other run has",
    "structures_only_here": "Structures that the other run lacks",
    "structures_only_there": "Structures that only the other run has",
}


def run(config: EvaluateConfig) -> int:
    """Score config.predictions against config.references; returns the exit code (Evaluated.exit_code)."""
    console = Console()
    result = evaluate_folders(config, partial(say, console), tracked(console, "Evaluating"), partial(_show, console))
    say(console, f"Written in {config.output_dir}: {', '.join(file.name for file in result.files)}")
    if result.exit_code < 2:
        folders = ("--predictions", config.predictions, "--references", config.references)
        say(console, f"Next: {command_line('report', '--evaluation', config.output_dir, *folders)}")
    return result.exit_code


def _show(console: Console, result: Evaluated) -> None:
    console.print(results_table(result.summary, console.width))
    if note := _values_apart(result):
        say(console, f"Note: {note}. If they are the same structures, say by --labels what the values mean")
    for case, reason in result.failures[:SHOWN]:
        say(console, f"Not scored: {case}: {reason}")
    if len(result.failures) > SHOWN:
        say(console, f"and {len(result.failures) - SHOWN} more, all in {result.output_dir / 'summary.json'}")
    if result.comparison is None:
        return
    for metric in ("dice", "hd95"):
        console.print(comparison_table(result.comparison, metric))
    for key, text in _ALONE.items():
        if names := result.comparison[key]:
            more = f" and {len(names) - SHOWN} more, all in comparison.json" if len(names) > SHOWN else ""
            say(console, f"{text}: {', '.join(names[:SHOWN])}{more}")


def _values_apart(result: Evaluated) -> str:
    """What to say where each side holds structures, but none that the other has in any case; else nothing."""
    ours, theirs = ({row.label for row in result.scores if getattr(row, name) > 0} for name in VOLUMES[:2])
    if not ours or not theirs or ours & theirs:
        return ""
    found, expected = (", ".join(map(str, sorted(values)[:SHOWN])) for values in (ours, theirs))
    return f"the predictions hold label values {found}, the references {expected}, and none of these"


def results_table(summary: Mapping[str, Any], width: int = 80) -> Table:
    """One row a structure and one for the mean of all; more columns where the terminal has `width` for them."""
    wide = width >= WIDE
    plural = "case" if summary["cases"] == 1 else "cases"
    caption = f"HD95, ASSD in mm; NSD at {summary['tolerance_mm']:g} mm; missed: cases without the structure found"
    caption += "; 95 %: bootstrap interval of the mean Dice; diff.: prediction minus reference" if wide else ""
    spread, difference = (("95 %", "median"), ("diff. ml",)) if wide else ((), ())
    headings = ("Dice", *spread, "HD95", "ASSD", "NSD", "ml", "ref. ml", *difference, "missed")
    table = _table(f"{summary['cases']} {plural}, mean of each structure", caption, headings)
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


def comparison_table(comparison: Mapping[str, Any], metric: str = "dice") -> Table:
    """One row a structure and one for all: both means, their difference, its interval and the test's p."""
    entries = comparison["metrics"][metric]
    digits = 2 if metric in DISTANCES else 3
    caption = "diff.: this run minus the other; 95 %: its bootstrap interval; p: Wilcoxon signed-rank, uncorrected"
    title = f"{_LABELS[metric]}, {len(comparison['cases'])} cases of both"
    table = _table(title, caption, ("this", "other", "diff.", "95 %", "p", "cases"))

    def add(name: str, entry: Mapping[str, Any], style: str | None = None) -> None:
        values = (number(entry[key], digits) for key in ("mean", "other_mean"))
        difference = number(entry["difference"], digits, sign=True), interval(entry, digits, sign=True)
        table.add_row(escape(name), *values, *difference, probability(entry["p"]), str(entry["cases"]), style=style)

    for name, entry in entries["structures"].items():
        add(name, entry)
    table.add_section()
    add("mean", entries["overall"], "bold")
    return table


def _table(title: str, caption: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("structure", overflow="fold", min_width=12)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
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
