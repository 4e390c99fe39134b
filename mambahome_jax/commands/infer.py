"""infer: scans in, label maps on the same grids out, with previews and a report of the run."""

import statistics
from collections.abc import Mapping
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.flags import InferConfig
from mambahome_jax.inference.batch import Inference
from mambahome_jax.inference.result_files import REPORT
from mambahome_jax.support.console import command_line, counted, say, scan_bars


def run(config: InferConfig) -> int:
    """Segment all scans; a bad one does not stop the others. Returns the exit code.

    Raises DatasetError (no scans), ConfigError, CheckpointError, OutputError.
    """
    console = Console()
    result = Inference(config, partial(say, console), *scan_bars(console)).run()
    cases, failures = len(result.cases), len(result.failures)
    if result.volumes_ml:
        console.print(volumes_table(result.volumes_ml))
    say(console, f"{cases} of {counted(cases + failures, 'scan')} segmented, in {config.output_dir}")
    if failures:
        where = f"above and in {config.output_dir / REPORT}" if result.report else "above"
        say(console, f"{failures} failed; the reasons are {where}")
    if cases:
        words = ("--predictions", config.output_dir, "--references", "LABELS", "--output_dir", "EVAL")
        say(console, f"Next, where there are label maps to compare with: {command_line('evaluate', *words)}")
    return result.exit_code


def volumes_table(volumes_ml: Mapping[str, list[float]]) -> Table:
    """A row for each structure: the cases in which it was found, and its volume there."""
    table = Table()
    for name in ("structure", "cases", "median ml", "smallest", "largest"):
        table.add_column(name, justify="left" if name == "structure" else "right")
    for name, values in volumes_ml.items():
        numbers = (statistics.median(values), min(values), max(values)) if values else ()
        table.add_row(escape(name), str(len(values)), *(f"{number:.4g}" for number in numbers))
    return table
