"""report: an evaluation as one HTML page, with the worst cases in pictures."""

from functools import partial

from rich.console import Console

from mambahome_jax.flags import ReportConfig
from mambahome_jax.reporting.report import write_report
from mambahome_jax.support.console import say, tracked


def run(config: ReportConfig) -> int:
    """Write the page about config.evaluation; returns the exit code (Reported.exit_code)."""
    console = Console()
    result = write_report(config, partial(say, console), tracked(console, "Drawing"))
    say(console, f"Written: {result.path}, {result.path.stat().st_size / 1e6:.1f} MB, needs no other file")
    return result.exit_code
