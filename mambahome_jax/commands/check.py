"""check: look through a dataset before any work, list all that is wrong with it, and say what it is like."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.datasets import Dataset
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.structures import consecutive
from mambahome_jax.errors import DatasetError, MambaHomeError
from mambahome_jax.flags import CheckConfig
from mambahome_jax.imaging.volume import read_geometry
from mambahome_jax.preprocessing.examine import PERCENTILES, ExamineJob, examine_case
from mambahome_jax.preprocessing.findings import SCANS, CaseFacts, Finding, Severity, dataset_findings
from mambahome_jax.preprocessing.open_dataset import read_datasets, several, with_scale, with_series
from mambahome_jax.preprocessing.scan_folder import holds_scans_alone, read_scans
from mambahome_jax.preprocessing.summary import Range, Summary, likely_modality, summarise
from mambahome_jax.support.console import command_line, progress_bar, say
from mambahome_jax.support.files import write_json
from mambahome_jax.support.processes import count_workers, run_jobs

_VERSION = 1
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
# Of a scan and its label map while they are read and looked at: float64 on disk, float32, sorted samples.
_BYTES_A_VOXEL = 24
_ENDS = {0.0: "min", 100.0: "max"}
_SMALL_FILE = 1 << 20  # bytes; thousands of them are not opened only to know how little memory they take
_BATCH = 16  # cases of small files that a process is given at a time
_BATCHES = 4  # that each process gets at least, so that none waits long for another one's last
_THREAD_BELOW = 8  # cases for which starting processes takes longer than the work


def run(config: CheckConfig) -> int:
    """Check config.folder; returns the exit code: 0 clean or notes only, 1 findings, 2 no usable case.

    Raises DatasetError: a folder as a whole cannot be read, or several cannot be joined. ConfigError: an unknown
    layout. OutputError: the JSON file cannot be written.
    """
    console = Console()
    started = time.perf_counter()
    folders = several(config.folder)
    dataset = with_series(with_scale(_open(folders, config.dataset), config.spacing_scale), config.series)
    say(console, f"Dataset: {dataset.name}, layout {dataset.layout}, {len(dataset.cases)} cases")
    facts = examine(dataset, config, console)
    findings = sorted(
        [*(finding for fact in facts for finding in fact.findings), *dataset_findings(dataset, facts)],
        key=lambda finding: (_SEVERITIES.index(finding.severity), finding.kind, finding.case),
    )
    summary = summarise(dataset, facts)
    unnamed = [fact for fact in facts if fact.usable and fact.modality is None and fact.percentiles]
    if dataset.layout == SCANS and unnamed:
        modality, why = likely_modality(unnamed)
        say(console, f"Modality: {modality}, {why}; --modality ct|mr|us overrides")
    usable = sum(fact.usable for fact in facts)
    code = 2 if not usable else int(any(finding.severity != "note" for finding in findings))
    _print_findings(findings, folders, config.show, console)
    _print_summary(dataset, summary, console)
    _print_verdict(findings, f"{usable} of {len(facts)} {_usable_for(dataset)}", console)
    if usable and dataset.layout != SCANS:
        say(console, f"Next: {_next_line(config, summary)}")
    if config.json is not None:
        counts = {severity: sum(finding.severity == severity for finding in findings) for severity in _SEVERITIES}
        content = {
            "version": _VERSION,
            "folder": str(folders[0]) if len(folders) == 1 else [str(folder) for folder in folders],
            "name": dataset.name,
            "layout": dataset.layout,
            "fast": config.fast,
            "seconds": round(time.perf_counter() - started, 1),
            "exit_code": code,
            "cases": len(facts),
            "usable": usable,
            "counts": counts,
            "findings": [asdict(finding) for finding in findings],
            "percentiles": PERCENTILES,
            "summary": asdict(summary),
        }
        write_json(config.json, content)
    return code


def _open(folders: tuple[Path, ...], layouts: tuple[str, ...]) -> Dataset:
    """The dataset as preprocess takes it, else the scans of a folder without labels. Raises DatasetError."""
    try:
        return consecutive(read_datasets(folders, layouts))
    except DatasetError:
        if layouts or len(folders) > 1 or not holds_scans_alone(folders[0]):
            raise
        try:
            return read_scans(folders[0])
        except DatasetError:
            # There is none: what a dataset looks like is what helps then.
            pass
        raise


def examine(dataset: Dataset, config: CheckConfig, console: Console) -> list[CaseFacts]:
    """Facts of every case, in the dataset's order, from several processes; a case that fails is a finding of it."""
    channels, labels = len(dataset.channels), dict(dataset.labels)
    jobs = [
        ExamineJob(case, channels, labels, dataset.hint, config.modality or case.modality, config.fast)
        for case in dataset.cases
    ]
    wanted, workers = count_workers(config.num_workers, jobs, _peak_bytes)
    if workers < wanted:
        say(console, f"{workers} processes instead of {wanted}: memory for more of the largest scan is not free")
    found: dict[str, CaseFacts] = {}
    with progress_bar(console, "Checking", disable=not jobs) as progress:
        bar = progress.add_task("", total=len(jobs))
        alone = workers == 1 or len(jobs) < _THREAD_BELOW
        many = len(jobs) >= _BATCHES * _BATCH * workers
        small = many and all(_peak_bytes(job) == 1 for job in jobs[:: len(jobs) // _BATCH])
        for job, result in run_jobs(examine_case, jobs, workers, threads=alone, batch=_BATCH if small else 1):
            progress.advance(bar)
            found[job.case.id] = result if isinstance(result, CaseFacts) else _failed(job, result, console)
    return [found[job.case.id] for job in jobs]


def _failed(job: ExamineJob, error: BaseException, console: Console) -> CaseFacts:
    case, action = job.case, ""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, MambaHomeError):
        reason = str(error)
    elif isinstance(error, MemoryError):
        reason, action = f"out of memory ({error})", "Try fewer --num_workers."
    elif not isinstance(error, OSError):
        # A fault of ours, not of the file: its traceback is needed to mend it.
        say(console, "".join(traceback.format_exception(error)))
        action = "This is a fault of the program; please report it."
    finding = Finding("error", "unreadable", case.id, str(case.image), reason, "", action)
    return CaseFacts(
        case.id,
        case.patient,
        case.split,
        job.modality,
        str(case.image),
        case.has_label,
        findings=(finding,),
    )


def _peak_bytes(job: ExamineJob) -> int:
    if job.fast:
        return 1
    try:
        if sum(part.stat().st_size for part in parts(job.case.image)) < _SMALL_FILE:
            return 1
        shape, _ = read_geometry(job.case.image, spacing_scale=job.case.spacing_scale, series=job.case.series)
    except (DatasetError, OSError):
        return 1
    return _BYTES_A_VOXEL * len(job.case.image_files) * int(np.prod(shape, dtype=float))


def _print_findings(findings: Sequence[Finding], folders: Sequence[Path], show: int, console: Console) -> None:
    """One table for each kind; of a long one the first `show` lines, all for 0."""
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
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
            values = asdict(finding) | {"file": _below(folders, finding.file)}
            table.add_row(*(escape(values[name]) for name in columns))
        console.print(table)
        if len(shown) < len(group):
            say(console, f"... and {len(group) - len(shown)} more: --show 0 lists all, --json FILE writes all")
        for action in dict.fromkeys(finding.action for finding in group if finding.action):
            say(console, f"What to do: {action}")
        console.print()


def _print_summary(dataset: Dataset, summary: Summary, console: Console) -> None:
    table = Table(title=escape(dataset.name), show_header=False, title_justify="left")
    for split, modality, cases, labelled in summary.cases:
        where = f"{split if split != '-' else 'no split'}, modality {modality if modality != '-' else 'not named'}"
        table.add_row("usable cases", f"{where}: {cases}, {labelled} of them labelled")
    for name, value in (
        ("spacing, mm", summary.spacing_mm),
        ("shape", summary.shape),
        ("extent, mm", summary.extent_mm),
    ):
        if value is not None:
            table.add_row(name, f"median {_by(value.median)}, from {_by(value.min)} to {_by(value.max)}")
    for item in summary.intensities:
        for name, values in (("all", item.percentiles), ("labelled", item.foreground)):
            if values:
                modality = f", {item.modality}" if item.modality != "-" else ""
                text = ", ".join(
                    f"{_ENDS.get(p, f'{p:g} %')} {value:.4g}" for p, value in zip(PERCENTILES, values, strict=True)
                )
                table.add_row(f"{escape(item.channel)}{modality}, {name} voxels", text)
    for structure in summary.structures:
        table.add_row(
            f"label {structure.value}", f"{escape(structure.name)}: in {structure.cases} cases{_ml(structure.ml)}"
        )
    console.print(table)
    if summary.suggestion is not None:
        hint = summary.suggestion
        flags = f"--spacing {' '.join(f'{mm:g}' for mm in hint.spacing)}"
        flags += f" --modality {hint.modality}" if hint.modality else ""
        say(console, f"Suggested: preprocess.py {flags}; train.py --patch_size {' '.join(map(str, hint.patch_size))}")
        for reason in hint.reasons:
            say(console, f"  {reason}")


def _next_line(config: CheckConfig, summary: Summary) -> str:
    """The command that prepares what was checked, with what was suggested for it."""
    words = ["--input_path", *map(str, several(config.folder)), "--output_path", "READY"]
    words += ["--dataset", *config.dataset] if config.dataset else []
    words += ["--spacing_scale", f"{config.spacing_scale:g}"] if config.spacing_scale is not None else []
    hint = summary.suggestion
    if hint is not None:
        words += ["--spacing", *(f"{mm:g}" for mm in hint.spacing)]
    modality = config.modality or (hint.modality if hint is not None else None)
    return command_line("preprocess", *words, *(["--modality", modality] if modality else []))


def _usable_for(dataset: Dataset) -> str:
    return "scans can be read" if dataset.layout == SCANS else "cases can be preprocessed"


def _print_verdict(findings: Sequence[Finding], usable: str, console: Console) -> None:
    counts = [(sum(f.severity == severity for f in findings), severity) for severity in _SEVERITIES]
    listed = ", ".join(f"{count} {severity}{'s' if count != 1 else ''}" for count, severity in counts if count)
    say(console, f"{usable}; {listed or 'nothing found'}")


def _below(folders: Sequence[Path], file: str) -> str:
    """File as seen from the folder that it lies in; of several folders, with that one's name."""
    path = Path(file)
    for folder in folders if file else ():
        if path.is_relative_to(folder):
            return str(path.relative_to(folder if len(folders) == 1 else folder.parent))
    return file


def _ml(ml: Range | None) -> str:
    return f", {ml.median[0]:.4g} ml ({ml.min[0]:.4g} to {ml.max[0]:.4g})" if ml else ""


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
