"""One case from the files that the user has to the files that training reads: check, reorient, resample, write."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.label_map import count_values, read_counted_label_map, read_image
from mambahome_jax.errors import DatasetError, OutputError, naming
from mambahome_jax.imaging.geometry import coarse_remark, reorient, resample
from mambahome_jax.imaging.header import ROUNDING_VOXELS, Header, grid_shift
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles, statistics
from mambahome_jax.imaging.plausibility import intensity_remark
from mambahome_jax.imaging.source_record import place_of, record_of, renewed
from mambahome_jax.imaging.volume import Volume, read_grid, write_volume
from mambahome_jax.patches import store
from mambahome_jax.support.paths import as_on_disk

# Raise it when the same input would give other files: every case is then done again.
CODE_VERSION = 2

_MAY_LOSE = 8  # voxels that become one where a structure of some voxels may be lost
_BODY_ABOVE: dict[Modality, float] = {"ct": -175.0, "mr": 0.0, "us": 0.0}


@dataclass(frozen=True)
class CaseJob:
    """All that a process needs to know to do one case.

    spacing: None keeps each scan's own. labels: the values that may occur, empty for any. nifti: write images/ and
    labels/ too, not only the store. hint: what to do about a label value that the table does not have.
    sampled: values of the labelled voxels of a CT are needed, which stores of earlier versions lack.
    """

    case: Case
    output: Path
    channels: int
    labels: Mapping[int, str]
    spacing: tuple[float, float, float] | None
    orientation: str
    modality: Modality
    nifti: bool
    hint: str = ""
    sampled: bool = False

    @property
    def image_path(self) -> Path:
        """Where the resampled image goes."""
        return self.output / "images" / f"{self.case.id}.nii.gz"

    @property
    def label_path(self) -> Path:
        """Where the resampled label map goes."""
        return self.output / "labels" / f"{self.case.id}.nii.gz"


def fingerprint(job: CaseJob) -> dict[str, Any]:
    """What the result depends on, in values of JSON: the files' content, the settings, this code.

    Raises DatasetError: a file is missing.
    """
    return {"sources": record_of(_sources(job.case))} | _settings(job)


def _sources(case: Case) -> list[Path]:
    return [part for path in (*case.image_files, *case.label_files) for part in parts(path)]


def _settings(job: CaseJob) -> dict[str, Any]:
    case = job.case
    return {
        "spacing": None if job.spacing is None else [float(mm) for mm in job.spacing],
        "orientation": job.orientation,
        "modality": job.modality,
        "channels": job.channels,
        "labels": {str(value): name for value, name in sorted(job.labels.items())},
        "masks": [value for value, _ in case.masks],
        "values": None if case.values is None else sorted([old, new] for old, new in case.values.items()),
        "labelled": None if case.labelled is None else list(case.labelled),
        "spacing_scale": case.spacing_scale,
        "nifti": job.nifti,
        "version": CODE_VERSION,
    } | ({"series": list(case.series)} if case.series else {})


def _record_now(recorded: Any, files: list[Path]) -> Any:
    """What an entry has to say of its sources where they are as it says; None where they changed."""
    if not isinstance(recorded, list):
        return renewed(recorded, files)
    # By an earlier version, which knew of each file where it lay, its size and when it was written.
    try:
        found = [[place_of(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=error.filename) from error
    return recorded if recorded == found else None


def _as_in_version_1(case: Case) -> bool:
    """Whether version 1, which knew one affine in mm and nothing of DICOM's MONOCHROME1, made the same of a case.

    Raises DatasetError: a file that cannot be read.
    """
    for path in case.image_files:
        if path.is_dir():
            return False
        grid = read_grid(path, spacing_scale=case.spacing_scale)
        alike = all(grid_shift(grid.affine, other, grid.shape)[0] < ROUNDING_VOXELS for other in grid.grids)
        if not alike or grid.header is None or grid.header.scale != 1:
            return False
    return True


def up_to_date(job: CaseJob) -> store.StoreEntry | None:
    """Entry of a case that is done already from the same content with the same settings, else None.

    Raises DatasetError: a file is missing. OutputError: the entry cannot be written again for files that were moved.
    """
    root = job.output / "store"
    entry = store.read_entry(root, job.case.id)
    if entry is None or entry.id != job.case.id:
        return None
    made_from = dict(entry.fingerprint)
    recorded = made_from.pop("sources", None)
    if made_from.get("version") == 1 and _as_in_version_1(job.case):
        made_from |= {"spacing_scale": None, "version": CODE_VERSION}
    if made_from != _settings(job):
        return None
    expected = [job.image_path] if job.nifti else []
    if job.case.has_label and (job.nifti or entry.values):
        expected.append(job.label_path)
    if job.sampled and job.modality == "ct" and job.case.has_label:
        expected.append(root / job.case.id / store.INTENSITIES)
    if not all(as_on_disk(path).is_file() for path in expected):
        return None
    sources = _record_now(recorded, _sources(job.case))
    if sources in (None, recorded):
        return None if sources is None else entry
    entry = dataclasses.replace(entry, fingerprint={"sources": sources} | made_from)
    store.rewrite_entry(root, entry)
    return entry


def prepare_case(job: CaseJob) -> store.StoreEntry:
    """Read, check, reorient, resample and write one case; the store entry comes last and marks it as done.

    Raises DatasetError: a file that cannot be read or used. OutputError: one that cannot be written.
    """
    made_from = fingerprint(job)
    image = read_image(job.case, job.channels)
    label, remarks, counts = read_counted_label_map(job.case, image, job.labels, job.hint)
    sample = intensity_sample(image.array if image.array.ndim == 4 else image.array[..., None])
    odd = intensity_remark(sample, job.modality)
    remarks = (*remarks, *([str(odd)] if odd is not None else []))
    image = reorient(image, job.orientation)
    label = None if label is None else reorient(label, job.orientation)
    present: set[int] = set()
    if job.spacing is not None:
        shape = image.shape
        with naming(job.case.image):
            image = resample(image, job.spacing, order="linear")
        coarse = coarse_remark(shape, image.shape)
        remarks = (*remarks, *([coarse] if coarse is not None else []))
        present = _present(job.case, label, counts, image.shape)
        label = None if label is None else resample(label, job.spacing, order="nearest")
    image = Volume(np.ascontiguousarray(image.array, np.float32), image.affine, _in_mm(image))
    label = None if label is None else replace(label, header=image.header)
    # An entry of other settings would vouch for NIfTI files that are no longer its own, if this run ends between them.
    store.remove_entry(job.output / "store", job.case.id)
    try:
        counts = {} if job.labels else counts
        entry = _write(job, image, label, remarks, counts, made_from, sample_percentiles(sample))
        return _with_lost(job, entry, present)
    except OutputError:
        # Without its store entry a file would never be read, and on a full disk it takes the room of others.
        for path in (job.image_path, job.label_path) if job.nifti else ():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        shutil.rmtree(job.output / "store" / job.case.id, ignore_errors=True)
        raise


def _present(case: Case, label: Volume | None, counts: Mapping[int, int], shape: tuple[int, ...]) -> set[int]:
    """Structures in a label map that is to have another shape, as numbered in the dataset.

    Masks were not counted as they were read; here they are where so little is left that some may be lost.
    """
    if counts:
        return {value if case.values is None else case.values.get(value, 0) for value in counts} - {0}
    if label is None or math.prod(shape) * _MAY_LOSE > math.prod(label.shape):
        return set()
    return count_values(label.array).keys() - {0}


def _with_lost(job: CaseJob, entry: store.StoreEntry, present: set[int]) -> store.StoreEntry:
    """The entry with a remark on structures of which no voxel is left. Raises OutputError."""
    lost = sorted(present - entry.foreground_counts.keys())
    if not lost:
        return entry
    names = ", ".join(job.labels.get(value, f"label {value}") for value in lost)
    remark = f"no voxel is left of {names} after resampling to {' x '.join(f'{mm:.3g}' for mm in entry.spacing)} mm"
    entry = dataclasses.replace(entry, remarks=(*entry.remarks, remark))
    store.rewrite_entry(job.output / "store", entry)
    return entry


def _write(
    job: CaseJob,
    image: Volume,
    label: Volume | None,
    remarks: tuple[str, ...],
    counts: Mapping[int, int],
    made_from: dict[str, Any],
    percentiles: tuple[tuple[float, ...], ...],
) -> store.StoreEntry:
    if job.nifti:
        note = write_volume(job.image_path, image, dtype=np.float32, warn=False)
        remarks = remarks if note is None else (*remarks, f"{job.image_path.name}: {note}")
        if label is not None:
            write_volume(job.label_path, label, names=job.labels, warn=False)
    array = image.array if image.array.ndim == 4 else image.array[..., None]
    entry = store.StoreEntry(
        id=job.case.id,
        shape=image.shape,
        channels=array.shape[3],
        spacing=_three(image.spacing),
        affine=tuple(tuple(float(v) for v in row) for row in image.affine),
        modality=job.modality,
        statistics=statistics(array),
        body_box=bounding_box(array > _BODY_ABOVE[job.modality]),
        class_counts=None,
        fingerprint=made_from,
        labelled=job.case.labelled,
        remarks=remarks,
        percentiles=percentiles,
        stored_counts=counts,
    )
    return store.write_case(
        job.output / "store", entry, array, None if label is None else np.ascontiguousarray(label.array)
    )


def _in_mm(image: Volume) -> Header | None:
    """The header with which a case is written: dataset.json and all who read the folder count in mm."""
    return None if image.header is None else image.header.in_mm()


def bounding_box(mask: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First and end (exclusive) voxel of what is true in mask (D, H, W, C); the whole volume where nothing is."""
    start, stop = [], []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(4) if other != axis)))
        start.append(int(inside[0]) if len(inside) else 0)
        stop.append(int(inside[-1]) + 1 if len(inside) else mask.shape[axis])
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def _three(values: np.ndarray) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c
