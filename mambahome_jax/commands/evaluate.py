"""evaluate: label maps against references, into metrics.csv, summary.json and a table, and against another run."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.evaluate import Evaluated, evaluate_folders
from mambahome_jax.evaluation.results import DISTANCES, VOLUMES, interval, new_table, number, results_table
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.support.console import command_line, say, tracked

SHOWN = 10
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
    say(console, result.summary["provenance"]["summary"])
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


def comparison_table(comparison: Mapping[str, Any], metric: str = "dice") -> Table:
    """One row a structure and one for all: both means, their difference, its interval and the test's p."""
    entries = comparison["metrics"][metric]
    digits = 2 if metric in DISTANCES else 3
    caption = "diff.: this run minus the other; 95 %: its bootstrap interval; p: Wilcoxon signed-rank, uncorrected"
    title = f"{_LABELS[metric]}, {len(comparison['cases'])} cases of both"
    table = new_table(title, caption, ("this", "other", "diff.", "95 %", "p", "cases"))

    def add(name: str, entry: Mapping[str, Any], style: str | None = None) -> None:
        values = (number(entry[key], digits) for key in ("mean", "other_mean"))
        difference = number(entry["difference"], digits, sign=True), interval(entry, digits, sign=True)
        table.add_row(escape(name), *values, *difference, probability(entry["p"]), str(entry["cases"]), style=style)

    for name, entry in entries["structures"].items():
        add(name, entry)
    table.add_section()
    add("mean", entries["overall"], "bold")
    return table


def probability(p: float) -> str:
    """A p value with two digits."""
    if not math.isfinite(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"
