"""The whole of check without a console: each case read as preprocessing reads it, its facts and all faults found."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.label_map import own_image, read_image, read_label_map, thumbnail_of
from mambahome_jax.errors import DatasetError, MambaHomeError
from mambahome_jax.flags import CheckConfig
from mambahome_jax.imaging.geometry import axis_order, on_grid_of, orientation_of, shift_between
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles
from mambahome_jax.imaging.nifti import forms_of
from mambahome_jax.imaging.plausibility import intensity_remarks
from mambahome_jax.imaging.volume import Volume, count_values, read_grid
from mambahome_jax.preprocessing import findings as look
from mambahome_jax.preprocessing.findings import SCANS, SEVERITIES, CaseFacts, Finding
from mambahome_jax.preprocessing.open_dataset import open_checked, several
from mambahome_jax.preprocessing.plan import Machine
from mambahome_jax.preprocessing.summary import DatasetSummary, likely_modality, summarise_dataset
from mambahome_jax.ranges import SAMPLE_PERCENTILES
from mambahome_jax.support.console import Say, Track, counted, shown, silent, untracked
from mambahome_jax.support.devices import gpu_memory_gib, jax_share
from mambahome_jax.support.files import write_json
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.processes import count_workers, isolated_reads, run_jobs, why_failed

if TYPE_CHECKING:
    from mambahome_jax.keywords import CheckFlags

PERCENTILES = (0.0, *SAMPLE_PERCENTILES, 100.0)

_VERSION = 1
_SAMPLE = 100_000  # labelled voxels of which percentiles other than 0 and 100 are taken
_BLOCK = 1 << 16
# Of a scan and its label map while they are read and looked at: float64 on disk, float32, sorted samples.
_BYTES_A_VOXEL = 24
_SMALL_FILE = 1 << 20  # bytes; thousands of them are not opened only to know how little memory they take
_BATCH = 16  # cases of small files that a process is given at a time
_BATCHES = 4  # that each process gets at least, so that none waits long for another one's last
_THREAD_BELOW = 8  # cases for which starting processes takes longer than the work


@dataclass(frozen=True)
class Checked:
    """What a check found. findings: errors first; facts: of every case, in the dataset's order."""

    folders: tuple[Path, ...]
    dataset: Dataset
    facts: tuple[CaseFacts, ...]
    findings: tuple[Finding, ...]
    summary: DatasetSummary
    fast: bool
    seconds: float

    @property
    def usable(self) -> int:
        """Number of cases that preprocessing would take."""
        return sum(fact.usable for fact in self.facts)

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each severity."""
        return {name: sum(finding.severity == name for finding in self.findings) for name in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """0 clean or notes only, 1 errors or warnings, 2 no usable case."""
        return int(any(finding.severity != "note" for finding in self.findings)) if self.usable else 2


@shows_keywords(CheckConfig)
def check(*, progress: bool = False, **flags: "Unpack[CheckFlags]") -> Checked:
    """Look through a dataset before any work, as `mambahome check` does, silently; keywords are its flags.

    Raises:
        DatasetError: a folder as a whole cannot be read, or several cannot be joined.
        ConfigError, OutputError.
    """
    return check_folders(from_keywords(CheckConfig, flags), *shown(progress, "Checking"))


@isolated_reads()
def check_folders(
    config: CheckConfig, say: Say = silent, track: Track = untracked, show: Callable[[Checked], None] = lambda _: None
) -> Checked:
    """Check config.folder; see `check`. say, track: of support.console; show: takes the result before it is written."""
    started = time.perf_counter()
    dataset = open_checked(config)
    say(f"Dataset: {dataset.name}, layout {dataset.layout}, {counted(len(dataset.cases), 'case')}")
    facts = _examine(dataset, config, say, track)
    findings = sorted(
        [*(finding for fact in facts for finding in fact.findings), *look.dataset_findings(dataset, facts)],
        key=lambda finding: (SEVERITIES.index(finding.severity), finding.kind, finding.case),
    )
    unnamed = [fact for fact in facts if fact.usable and fact.modality is None and fact.percentiles]
    if dataset.layout == SCANS and unnamed:
        modality, why = likely_modality(unnamed)
        say(f"Modality: {modality}, {why}; --modality ct|mr|us overrides")
    checked = Checked(
        several(config.folder),
        dataset,
        tuple(facts),
        tuple(findings),
        summarise_dataset(dataset, facts, Machine(gpu_memory_gib(), jax_share())),
        config.fast,
        round(time.perf_counter() - started, 1),
    )
    show(checked)
    if config.json is not None:
        _write(checked, config.json)
    return checked


def _write(checked: Checked, file: Path) -> None:
    folders, dataset = [str(folder) for folder in checked.folders], checked.dataset
    content = {
        "version": _VERSION,
        "folder": folders[0] if len(folders) == 1 else folders,
        "name": dataset.name,
        "layout": dataset.layout,
        "fast": checked.fast,
        "seconds": checked.seconds,
        "exit_code": checked.exit_code,
        "cases": len(checked.facts),
        "usable": checked.usable,
        "counts": checked.counts,
        "findings": [asdict(finding) for finding in checked.findings],
        "percentiles": PERCENTILES,
        "summary": asdict(checked.summary),
    }
    write_json(file, content)


@dataclass(frozen=True)
class ExamineJob:
    """All that a process needs to know to look at one case.

    labels: the values that may occur, empty for any. hint: what to do about others. fast: headers only.
    """

    case: Case
    channels: int
    labels: Mapping[int, str]
    hint: str
    modality: Modality | None
    fast: bool

    @property
    def facts(self) -> CaseFacts:
        """What is known before any file is read."""
        case = self.case
        return CaseFacts(case.id, case.patient, case.split, self.modality, str(case.image), case.has_label)


def _examine(dataset: Dataset, config: CheckConfig, say: Say, track: Track) -> list[CaseFacts]:
    """Examine every case, in several processes; a case that fails is a finding of it."""
    channels, labels = len(dataset.channels), dict(dataset.labels)
    jobs = [
        ExamineJob(case, channels, labels, dataset.hint, config.modality or case.modality, config.fast)
        for case in dataset.cases
    ]
    workers = count_workers(config.num_workers, jobs, _peak_bytes, say)
    alone = workers == 1 or len(jobs) < _THREAD_BELOW
    many = len(jobs) >= _BATCHES * _BATCH * workers
    small = many and all(_peak_bytes(job) == 1 for job in jobs[:: len(jobs) // _BATCH])
    results = run_jobs(examine_case, jobs, workers, threads=alone, batch=_BATCH if small else 1)
    facts = {
        job.case.id: result if isinstance(result, CaseFacts) else _unexamined(job, result, say)
        for job, result in track(results, len(jobs))
    }
    return [facts[job.case.id] for job in jobs]


def _unexamined(job: ExamineJob, error: BaseException, say: Say) -> CaseFacts:
    action = "" if isinstance(error, MambaHomeError | OSError) else "This is a fault of the program; please report it."
    action = "Try fewer --num_workers." if isinstance(error, MemoryError) else action
    finding = job.facts.finding("error", "unreadable", why_failed(error, say), "", action)
    return replace(job.facts, findings=(finding,))


def _peak_bytes(job: ExamineJob) -> int:
    if job.fast:
        return 1
    try:
        if sum(part.stat().st_size for part in parts(job.case.image)) < _SMALL_FILE:
            return 1
        grid = read_grid(job.case.image, spacing_scale=job.case.spacing_scale, series=job.case.series)
    except (DatasetError, OSError):
        return 1
    return _BYTES_A_VOXEL * len(job.case.image_files) * int(np.prod(grid.array.shape, dtype=float))


def examine_case(job: ExamineJob) -> CaseFacts:
    """Give facts and findings of one case; a damaged file is a finding, not an exception."""
    facts, findings, grid = _headers(job)
    if not job.fast:
        changes, more = _voxels(job, grid)
        facts |= changes
        # A fault that the header shows is met again by the reader of the voxels.
        known = {(finding.file, finding.found) for finding in more}
        findings = [finding for finding in findings if (finding.file, finding.found) not in known] + more
    return replace(job.facts, **facts, findings=tuple(findings))


def _headers(job: ExamineJob) -> tuple[dict[str, Any], list[Finding], Volume | None]:
    """Give facts and findings of the headers, and the grid on which the label map can be judged."""
    case = job.case
    facts: dict[str, Any] = {}
    findings: list[Finding] = []
    images = [
        _header(case, "image file", file, 1 if case.images else job.channels, True, findings)
        for file in case.image_files
    ]
    image = next((grid for grid in images if grid is not None), None)
    if image is not None:
        orientation = orientation_of(image.affine)
        order = axis_order(orientation)
        facts = {
            "shape": tuple(image.shape[axis] for axis in order),
            "spacing": tuple(float(image.spacing[axis]) for axis in order),
            "orientation": orientation,
            "digest": _quick_digest(case.image_files) if job.fast else "",
        }
    comparable, label = image is not None, None
    for file in case.label_files:
        # Masks share their header; what is odd in it would be told fifty times.
        grid = _header(case, "label", file, 1, case.label is not None, findings)
        if grid is None:
            continue
        label = label or grid
        if job.fast and _quick_digest((file,)) in map(_quick_digest, ((path,) for path in case.image_files)):
            findings.append(look.error_finding(case.id, "label", own_image(file)))
        if image is not None and comparable:
            try:
                turned = on_grid_of(image, grid, file)
                findings += look.shift_findings(case.id, str(file), *shift_between(image, turned))
                if turned is not grid:
                    findings.append(look.turned_finding(case.id, str(file), grid.affine, image.affine))
            except DatasetError as error:
                findings.append(look.error_finding(case.id, "grid", error))
                comparable = False
    return facts, findings, image if comparable else label


def _header(
    case: Case, kind: str, file: Path, channels: int, with_forms: bool, findings: list[Finding]
) -> Volume | None:
    """Read the file's grid without voxels, None where it cannot be read; what its header shows joins `findings`."""
    try:
        grid = read_grid(file, spacing_scale=case.spacing_scale, series=case.series)
        shape = grid.array.shape
        if (shape[3] if len(shape) == 4 else 1) != channels:
            expected = "a 3D volume" if channels == 1 else f"{channels} channels as the fourth axis"
            raise DatasetError(f"{len(shape)}D volume {shape}", file=file, expected=expected)
    except DatasetError as error:
        findings.append(look.error_finding(case.id, kind, error))
        return None
    if with_forms:
        findings += look.affine_findings(case.id, str(file), grid.affine)
    # Only NIfTI says where it lies in several ways.
    if with_forms and grid.header is not None and grid.header.nifti is not None:
        try:
            findings += look.form_findings(case.id, str(file), shape, *forms_of(file, grid.header))
        except DatasetError as error:
            # The scan can be read all the same, by its sform.
            findings.append(replace(look.error_finding(case.id, "header", error), severity="warning"))
    return grid


def _voxels(job: ExamineJob, grid: Volume | None) -> tuple[dict[str, Any], list[Finding]]:
    case = job.case
    facts: dict[str, Any] = {}
    findings: list[Finding] = []
    channels = label = image = None
    try:
        image = read_image(case, job.channels)
        channels = image.array if image.array.ndim == 4 else image.array[..., None]
        sample = intensity_sample(channels)
        ends = [(float(channels[..., c].min()), float(channels[..., c].max())) for c in range(channels.shape[3])]
        inner = sample_percentiles(sample)
        facts["percentiles"] = tuple((low, *row, high) for (low, high), row in zip(ends, inner, strict=True))
        facts["odd"] = intensity_remarks(sample)
        if any(low != high for low, high in ends):
            facts |= {"digest": _digest(image.array), "thumbnail": thumbnail_of(image)}
    except DatasetError as error:
        findings.append(look.error_finding(case.id, "image file", error))
    if not case.has_label or grid is None:
        return facts, findings
    file = str(case.label_files[0] if case.label is not None else case.label_files[0].parent)
    if image is not None and image.shape == grid.shape:
        # With its voxels, of which the label map may be a copy; without them its header's grid has to do.
        grid = replace(grid, array=image.array)
    try:
        label, remarks, _ = read_label_map(case, grid, job.labels, job.hint)
    except DatasetError as error:
        return facts, [*findings, look.error_finding(case.id, "label", error)]
    if label is None:
        return facts, findings
    findings += [Finding("note", "label", case.id, file, remark) for remark in remarks]
    counts = count_values(label.array)
    findings += look.label_findings(case.id, file, counts)
    ml = float(abs(np.linalg.det(grid.affine[:3, :3]))) / 1000
    voxels = {value: count for value, count in counts.items() if value != 0}
    facts |= {"volumes_ml": {value: count * ml for value, count in voxels.items()}, "label_voxels": voxels}
    if voxels and channels is not None and channels.shape[:3] == label.shape:
        facts["foreground"] = _foreground_percentiles(channels, label.array != 0)
    return facts, findings


def _foreground_percentiles(channels: np.ndarray, mask: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Take PERCENTILES of each channel of (D, H, W, C), of the voxels in mask (D, H, W)."""
    rows = []
    for c in range(channels.shape[3]):
        # Transposed, since files have their first axis fastest: a view then, and a walk in the order of memory.
        values = channels[..., c].T[mask.T]
        ordered = np.sort(values[:: max(values.size // _SAMPLE, 1)])
        (inner,) = sample_percentiles(ordered[:, None])
        rows.append((float(values.min()), *inner, float(values.max())))
    return tuple(rows)


def _digest(array: np.ndarray) -> str:
    """Equal for equal voxels, whatever the file's compression, stored type or header."""
    content = hashlib.sha256(str(array.shape).encode())
    content.update(np.asfortranarray(array).T.data)
    return content.hexdigest()


def _quick_digest(paths: Sequence[Path]) -> str:
    """Equal for equal files, by their size and three blocks; the last one of a .gz holds the checksum of it all."""
    content = hashlib.sha256()
    for path in (part for whole in paths for part in parts(whole)):
        size = path.stat().st_size
        content.update(str(size).encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - _BLOCK, 0)):
                file.seek(start)
                content.update(file.read(_BLOCK))
    return content.hexdigest()
