"""duel: networks trained under the same conditions, the table of their scores, and what the differences come to."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.evaluation.tables import number
from mambahome_jax.flags import DuelConfig
from mambahome_jax.reporting.duel import COSTS, Standing
from mambahome_jax.support.console import say
from mambahome_jax.training.duel import run_duel


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
    for sentence in result.verdicts:
        say(console, f"{sentence}.")
    for what, reason in result.failures.items():
        say(console, f"Without a score: {what}: {reason}")
    say(console, f"Everything is in {result.folder}; the page about it: {result.report}")
    return result.exit_code


def scores_table(standings: Sequence[Standing]) -> Table:
    """A row for each contestant: mean Dice, and the difference to the first."""
    table = _table("Dice of the cases held out", ("Dice", "difference", "95 %", "p"))
    for one in standings:
        found = one.differences.get("dice")
        cells = ["", "", ""]
        if found is not None:
            low, high = (number(value, 4, sign=True) for value in (found.low, found.high))
            interval = "-" if "-" in (low, high) else f"{low} to {high}"
            cells = [number(found.difference, 4, sign=True), interval, number(found.p, 3)]
        table.add_row(escape(one.name), number(one.mean("dice"), 4), *cells)
    return table


def cost_table(standings: Sequence[Standing]) -> Table:
    """A row for each contestant: parameters in millions, memory of a step, speed, and length of its trainings."""
    table = _table("What it took", tuple(heading for heading, _ in COSTS.values()))
    for one in standings:
        cells = [number(getattr(one.cost, name), digits) for name, (_, digits) in COSTS.items()]
        table.add_row(escape(one.name), *cells)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("contestant", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
