"""preprocess: a folder of scans becomes resampled NIfTI files and the patch store that training reads."""

import contextlib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.config import CtIntensity, Modality
from mambahome_jax.datasets import Dataset, Prepared, PreparedCase, write_prepared
from mambahome_jax.datasets.structures import describe_numbering
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.imaging.geometry import reorient, resampled_grid
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.patches.store import StoreEntry, ct_scale, write_index
from mambahome_jax.preprocessing.case import CaseJob, prepare_case, up_to_date
from mambahome_jax.preprocessing.jobs import choose_workers, make_jobs, open_output
from mambahome_jax.preprocessing.labels import number_structures
from mambahome_jax.preprocessing.open_dataset import open_dataset, several
from mambahome_jax.preprocessing.output import begin, begun, remove_failed, remove_stale, require_own, say_foreign
from mambahome_jax.support.console import command_line, progress_bar, say
from mambahome_jax.support.output_folder import locked
from mambahome_jax.support.paths import local_path, real_path, require_letters
from mambahome_jax.support.processes import run_jobs

_SHOWN = 20


@dataclass(frozen=True)
class Summary:
    """What came of a dataset: ids done now, kept from before, and (id, reason) of what failed or was skipped."""

    prepared: Prepared
    entries: tuple[StoreEntry, ...]
    done: tuple[str, ...]
    kept: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some cases failed, 2 no case is usable."""
        return 2 if not self.entries else int(bool(self.failed))


def run(config: PreprocessConfig) -> int:
    """Preprocess config.input_path into config.output_path; returns the exit code.

    Raises DatasetError: the folder as a whole cannot be read. ConfigError, OutputError: see `prepare`.
    """
    console = Console()
    if real_path(config.output_path) in {real_path(path) for path in several(config.input_path)}:
        raise ConfigError(f"{config.output_path}: input_path and output_path are the same folder; name another output")
    dataset = open_dataset(config)
    named = f"{len(dataset.labels)} structures" if dataset.labels else "labels without names"
    say(console, f"Dataset: {dataset.name}, layout {dataset.layout}: {len(dataset.cases)} cases, {named}")
    with locked(config.output_path, "preprocess", "--output_path"):
        summary = prepare(
            dataset,
            config.output_path,
            spacing=config.spacing,
            orientation=config.orientation,
            modality=config.modality,
            num_workers=config.num_workers,
            overwrite=config.overwrite,
            ct_intensity=config.ct_intensity,
            console=console,
        )
    _print_summary(summary, console)
    return summary.exit_code


def prepare(
    dataset: Dataset,
    output_path: Path,
    *,
    spacing: tuple[float, float, float] | None,
    orientation: str = "RAS",
    modality: Modality | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    nifti: bool = True,
    ct_intensity: CtIntensity = "window",
    console: Console | None = None,
) -> Summary:
    """Bring every case of a dataset to one orientation and spacing and write OUT/images, labels, store, dataset.json.

    spacing: mm an axis of the reoriented volume, 0 or below keeps an axis, None keeps all. modality: instead of what
    the dataset says. nifti: False writes the store only, and dataset.json names the files of the dataset itself.
    ct_intensity: how training and inference are to normalise CT; the voxels in the store stay in HU. What is there from
    the same files with the same settings is kept, unless `overwrite`. A case that fails is reported and the others go
    on.
    Raises OutputError: the output folder cannot be written. ConfigError: an orientation or spacing that cannot work,
    percentiles of CT without a labelled CT.
    """
    console = console or Console()
    output = local_path(output_path)
    require_letters(output)
    reorient(Volume(np.zeros((1, 1, 1)), np.eye(4)), orientation)
    if spacing is not None:
        resampled_grid(np.eye(4), (1, 1, 1), spacing)
    require_own(output, [case.id for case in dataset.cases])
    open_output(output, nifti)
    for note in dataset.notes:
        say(console, f"Note: {note}")
    percentiles = ct_intensity == "percentiles"
    jobs = make_jobs(
        dataset,
        output,
        spacing=spacing,
        orientation=orientation.upper(),
        asked=modality,
        nifti=nifti,
        sampled=percentiles,
        say=partial(say, console),
    )
    if percentiles and not _of_scale(jobs):
        raise ConfigError("--ct_intensity percentiles, but there is no CT with a label that is not of the test split")
    failed = list(dataset.skipped)
    for case, reason in failed[:_SHOWN]:
        say(console, f"Skipped {case}: {reason}")
    if len(failed) > _SHOWN:
        say(console, f"and {len(failed) - _SHOWN} more skipped; {output / 'dataset.json'} will list them all")

    earlier = remove_stale(output, jobs, partial(say, console))
    entries: dict[str, StoreEntry] = {}
    todo = []
    for job in jobs:
        try:
            entry = None if overwrite else up_to_date(job)
        except DatasetError:
            # The file is missing; the worker says so in its own words.
            entry = None
        if entry is None:
            todo.append(job)
        else:
            entries[job.case.id] = entry
    kept = tuple(entries)
    if kept:
        say(console, f"{len(kept)} of {len(jobs)} cases are up to date and kept (--overwrite does them again)")
    # What is odd about a case is so in every run.
    for entry in entries.values():
        _say_remarks(entry, console)
    with begun(output, earlier, jobs) if todo else contextlib.nullcontext():
        failing = _work(todo, entries, num_workers, console)
    labels, values = dict(dataset.labels), dict(dataset.values)
    if not labels:
        before = partial(begin, output, earlier, jobs)
        labels, values, errors = number_structures(jobs, entries, num_workers, before, partial(say, console))
        for case, error in errors:
            failing.append((case, _reason(error, console)))
            say(console, f"Failed {case}: {failing[-1][1]}")
    if values:
        say(console, f"Labels: {describe_numbering(values)}")
    failed += failing
    remove_failed(output, [case for case, _ in failing], earlier, partial(say, console))
    say_foreign(output, [job for job in jobs if job.case.id in entries], partial(say, console))

    ordered = [(job, entries[job.case.id]) for job in jobs if job.case.id in entries]
    write_index(output / "store", [entry for _, entry in ordered])
    prepared = Prepared(
        root=output,
        name=dataset.name,
        spacing=spacing,
        orientation=orientation.upper(),
        channels=dataset.channels,
        labels=labels,
        cases=tuple(_prepared_case(job, entry) for job, entry in ordered),
        skipped=tuple(failed),
        ct_normalisation=_scale(output / "store", [job for job, _ in ordered], console)
        if percentiles
        else PUBLISHED_WINDOW,
        patients=dataset.patients,
        values=values,
    )
    write_prepared(prepared)
    done = tuple(job.case.id for job, _ in ordered if job.case.id not in kept)
    return Summary(prepared, tuple(entry for _, entry in ordered), done, kept, tuple(failed))


def _of_scale(jobs: Iterable[CaseJob]) -> list[str]:
    """Ids of the cases whose labelled voxels say how CT is normalised."""
    return [job.case.id for job in jobs if job.modality == "ct" and job.case.has_label and job.case.split != "test"]


def _scale(store: Path, jobs: Iterable[CaseJob], console: Console) -> CtNormalisation:
    found = ct_scale(store, _of_scale(jobs))
    if found is None:
        say(console, "Note: no voxel of a CT is labelled, so CT is normalised by the window of -175 to 250 HU")
        return PUBLISHED_WINDOW
    numbers = "; ".join(
        f"{low:.4g} to {high:.4g} HU, mean {mean:.4g}, deviation {std:.4g}"
        for low, high, mean, std in zip(found.low, found.high, found.mean, found.std, strict=True)
    )
    say(console, f"CT is normalised by its labelled voxels: {numbers}")
    return found


def _work(
    todo: list[CaseJob], entries: dict[str, StoreEntry], num_workers: int | None, console: Console
) -> list[tuple[str, str]]:
    """Do the cases, adding to `entries`; returns (id, reason) of those that failed.

    Raises OutputError when the first result cannot be written; later, the rest is given up and reported.
    """
    failed: list[tuple[str, str]] = []
    workers = choose_workers(todo, num_workers, partial(say, console))
    with progress_bar(console, "Preprocessing", disable=not todo) as progress:
        bar = progress.add_task("", total=len(todo))
        finished = set()
        for job, result in run_jobs(prepare_case, todo, workers, threads=workers == 1 or len(todo) == 1):
            progress.advance(bar)
            finished.add(job.case.id)
            if isinstance(result, StoreEntry):
                entries[job.case.id] = result
                _say_remarks(result, console)
                continue
            if isinstance(result, OutputError) and not entries:
                raise result
            reason = _reason(result, console)
            failed.append((job.case.id, reason))
            say(console, f"Failed {job.case.id}: {reason}")
            if isinstance(result, OutputError):
                given_up = [job.case.id for job in todo if job.case.id not in finished]
                failed += [(case, "not begun, as the output folder cannot be written") for case in given_up]
                break
    return failed


def _say_remarks(entry: StoreEntry, console: Console) -> None:
    for remark in entry.remarks:
        say(console, f"Note: {entry.id}: {remark}")


def _reason(error: BaseException, console: Console) -> str:
    if isinstance(error, MambaHomeError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error}). Try fewer --num_workers, or a coarser --spacing"
    if not isinstance(error, OSError):
        # A fault of ours: the other cases go on, but its traceback is needed to mend it.
        say(console, "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error}"


def _prepared_case(job: CaseJob, entry: StoreEntry) -> PreparedCase:
    case = job.case
    image, label = str(real_path(case.image)), str(real_path(case.label)) if case.label is not None else None
    if job.nifti:
        image = job.image_path.relative_to(job.output).as_posix()
    if case.has_label and (job.nifti or entry.values):
        label = job.label_path.relative_to(job.output).as_posix()
    return PreparedCase(
        *(
            case.id,
            image,
            label,
            case.split,
            job.modality,
            entry.shape,
            entry.spacing,
            "/".join(case.image.parts[-2:]),
            case.patient,
        ),
        labelled=entry.labelled,
        remarks=entry.remarks,
        in_split=case.in_split,
    )


def _print_summary(summary: Summary, console: Console) -> None:
    prepared, entries = summary.prepared, summary.entries
    table = Table(title=f"{escape(prepared.name)} in {escape(str(prepared.root))}", show_header=False)
    table.add_row("cases", f"{len(summary.done)} done, {len(summary.kept)} kept, {len(summary.failed)} failed")
    if entries:
        shapes, spacings = (np.array([getattr(entry, name) for entry in entries]) for name in ("shape", "spacing"))
        table.add_row("labelled", f"{sum(entry.class_counts is not None for entry in entries)}")
        table.add_row("orientation", prepared.orientation)
        table.add_row("spacing, mm", _range(spacings, "{:.4g}"))
        table.add_row("shape", _range(shapes, "{}"))
        counts = [entry.class_counts for entry in entries if entry.class_counts is not None]
        voxels = sum(sum(count.values()) for count in counts)
        for value, name in prepared.labels.items() if len(prepared.labels) <= _SHOWN else ():
            share = 100 * sum(count.get(value, 0) for count in counts) / max(voxels, 1)
            present = sum(value in count for count in counts)
            table.add_row(f"label {value}", f"{escape(name)}: {share:.3g} % of voxels, in {present} cases")
    console.print(table)
    if summary.failed:
        say(console, f"{len(summary.failed)} cases failed, for the reasons above; dataset.json lists them too")
    if entries:
        say(console, f"Next: {command_line('train', '--data_train', prepared.root)}")


def _range(values: np.ndarray, form: str) -> str:
    low, high = values.min(axis=0), values.max(axis=0)
    parts = [
        form.format(a) if form.format(a) == form.format(b) else f"{form.format(a)}-{form.format(b)}"
        for a, b in zip(low, high, strict=True)
    ]
    return " x ".join(parts)
