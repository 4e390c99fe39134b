"""check: look through a dataset before any work, list all that is wrong with it, and say what it is like."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.flags import CheckConfig
from mambahome_jax.preprocessing.examine import PERCENTILES, Checked, check_folders
from mambahome_jax.preprocessing.findings import SCANS, Finding, by
from mambahome_jax.preprocessing.open_dataset import several
from mambahome_jax.preprocessing.summary import DatasetSummary
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.console import command_line, counted, say, tracked

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
_ENDS = {0.0: "min", 100.0: "max"}


def run(config: CheckConfig) -> int:
    """Check config.folder; returns the exit code. Raises as `check_folders`."""
    console = Console()
    show = partial(_show, console, config)
    return check_folders(config, partial(say, console), tracked(console, "Checking"), show).exit_code


def _show(console: Console, config: CheckConfig, checked: Checked) -> None:
    _print_findings(checked, config.show, console)
    _print_summary(checked, console)
    scans = checked.dataset.layout == SCANS
    counts = [f"{count} {severity}{'s' * (count != 1)}" for severity, count in checked.counts.items() if count]
    usable = f"{checked.usable} of {len(checked.facts)} {'scans can be read' if scans else 'cases can be preprocessed'}"
    say(console, f"{usable}; {', '.join(counts) or 'nothing found'}")
    if checked.usable and scans:
        words = ["--data_path", *map(str, several(config.folder)), "--model_path", "RUN/checkpoints/best"]
        say(console, f"Next: {command_line('infer', *words, '--output_dir', 'PRED')}")
    elif checked.usable:
        say(console, f"Next: {_next_line(config, checked.summary)}")


def _print_findings(checked: Checked, show: int, console: Console) -> None:
    """Print one table for each kind; of a long one the first `show` lines, all for 0."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in checked.findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    for (severity, kind), group in groups.items():
        shown = group[:show] if show else group
        colour = _COLOURS[severity]
        title = f"[{colour}]{severity}[/{colour}]: {kind} ({len(group)})"
        table = Table(title=title, title_justify="left", title_style="bold")
        columns = [name for name in ("case", "file", "found", "expected") if any(getattr(f, name) for f in shown)]
        for name in columns:
            table.add_column(name, overflow="fold")
        for finding in shown:
            values = vars(finding) | {"file": _below(checked.folders, finding.file)}
            table.add_row(*(escape(values[name]) for name in columns))
        console.print(table)
        if len(shown) < len(group):
            say(console, f"... and {len(group) - len(shown)} more: --show 0 lists all, --json FILE writes all")
        for action in dict.fromkeys(finding.action for finding in group if finding.action):
            say(console, f"What to do: {action}")
        console.print()


def _print_summary(checked: Checked, console: Console) -> None:
    summary = checked.summary
    table = Table(title=escape(checked.dataset.name), show_header=False, title_justify="left")
    for split, modality, cases, labelled in summary.cases:
        where = f"{split if split != '-' else 'no split'}, modality {modality if modality != '-' else 'not named'}"
        table.add_row("usable cases", f"{where}: {cases}, {labelled} of them labelled")
    ranges = {"spacing, mm": summary.spacing_mm, "shape": summary.shape, "extent, mm": summary.extent_mm}
    for name, value in ranges.items():
        if value is not None:
            table.add_row(name, f"median {by(value.median)}, from {by(value.min)} to {by(value.max)}")
    for item in summary.intensities:
        for name, values in (("all", item.percentiles), ("labelled", item.foreground)):
            if values:
                modality = f", {item.modality}" if item.modality != "-" else ""
                pairs = zip(PERCENTILES, values, strict=True)
                text = ", ".join(f"{_ENDS.get(p, f'{p:g} %')} {value:.4g}" for p, value in pairs)
                table.add_row(f"{escape(item.channel)}{modality}, {name} voxels", text)
    for structure in summary.structures:
        ml = structure.ml
        volumes = f", {ml.median[0]:.4g} ml ({ml.min[0]:.4g} to {ml.max[0]:.4g})" if ml else ""
        table.add_row(
            f"label {structure.value}", f"{escape(structure.name)}: in {counted(structure.cases, 'case')}{volumes}"
        )
    console.print(table)
    if summary.plan is not None:
        say(console, "Plan (mambahome preprocess follows it):")
        for name, setting in summary.plan.settings().items():
            say(console, f"  {name} {as_typed(setting.value)}: {setting.reason}")
        say(console, f"  modality {summary.modality or 'of each case'}: {summary.modality_reason}")


def _next_line(config: CheckConfig, summary: DatasetSummary) -> str:
    """Give the command that prepares what was checked, with what was suggested for it."""
    words = ["--input_path", *map(str, several(config.folder)), "--output_path", "READY"]
    words += ["--dataset", *config.dataset] if config.dataset else []
    words += ["--spacing_scale", f"{config.spacing_scale:g}"] if config.spacing_scale is not None else []
    modality = config.modality or (summary.modality if summary.plan is not None else None)
    return command_line("preprocess", *words, *(["--modality", modality] if modality else []))


def _below(folders: Sequence[Path], file: str) -> str:
    """Give a file as seen from the folder that it lies in; of several folders, with that one's name."""
    path = Path(file)
    for folder in folders if file else ():
        if path.is_relative_to(folder):
            return str(path.relative_to(folder if len(folders) == 1 else folder.parent))
    return file
