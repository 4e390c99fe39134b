"""One case read as preprocessing reads it, for `mambahome check`: its facts and all that is wrong with it. No jax."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from mambahome_jax.config import SAMPLE_PERCENTILES, Modality
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.duplicates import thumbnail_of
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.label_map import count_values, own_image, read_image, read_label_map
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import NIFTI_SUFFIXES, suffix_of
from mambahome_jax.imaging.geometry import axis_order, orientation_of, require_same_grid, shift_between
from mambahome_jax.imaging.header import grid_shift
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles
from mambahome_jax.imaging.plausibility import intensity_remark
from mambahome_jax.imaging.volume import Volume, read_forms, read_grid
from mambahome_jax.preprocessing import findings as findings_of
from mambahome_jax.preprocessing.findings import CaseFacts, Finding

PERCENTILES = (0.0, *SAMPLE_PERCENTILES, 100.0)

_SAMPLE = 100_000  # labelled voxels of which percentiles other than 0 and 100 are taken
_BLOCK = 1 << 16


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


def examine_case(job: ExamineJob) -> CaseFacts:
    """Facts and findings of one case; a damaged file is a finding, not an exception."""
    facts, findings, grid = _headers(job)
    if not job.fast:
        facts, more = _voxels(job, facts, grid)
        # A fault that the header shows is met again by the reader of the voxels.
        known = {(finding.file, finding.found) for finding in more}
        findings = [finding for finding in findings if (finding.file, finding.found) not in known] + more
    return replace(facts, findings=tuple(findings))


def _headers(job: ExamineJob) -> tuple[CaseFacts, list[Finding], Volume | None]:
    """Facts and findings of the headers, and the grid on which the label map can be judged."""
    case, findings = job.case, []
    facts = CaseFacts(case.id, case.patient, case.split, job.modality, str(case.image), case.has_label)
    images = []
    for file in case.image_files:
        grid, more = _header(case, "image file", file, 1 if case.images else job.channels, forms=True)
        findings += more
        images += [grid] if grid is not None else []
    image = images[0] if images else None
    if image is not None:
        orientation = orientation_of(image.affine)
        order = axis_order(orientation)
        facts = replace(
            facts,
            shape=tuple(image.shape[axis] for axis in order),
            spacing=tuple(float(image.spacing[axis]) for axis in order),
            orientation=orientation,
            digest=_quick_digest(case.image_files) if job.fast else "",
        )
    label = None
    for file in case.label_files:
        # Masks share their header; what is odd in it would be told fifty times.
        grid, more = _header(case, "label", file, 1, forms=case.label is not None)
        findings += more
        if grid is None:
            continue
        label = label or grid
        if job.fast and _quick_digest((file,)) in map(_quick_digest, ((path,) for path in case.image_files)):
            findings.append(findings_of.error_finding(case.id, "label", own_image(file)))
        if image is not None:
            more = _compare(case.id, image, grid, file)
            findings += more
            if any(finding.severity == "error" for finding in more):
                image = None
    return facts, findings, image or label


def _header(case: Case, kind: str, file: Path, channels: int, forms: bool) -> tuple[Volume | None, list[Finding]]:
    """A volume of the file's grid without voxels, None where it cannot be read, and what its header shows."""
    try:
        # Only NIfTI says where it lies in several ways.
        nifti = bool(suffix_of(file.name, NIFTI_SUFFIXES))
        scale = case.spacing_scale
        if nifti:
            grid, forms_of = read_forms(file, spacing_scale=scale)
        else:
            grid, forms_of = read_grid(file, spacing_scale=scale, series=case.series), None
        shape = grid.array.shape
        found = shape[3] if len(shape) == 4 else 1
        if found != channels:
            expected = "a 3D volume" if channels == 1 else f"{channels} channels as the fourth axis"
            raise DatasetError(f"{len(shape)}D volume {shape}", file=file, expected=expected)
    except DatasetError as error:
        return None, [findings_of.error_finding(case.id, kind, error)]
    findings = []
    if forms:
        findings += findings_of.affine_findings(case.id, str(file), grid.affine)
    if forms and forms_of is not None:
        try:
            findings += findings_of.form_findings(case.id, str(file), shape, *forms_of(), grid_shift)
        except DatasetError as error:
            # The scan can be read all the same, by its sform.
            findings.append(replace(findings_of.error_finding(case.id, "header", error), severity="warning"))
    return grid, findings


def _compare(case: str, image: Volume, label: Volume, file: Path) -> list[Finding]:
    try:
        require_same_grid(image, label, file)
    except DatasetError as error:
        return [findings_of.error_finding(case, "grid", error)]
    return findings_of.small_shift_finding(case, str(file), *shift_between(image, label))


def _voxels(job: ExamineJob, facts: CaseFacts, grid: Volume | None) -> tuple[CaseFacts, list[Finding]]:
    case, findings = job.case, []
    channels = label = image = None
    try:
        image = read_image(case, job.channels)
        channels = image.array if image.array.ndim == 4 else image.array[..., None]
        sample = intensity_sample(channels)
        ends = [(float(channels[..., c].min()), float(channels[..., c].max())) for c in range(channels.shape[3])]
        inner = sample_percentiles(sample)
        odd = {modality: intensity_remark(sample, modality) for modality in get_args(Modality)}
        facts = replace(
            facts,
            percentiles=tuple((low, *row, high) for (low, high), row in zip(ends, inner, strict=True)),
            odd={modality: remark for modality, remark in odd.items() if remark is not None},
        )
        if any(low != high for low, high in ends):
            facts = replace(facts, digest=_digest(image.array), thumbnail=thumbnail_of(image))
    except DatasetError as error:
        findings.append(findings_of.error_finding(case.id, "image file", error))
    if not case.has_label or grid is None:
        return facts, findings
    file = str(case.label_files[0] if case.label is not None else case.label_files[0].parent)
    if image is not None and image.shape == grid.shape:
        # With its voxels, of which the label map may be a copy; without them its header's grid has to do.
        grid = replace(grid, array=image.array)
    try:
        label, remarks = read_label_map(case, grid, job.labels, job.hint)
    except DatasetError as error:
        return facts, [*findings, findings_of.error_finding(case.id, "label", error)]
    if label is None:
        return facts, findings
    findings += [Finding("note", "label", case.id, file, remark, "", "") for remark in remarks]
    counts = count_values(label.array)
    findings += findings_of.label_findings(case.id, file, counts)
    ml = float(abs(np.linalg.det(grid.affine[:3, :3]))) / 1000
    voxels = {value: count for value, count in counts.items() if value != 0}
    volumes = {value: count * ml for value, count in voxels.items()}
    facts = replace(facts, volumes_ml=volumes, label_voxels=voxels)
    if volumes and channels is not None and channels.shape[:3] == label.shape:
        facts = replace(facts, foreground=_foreground_percentiles(channels, label.array != 0))
    return facts, findings


def _foreground_percentiles(channels: np.ndarray, mask: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """PERCENTILES of each channel of (D, H, W, C), of the voxels in mask (D, H, W)."""
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
