"""duel: networks trained under the same conditions, the table of their scores, and what the differences come to."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.results import interval, new_table, number, p_value
from mambahome_jax.flags import DuelConfig
from mambahome_jax.reporting.duel import COSTS, Standing
from mambahome_jax.support.console import say
from mambahome_jax.training.duel import run_duel

# Columns of a contestant's name in 80.
_LABEL = 23


def run(config: DuelConfig) -> int:
    """Train and compare as `config` says; return the exit code.

    0 done, 1 some contestants or cases have no scores, 128 + n stopped by signal n: the same command line continues.
    Raises MambaHomeError before anything is trained, or where the first contestant could not be.
    """
    console = Console()
    result = run_duel(config, console)
    if not result.standings:
        return result.exit_code
    console.print(scores_table(result.standings))
    console.print(cost_table(result.standings))
    for sentence in (*filter(None, [result.shared]), *result.verdicts):
        say(console, f"{sentence}.")
    for what, reason in result.failures.items():
        say(console, f"Without a score: {what}: {reason}")
    say(console, f"Everything is in {result.folder}; the page about it: {result.report}")
    return result.exit_code


def scores_table(standings: Sequence[Standing]) -> Table:
    """A row for each contestant: mean Dice, and the difference to the first."""
    caption = f"difference: to {standings[0].name}; 95 %: bootstrap; p: Wilcoxon, uncorrected"
    headings = ("Dice", "difference", "95 %", "p")
    table = new_table("Dice of the cases held out", escape(caption), headings, "contestant")
    for one in standings:
        cells = ["", "", ""]
        if found := one.differences.get("dice"):
            ends = {"low": found.low, "high": found.high}
            cells = [number(found.difference, 4, sign=True), interval(ends, 4, sign=True), p_value(found.p)]
        table.add_row(_label(one.name), number(one.mean("dice"), 4), *cells)
    return table


def cost_table(standings: Sequence[Standing]) -> Table:
    """A row for each contestant: parameters, memory of a step, speed, and length of its trainings."""
    shown = {name: entry for name, entry in COSTS.items() if name != "minutes"}  # which the page has room for
    caption = "GiB: of the compiled step; train min: from the first step on"
    headings = tuple(heading.replace(" ", "\n").replace("/", "\n/") for heading, _ in shown.values())
    table = new_table("What it took", caption, headings, "contestant")
    for one in standings:
        cells = [number(getattr(one.cost, name), digits) for name, (_, digits) in shown.items()]
        table.add_row(_label(one.name), *cells)
    return table


def _label(name: str) -> str:
    """A name of several flags on as many lines as 80 columns take."""
    lines = [""]
    for word in re.findall("[^,]*,?", name):
        lines += [word] if len(lines[-1] + word) > _LABEL else []
        lines[-1] += word if lines[-1] != word else ""
    return escape("\n".join(filter(None, lines)))
