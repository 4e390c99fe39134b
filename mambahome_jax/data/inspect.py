"""One case read as preprocessing would read it, for `mambahome check`: its facts and all that is wrong with it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.data.prepare import grid_shift, read_case, require_same_grid
from mambahome_jax.data.store import count_values
from mambahome_jax.datasets import check
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.check import CaseFacts, Finding
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import orientation_of
from mambahome_jax.imaging.volume import Volume, read_forms, read_geometry, read_volume

PERCENTILES = (0.0, 0.5, 5.0, 50.0, 95.0, 99.5, 100.0)

_SAMPLE = 100_000  # voxels that percentiles other than 0 and 100 are taken of
_BLOCK = 1 << 16


@dataclass(frozen=True)
class InspectJob:
    """All that a process needs to know to look at one case.

    labels: the values that may occur, empty for any. fast: headers only.
    """

    case: Case
    channels: int
    labels: Mapping[int, str]
    modality: Modality | None
    fast: bool


def inspect_case(job: InspectJob) -> CaseFacts:
    """Facts and findings of one case; a damaged file is a finding, not an exception."""
    case = job.case
    facts = CaseFacts(case.id, case.patient, case.split, job.modality, str(case.image), case.label is not None)
    facts, findings = _headers(job, facts)
    if not job.fast:
        facts, more = _voxels(job, facts)
        # A fault that the header shows already is met again by the reader of the voxels.
        known = {(finding.file, finding.found) for finding in more}
        findings = [finding for finding in findings if (finding.file, finding.found) not in known] + more
    return replace(facts, findings=tuple(findings))


def _headers(job: InspectJob, facts: CaseFacts) -> tuple[CaseFacts, list[Finding]]:
    case, findings = job.case, []
    grids = {}
    for kind, file in (("image", case.image), ("label", case.label)):
        if file is None:
            continue
        try:
            shape, affine = read_geometry(file)
            grids[kind] = Volume(np.broadcast_to(np.uint8(0), shape), affine)
            channels = shape[3] if len(shape) == 4 else 1
            expected = job.channels if kind == "image" else 1
            if channels != expected:
                wanted = "a 3D volume" if expected == 1 else f"{expected} channels as the fourth axis"
                raise DatasetError(f"{len(shape)}D volume {shape}", file=file, expected=wanted)
        except DatasetError as error:
            findings.append(check.error_finding(case.id, f"{kind} file", error))
            continue
        findings += check.affine_findings(case.id, str(file), affine)
        findings += _forms(case.id, file, shape)
    if "image" in grids:
        grid = grids["image"]
        orientation = orientation_of(grid.affine)
        order = check.axis_order(orientation)
        facts = replace(
            facts,
            shape=tuple(grid.shape[axis] for axis in order),
            spacing=tuple(float(grid.spacing[axis]) for axis in order),
            orientation=orientation,
            digest=_quick_digest(case.image) if job.fast else "",
        )
    if len(grids) == 2 and case.label is not None:
        image, label = grids["image"], grids["label"]
        try:
            require_same_grid(image, label, case.label)
            shift = grid_shift(image.affine, label.affine, image.shape)
            findings += check.small_shift_finding(case.id, str(case.label), *shift)
        except DatasetError as error:
            findings.append(check.error_finding(case.id, "grid", error))
    return facts, findings


def _forms(case: str, file: Path, shape: tuple[int, ...]) -> list[Finding]:
    if not file.name.endswith((".nii", ".nii.gz")):
        return []
    try:
        return check.form_findings(case, str(file), shape, *read_forms(file), grid_shift)
    except DatasetError as error:
        # The sform is used, so that the scan can be read all the same.
        return [replace(check.error_finding(case, "header", error), severity="warning")]


def _voxels(job: InspectJob, facts: CaseFacts) -> tuple[CaseFacts, list[Finding]]:
    case, file = job.case, str(job.case.image)
    try:
        image, label = read_case(case, job.channels, job.labels)
    except DatasetError as error:
        return _all_faults(job, facts, error)
    channels = image.array if image.array.ndim == 4 else image.array[..., None]
    facts = replace(facts, percentiles=_percentiles(channels), digest=_digest(image.array))
    low, high = ([row[i] for row in facts.percentiles or ()] for i in (0, -1))
    findings = check.image_findings(case.id, file, low, high, job.modality)
    if low == high:
        facts = replace(facts, digest="")
    if label is not None:
        counts = count_values(label.array)
        ml = float(abs(np.linalg.det(image.affine[:3, :3]))) / 1000
        volumes = {value: count * ml for value, count in counts.items() if value != 0}
        foreground = _percentiles(channels, label.array != 0) if volumes else None
        facts = replace(facts, volumes_ml=volumes, foreground=foreground)
        findings += check.label_findings(case.id, str(case.label), counts)
    return facts, findings


def _all_faults(job: InspectJob, facts: CaseFacts, first: DatasetError) -> tuple[CaseFacts, list[Finding]]:
    """The fault that preprocessing would name, and what it would have met after it."""
    case = job.case
    errors = []
    try:
        facts = replace(facts, digest=_digest(read_volume(case.image, channels=job.channels).array))
    except DatasetError as error:
        errors.append(("image file", error))
    if case.label is not None:
        try:
            # As if it were its own image: all that is asked of a label map but the grid, which the headers show.
            read_case(replace(case, image=case.label), 1, job.labels)
        except DatasetError as error:
            errors.append(("label", error))
    if all(error.message() != first.message() for _, error in errors):
        errors.append(("grid", first))
    return facts, [check.error_finding(case.id, kind, error) for kind, error in errors]


def _percentiles(channels: np.ndarray, mask: np.ndarray | None = None) -> tuple[tuple[float, ...], ...]:
    """PERCENTILES of each channel of (D, H, W, C), of all voxels or of those in mask (D, H, W)."""
    rows = []
    for c in range(channels.shape[3]):
        # Transposed, since files have their first axis fastest: a view then, and a walk in the order of memory.
        channel = channels[..., c].T
        values = channel.ravel() if mask is None else channel[mask.T]
        sample = values[:: max(values.size // _SAMPLE, 1)]
        inner = np.percentile(sample, PERCENTILES[1:-1])
        rows.append((float(values.min()), *(float(value) for value in inner), float(values.max())))
    return tuple(rows)


def _digest(array: np.ndarray) -> str:
    """Equal for equal voxels, whatever the file's compression, stored type or header."""
    content = hashlib.sha256(str(array.shape).encode())
    content.update(np.asfortranarray(array).T.data)
    return content.hexdigest()


def _quick_digest(path: Path) -> str:
    """Equal for equal files, by their size and three blocks; the last one of a .gz holds the checksum of it all."""
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(size - _BLOCK, 0)):
            file.seek(start)
            content.update(file.read(_BLOCK))
    return content.hexdigest()
