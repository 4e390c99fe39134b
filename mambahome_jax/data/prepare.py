"""One case from the files that the user has to the files that training reads: check, reorient, resample, write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.data import store
from mambahome_jax.datasets.base import Case
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import reorient, resample
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume

# Raise it when the same input would give other files: every case is then done again.
CODE_VERSION = 1

_GRID_TOLERANCE = 0.1
_BODY_ABOVE: dict[Modality, float] = {"ct": -175.0, "mr": 0.0, "us": 0.0}


@dataclass(frozen=True)
class CaseJob:
    """All that a process needs to know to do one case.

    spacing: None keeps each scan's own. labels: the values that may occur, empty for any. nifti: write images/ and
    labels/ too, not only the store.
    """

    case: Case
    output: Path
    channels: int
    labels: Mapping[int, str]
    spacing: tuple[float, float, float] | None
    orientation: str
    modality: Modality
    nifti: bool

    @property
    def image_path(self) -> Path:
        """Where the resampled image goes."""
        return self.output / "images" / f"{self.case.id}.nii.gz"

    @property
    def label_path(self) -> Path:
        """Where the resampled label map goes."""
        return self.output / "labels" / f"{self.case.id}.nii.gz"


def fingerprint(job: CaseJob) -> dict[str, Any]:
    """What the result depends on, in values of JSON: the files' size and time, the settings, this code.

    Raises DatasetError: a file is missing.
    """
    files = [path for path in (job.case.image, job.case.label) if path is not None]
    try:
        sources = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=error.filename) from error
    return {
        "sources": sources,
        "spacing": None if job.spacing is None else [float(mm) for mm in job.spacing],
        "orientation": job.orientation,
        "modality": job.modality,
        "channels": job.channels,
        "labels": {str(value): name for value, name in sorted(job.labels.items())},
        "nifti": job.nifti,
        "version": CODE_VERSION,
    }


def up_to_date(job: CaseJob) -> store.StoreEntry | None:
    """Entry of a case that is done already from the same files with the same settings, else None."""
    entry = store.read_case(job.output / "store", job.case.id)
    if entry is None or dict(entry.fingerprint) != fingerprint(job):
        return None
    expected = [job.image_path] + ([job.label_path] if job.case.label is not None else [])
    return entry if not job.nifti or all(path.is_file() for path in expected) else None


def prepare_case(job: CaseJob) -> store.StoreEntry:
    """Read, check, reorient, resample and write one case; the store entry comes last and marks it as done.

    Raises DatasetError: see `check_case`. OutputError: a file cannot be written.
    """
    made_from = fingerprint(job)
    image, label = read_case(job.case, job.channels, job.labels)
    image = reorient(image, job.orientation)
    label = None if label is None else reorient(label, job.orientation)
    if job.spacing is not None:
        image = resample(image, job.spacing, order="linear")
        label = None if label is None else resample(label, job.spacing, order="nearest")
    image = Volume(np.ascontiguousarray(image.array, np.float32), image.affine)
    # An entry of other settings would vouch for NIfTI files that are no longer its own, if this run ends between them.
    store.remove_entry(job.output / "store", job.case.id)
    if job.nifti:
        write_volume(job.image_path, image, dtype=np.float32)
        if label is not None:
            write_volume(job.label_path, label, dtype=np.uint8)
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
    )
    return store.write_case(
        job.output / "store", entry, array, None if label is None else np.ascontiguousarray(label.array)
    )


def read_case(case: Case, channels: int, labels: Mapping[int, str]) -> tuple[Volume, Volume | None]:
    """Image (D0, D1, D2[, C]) float32 and label map (D0, D1, D2) uint8 of one grid, as they are on disk.

    Raises DatasetError: truncated or damaged file, NaN, another number of channels, an image and a label of different
    grids, label values above 255 or that `labels` (if not empty) does not name.
    """
    image = read_volume(case.image, channels=channels)
    if case.label is None:
        return image, None
    label = read_labels(case.label)
    require_same_grid(image, label, case.label)
    values = store.count_values(label.array)
    unknown = [value for value in values if value != 0 and (value not in labels if labels else value > 255)]
    if unknown:
        known = ", ".join(f"{value} {name}" for value, name in sorted(labels.items())) if labels else "0 to 255"
        action = "Correct the label map, or the table of labels in dataset.json."
        found = "unknown label values " + ", ".join(map(str, unknown[:20]))
        raise DatasetError(found, file=case.label, expected=known, action=action)
    # The label takes the image's affine: both are then resampled to exactly one grid.
    return image, Volume(label.array.astype(np.uint8, copy=False), image.affine)


def require_same_grid(image: Volume, label: Volume, file: Path) -> None:
    """Raises DatasetError where the shapes differ, or a corner voxel lies more than 0.1 of a voxel elsewhere."""
    action = "Bring the label map onto the grid of its image first."
    if image.shape != label.shape:
        found, expected = f"grid of {_by(label.shape)} voxels", f"{_by(image.shape)} as in the image"
        raise DatasetError(found, file=file, expected=expected, action=action)
    shift, largest = grid_shift(image.affine, label.affine, image.shape)
    if shift > _GRID_TOLERANCE:
        found = f"a grid that lies up to {largest:.3g} mm ({shift:.3g} voxels) off the image's"
        raise DatasetError(found, file=file, expected=f"at most {_GRID_TOLERANCE} voxels", action=action)


def grid_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far apart two grids of one shape lie at the corner that differs most: voxels of the first, and mm."""
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)]) * [*(np.array(shape[:3]) - 1), 1]
    shift_mm = (corners @ (other - affine).T)[:, :3]
    shift = np.abs(shift_mm @ np.linalg.inv(affine[:3, :3]).T).max()
    return float(shift), float(np.linalg.norm(shift_mm, axis=1).max())


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


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
