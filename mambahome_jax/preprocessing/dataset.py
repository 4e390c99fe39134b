"""The whole of preprocess without a console: a dataset becomes NIfTI files, a patch store and dataset.json."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from mambahome_jax.config import Resampling
from mambahome_jax.datasets.base import Dataset
from mambahome_jax.datasets.label_map import stray_values
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, write_prepared
from mambahome_jax.datasets.structures import describe_numbering, numbering
from mambahome_jax.errors import ConfigError, DatasetError, OutputError
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.imaging.geometry import reorient, resampled_grid
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation, Modality
from mambahome_jax.imaging.plausibility import guessed_modality
from mambahome_jax.imaging.volume import Volume, read_volume
from mambahome_jax.patches.store import StoreEntry, ct_scale, write_index
from mambahome_jax.preprocessing.case import (
    CaseJob,
    Footprint,
    footprint,
    new_numbers,
    prepare_case,
    renumber_case,
    require_disk,
    up_to_date,
)
from mambahome_jax.preprocessing.fingerprint import fingerprint_of_headers, fingerprint_of_prepared
from mambahome_jax.preprocessing.open_dataset import open_dataset, several
from mambahome_jax.preprocessing.output import OutputFolder
from mambahome_jax.preprocessing.plan import PLAN, RESAMPLING, Machine, Plan, Setting, make_plan, read_plan, write_plan
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.console import Say, Track, counted, shown, silent, untracked
from mambahome_jax.support.devices import gpu_memory_gib, jax_share
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import locked
from mambahome_jax.support.paths import local_path, real_path, require_letters
from mambahome_jax.support.processes import count_workers, isolated_reads, run_jobs, why_failed

if TYPE_CHECKING:
    from mambahome_jax.keywords import PreprocessFlags

_SHOWN = 20
_OF_CASES = ("spacing", "resampling")  # settings of the plan that decide the cases' files
_SAMPLED = 3  # scans of which the modality is guessed
# Label maps whose values are replaced sooner than processes start.
_FEW = 8


@dataclass(frozen=True)
class Preprocessed:
    """What came of a dataset: ids of the cases done now and kept from before, (id, reason) of those that failed.

    prepared: what dataset.json says. entries: of the patch store, in the order of prepared.cases. plan: see
    plan.json.
    """

    prepared: Prepared
    entries: tuple[StoreEntry, ...]
    done: tuple[str, ...]
    kept: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    plan: Plan | None = None

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some cases failed, 2 no case is usable."""
        return 2 if not self.entries else int(bool(self.failed))


@shows_keywords(PreprocessConfig)
def preprocess(*, progress: bool = False, **flags: "Unpack[PreprocessFlags]") -> Preprocessed:
    """Reorient and resample a folder of scans, as `mambahome preprocess` does, silently; keywords are its flags.

    Raises:
        DatasetError: a folder as a whole cannot be read.
        ConfigError: an orientation or spacing that cannot work, percentiles of CT without a labelled CT, a folder that
            preprocess did not write.
        OutputError: the output folder cannot be written.
    """
    return preprocess_folders(from_keywords(PreprocessConfig, flags), *shown(progress, "Preprocessing"))


@isolated_reads()
def preprocess_folders(config: PreprocessConfig, say: Say = silent, track: Track = untracked) -> Preprocessed:
    """Preprocess config.input_path into config.output_path; see `preprocess`. say, track: of support.console."""
    if real_path(config.output_path) in {real_path(path) for path in several(config.input_path)}:
        raise ConfigError(f"{config.output_path}: input_path and output_path are the same folder; name another output")
    dataset = open_dataset(config)
    named = counted(len(dataset.labels), "structure") if dataset.labels else "labels without names"
    say(f"Dataset: {dataset.name}, layout {dataset.layout}: {counted(len(dataset.cases), 'case')}, {named}")
    with locked(config.output_path, "preprocess", "--output_path"):
        return prepare_dataset(dataset, config, say=say, track=track)


def prepare_dataset(
    dataset: Dataset, config: PreprocessConfig, *, store_only: bool = False, say: Say = silent, track: Track = untracked
) -> Preprocessed:
    """Bring every case to one orientation and spacing; write what OUT holds; see `preprocess`.

    A case that fails is reported and the others go on. The voxels of a CT stay in HU, however it is to be normalised.
    store_only: for a training on folders as they are, write no NIfTI files and keep every scan's own spacing.
    """
    output = local_path(config.output_path)
    require_letters(output)
    reorient(Volume(np.zeros((1, 1, 1)), np.eye(4)), config.orientation)
    machine = Machine(gpu_memory_gib(), jax_share())
    given, edited = ({}, False) if store_only else _given_settings(dataset, config, machine, say)
    spacing = None if store_only else given["spacing"].value
    resampling = given.get("resampling", RESAMPLING).value
    resampled_grid(np.eye(4), (1, 1, 1), spacing or (0, 0, 0))
    for note in dataset.notes:
        say(f"Note: {note}")
    jobs = _make_jobs(dataset, config, output, spacing, resampling, say)
    percentiles = config.ct_intensity == "percentiles"
    if percentiles and not _of_scale(jobs):
        raise ConfigError("--ct_intensity percentiles, but there is no CT with a label that is not of the test split")
    for case, reason in dataset.skipped[:_SHOWN]:
        say(f"Skipped {case}: {reason}")
    if len(dataset.skipped) > _SHOWN:
        say(f"and {len(dataset.skipped) - _SHOWN} more skipped; {output / 'dataset.json'} will list them all")
    folder = OutputFolder(output, jobs, say)
    folder.open(nifti=not store_only)

    entries: dict[str, StoreEntry] = {}
    for job in () if config.overwrite else jobs:
        # A file that is missing is reported by the worker in its own words.
        with contextlib.suppress(DatasetError):
            if entry := up_to_date(job):
                entries[job.case.id] = entry
    kept = tuple(entries)
    if kept:
        say(f"{len(kept)} of {counted(len(jobs), 'case')} up to date and kept (--overwrite does them again)")
    # What is odd about a case is so in every run.
    for entry in entries.values():
        _say_remarks(entry, say)
    todo = [job for job in jobs if job.case.id not in entries]
    footprints = {job.case.id: footprint(job) for job in todo}
    require_disk(output, todo, footprints, say)
    with folder.begun() if todo else contextlib.nullcontext():
        failing = _work(prepare_case, todo, entries, config.num_workers, footprints, say, track)
    labels, values = dict(dataset.labels), dict(dataset.values)
    if not labels:
        labels, values, errors = _number_structures(jobs, entries, folder, config.num_workers, say)
        failing += errors
    if values:
        say(f"Labels: {describe_numbering(values)}")
    folder.remove_failed([case for case, _ in failing])
    done = [job for job in jobs if job.case.id in entries]
    folder.say_foreign(done)

    ordered = [entries[job.case.id] for job in done]
    write_index(output / "store", ordered)
    prepared = Prepared(
        root=output,
        name=dataset.name,
        spacing=spacing,
        orientation=config.orientation.upper(),
        channels=dataset.channels,
        labels=labels,
        cases=tuple(_with_twins(map(_prepared_case, done, ordered), ordered, say)),
        skipped=(*dataset.skipped, *failing),
        ct_normalisation=_scale(output / "store", done, say) if percentiles else PUBLISHED_WINDOW,
        patients=dataset.patients,
        values=values,
        resampling=resampling,
    )
    write_prepared(prepared)
    plan = None
    if ordered and not store_only:
        fingerprint = fingerprint_of_prepared(prepared, ordered)
        plan = make_plan(fingerprint, machine, given)
        write_plan(output / PLAN, plan, machine, fingerprint, edited)
    new = tuple(entry.id for entry in ordered if entry.id not in kept)
    return Preprocessed(prepared, tuple(ordered), new, kept, prepared.skipped, plan)


def _given_settings(
    dataset: Dataset, config: PreprocessConfig, machine: Machine, say: Say
) -> tuple[dict[str, Setting], bool]:
    """Take the settings that --spacing, --plan or an earlier plan decide, spacing among them, and whether by an edit.

    Of an earlier plan that nobody edited those are kept that decide the cases' files, or added cases would have all of
    them resampled again.
    """
    earlier, edited = local_path(config.output_path) / PLAN, False
    given: dict[str, Setting] = {}
    if config.plan is not None:
        given, _, edited = read_plan(config.plan)
        say(f"Plan: {config.plan}")
    elif earlier.is_file() and not config.overwrite and config.spacing is None:
        given, _, edited = read_plan(earlier)
        if not edited:
            given = {name: setting for name, setting in given.items() if name in _OF_CASES}
        say(f"Plan: {'all' if edited else 'the spacing'} of {earlier} (--overwrite plans anew)")
    if config.spacing is not None:
        given["spacing"] = Setting(config.spacing, "given by --spacing")
    elif "spacing" not in given:
        fingerprint = fingerprint_of_headers(dataset, config.orientation)
        # Without a scan that can be read every case fails, for its own reason.
        unread = Setting((0.0, 0.0, 0.0), "no header could be read")
        given["spacing"] = make_plan(fingerprint, machine).spacing if fingerprint else unread
    if config.resampling is not None:
        given["resampling"] = Setting(config.resampling, "given by --resampling")
    elif config.plan is None and earlier.is_file() and not config.overwrite:
        given |= {name: kept for name, kept in read_plan(earlier).settings.items() if name == "resampling"}
    resampling = given.setdefault("resampling", RESAMPLING)
    spacing = given["spacing"]
    override = "; --spacing overrides" if config.spacing is None else ""
    say(f"Spacing: {as_typed(spacing.value)} mm, {spacing.reason}{override}")
    if resampling.value != RESAMPLING.value:
        say(f"Resampling: {resampling.value}" + (f", {resampling.reason}" if resampling.reason else ""))
    return given, edited


def _make_jobs(
    dataset: Dataset,
    config: PreprocessConfig,
    output: Path,
    spacing: tuple[float, float, float] | None,
    resampling: Resampling,
    say: Say,
) -> list[CaseJob]:
    """Make a job for each case, in the dataset's order. spacing: None to write the store alone, at the scans' own."""
    modality, named = config.modality, sorted({str(case.modality) for case in dataset.cases})
    reason, override = f"{', '.join(named)}, as the dataset says", "; --modality ct|mr|us overrides"
    if modality is not None:
        reason, override = f"{modality}, as asked for by --modality", ""
    guess: Modality | None = None
    if modality is None and any(case.modality is None for case in dataset.cases):
        guess, why = _guess_modality(dataset)
        reason = f"{guess}, {why}"
    say(f"Modality: {reason}{override}")
    return [
        CaseJob(
            case=case,
            output=output,
            channels=len(dataset.channels),
            labels=dict(dataset.labels),
            spacing=spacing,
            orientation=config.orientation.upper(),
            modality=modality or case.modality or guess or "ct",
            # A label map that is made here, or channels put together, are in no file of the dataset's own.
            nifti=spacing is not None or bool(case.masks or case.images or case.values),
            hint=dataset.hint,
            sampled=config.ct_intensity == "percentiles",
            resampling=resampling,
        )
        for case in dataset.cases
    ]


def _guess_modality(dataset: Dataset) -> tuple[Modality, str]:
    """Guess the modality of the cases that do not name their own, and say why, by the values of a few scans."""
    extremes: list[tuple[float, float]] = []
    for index in np.random.default_rng(0).permutation(len(dataset.cases)):
        case = dataset.cases[index]
        if case.modality is None and len(extremes) < _SAMPLED:
            # A scan that cannot be read is reported when its turn comes.
            with contextlib.suppress(DatasetError):
                array = read_volume(case.image, spacing_scale=case.spacing_scale, series=case.series).array
                extremes.append((float(array.min()), float(array.max())))
    values = ", ".join(f"{low:g}" for low, _ in extremes) or "unknown"
    why = f"guessed from the lowest values of {counted(len(extremes), 'scan')} ({values})"
    if guessed_modality(extremes) == "ct":
        return "ct", f"{why}: Hounsfield units of air"
    return "mr", f"{why}: no Hounsfield units of air"


def _work(
    function: Callable[[CaseJob], StoreEntry],
    todo: Sequence[CaseJob],
    entries: dict[str, StoreEntry],
    num_workers: int | None,
    footprints: Mapping[str, Footprint],
    say: Say,
    track: Track = untracked,
    few: int = 1,
) -> list[tuple[str, str]]:
    """Do the cases, adding to `entries`; return (id, reason) of those that failed, which leave `entries`.

    footprints: by case. few: cases for which no process is worth its start. A full disk gives up the rest; as the
    first result, it raises.
    """
    failed: list[tuple[str, str]] = []
    workers = count_workers(num_workers, todo, lambda job: footprints[job.case.id].peak, say)
    waiting = dict.fromkeys(job.case.id for job in todo)
    for job, result in track(run_jobs(function, todo, workers, threads=workers == 1 or len(todo) <= few), len(todo)):
        case = job.case.id
        del waiting[case]
        if isinstance(result, StoreEntry):
            if case not in entries:
                _say_remarks(result, say)
            entries[case] = result
            continue
        if isinstance(result, OutputError) and not entries:
            raise result
        reason = why_failed(result, say, "Try fewer --num_workers, or a coarser --spacing")
        failed.append((case, reason))
        say(f"Failed {case}: {reason}")
        if isinstance(result, OutputError):
            failed += [(case, "not begun, as the output folder cannot be written") for case in waiting]
            break
    for case, _ in failed:
        entries.pop(case, None)
    return failed


def _number_structures(
    jobs: Sequence[CaseJob], entries: dict[str, StoreEntry], folder: OutputFolder, num_workers: int | None, say: Say
) -> tuple[dict[int, str], dict[int, int], list[tuple[str, str]]]:
    """Number structures without names by the values of all cases, and write label maps anew where these have gaps.

    Returns number -> name, number -> stored value (empty without gaps), and (id, reason) of cases that failed.
    """
    ordered = [entries[job.case.id] for job in jobs if job.case.id in entries]
    counts = {entry.id: entry.stored_counts for entry in ordered if entry.stored_counts}
    for stray in stray_values(counts):
        say(f"Note: {stray}: look at it with mambahome check; it counts as a structure")
    stored = {entry.values.get(value, value) for entry in ordered for value in entry.foreground_counts}
    for value in sorted({value for voxels in counts.values() for value in voxels} - stored):
        say(f"Note: label value {value} is in no voxel at this spacing, and is no structure")
    values = numbering(stored)
    names = {number: f"label_{value}" for number, value in (values or {v: v for v in sorted(stored)}).items()}
    tables = {entry.id: new_numbers(entry, values) for entry in ordered}
    todo = [job for job in jobs if any(old != new for old, new in tables.get(job.case.id, {}).items())]
    if not todo:
        return names, values, []
    folder.begin()
    footprints = {job.case.id: footprint(job) for job in todo}
    renumber = functools.partial(renumber_case, values=values, names=names)
    return names, values, _work(renumber, todo, entries, num_workers, footprints, say, few=_FEW - 1)


def _say_remarks(entry: StoreEntry, say: Say) -> None:
    for remark in entry.remarks:
        say(f"Note: {entry.id}: {remark}")


def _of_scale(jobs: Iterable[CaseJob]) -> list[str]:
    """Ids of the cases whose labelled voxels say how CT is normalised."""
    return [job.case.id for job in jobs if job.modality == "ct" and job.case.has_label and job.case.split != "test"]


def _scale(store: Path, jobs: Iterable[CaseJob], say: Say) -> CtNormalisation:
    scale = ct_scale(store, _of_scale(jobs))
    if scale is None:
        say("Note: no voxel of a CT is labelled, so CT is normalised by the window of -175 to 250 HU")
        return PUBLISHED_WINDOW
    numbers = "; ".join(
        f"{low:.4g} to {high:.4g} HU, mean {mean:.4g}, deviation {std:.4g}"
        for low, high, mean, std in zip(scale.low, scale.high, scale.mean, scale.std, strict=True)
    )
    say(f"CT is normalised by its labelled voxels: {numbers}")
    return scale


def _with_twins(cases: Iterable[PreparedCase], entries: Iterable[StoreEntry], say: Say) -> list[PreparedCase]:
    """Make the cases of one image one patient's, so that none is held out whose image is trained on."""
    cases, first, patient_of = list(cases), dict[str, PreparedCase](), dict[str, str]()
    for case, entry in zip(cases, entries, strict=True):
        # Entries of earlier versions do not say.
        twin = first.setdefault(next(iter(entry.contents), case.id), case)
        # Those that were joined before are asked for by what they are called now.
        one, other = (patient_of.get(each.patient, each.patient) for each in (case, twin))
        if one != other:
            patient_of |= {name: other for name in (one, *(n for n, now in patient_of.items() if now == one))}
        if twin is not case:
            parts = f"; the dataset has them in {twin.split} and {case.split}" if twin.split != case.split else ""
            say(f"Note: {case.id} and {twin.id} are the same image, and count as one patient{parts}")
    return [replace(case, patient=patient_of.get(case.patient, case.patient)) for case in cases]


def _prepared_case(job: CaseJob, entry: StoreEntry) -> PreparedCase:
    case, written = job.case, job.written(entry)
    image, label = str(real_path(case.image)), str(real_path(case.label)) if case.label is not None else None
    if job.image_path in written:
        image = job.image_path.relative_to(job.output).as_posix()
    if job.label_path in written:
        label = job.label_path.relative_to(job.output).as_posix()
    return PreparedCase(
        id=case.id,
        image=image,
        label=label,
        split=case.split,
        modality=job.modality,
        shape=entry.shape,
        spacing=entry.spacing,
        source="/".join(case.image.parts[-2:]),
        patient=case.patient,
        labelled=entry.labelled,
        remarks=entry.remarks,
        in_split=case.in_split,
        fold=case.fold,
    )
