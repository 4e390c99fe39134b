"""One case from the files of the user to those that training reads: check, reorient, resample, write; and its size."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.config import Modality, Resampling
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.label_map import read_image, read_label_map
from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.geometry import coarse_remark, reorient, resample, resampled_grid
from mambahome_jax.imaging.header import ROUNDING_VOXELS, grid_shift
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles, statistics, voxel_digest
from mambahome_jax.imaging.plausibility import intensity_remarks
from mambahome_jax.imaging.volume import Volume, count_values, read_grid, read_labels, replace_values, write_volume
from mambahome_jax.patches import store
from mambahome_jax.patches.store import StoreEntry
from mambahome_jax.support.console import Say, counted
from mambahome_jax.support.files import bytes_of, free_bytes, not_read, place_of, record_of, renewed, said_bytes
from mambahome_jax.support.paths import as_on_disk

# Raise it when the same input would give other files: every case is then done again.
CODE_VERSION = 2

_MAY_LOSE = 8  # voxels that become one where a structure of some voxels may be lost


@dataclass(frozen=True)
class CaseJob:
    """All that a process needs to know to do one case.

    spacing: None keeps the scan's own. labels: the values that may occur, empty for any; hint: what to do about others.
    nifti: write images/ and labels/ too, not only the store. sampled: values of the labelled voxels of a CT are needed.
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
    resampling: Resampling = "linear"

    @property
    def store(self) -> Path:
        """Folder of the patch store."""
        return self.output / "store"

    @property
    def image_path(self) -> Path:
        """Where the resampled image goes."""
        return self.output / "images" / f"{self.case.id}.nii.gz"

    @property
    def label_path(self) -> Path:
        """Where the resampled label map goes."""
        return self.output / "labels" / f"{self.case.id}.nii.gz"

    def written(self, entry: StoreEntry | None) -> tuple[Path, ...]:
        """Files in images/ and labels/ of a case with this entry: a label map that was renumbered is always written."""
        label = self.case.has_label and (self.nifti or bool(entry is not None and entry.values))
        return (self.image_path,) * self.nifti + (self.label_path,) * label

    def settings(self) -> dict[str, Any]:
        """All that the result depends on beside the content of the files, in values of JSON."""
        case = self.case
        return {
            "spacing": None if self.spacing is None else [float(mm) for mm in self.spacing],
            "orientation": self.orientation,
            "modality": self.modality,
            "channels": self.channels,
            "labels": {str(value): name for value, name in sorted(self.labels.items())},
            "masks": [value for value, _ in case.masks],
            "values": None if case.values is None else sorted([old, new] for old, new in case.values.items()),
            "labelled": None if case.labelled is None else list(case.labelled),
            "spacing_scale": case.spacing_scale,
            "nifti": self.nifti,
            "version": CODE_VERSION,
            # Not where an earlier version knew nothing else.
            **({"series": list(case.series)} if case.series else {}),
            **({"resampling": self.resampling} if self.resampling != "linear" else {}),
        }


def prepare_case(job: CaseJob) -> StoreEntry:
    """Read, check, reorient, resample and write one case; its entry comes last. Raises DatasetError, OutputError."""
    case = job.case
    fingerprint = {"sources": record_of(_sources(case))} | job.settings()
    # An entry of other settings would vouch for NIfTI files that are no longer its own, if this run ends between them.
    store.remove_entry(job.store, case.id)
    image = read_image(case, job.channels)
    label, notes, stored_counts = read_label_map(case, image, job.labels, job.hint)
    contents = [voxel_digest(image.array)]
    sample = intensity_sample(image.array if image.array.ndim == 4 else image.array[..., None])
    remarks = [*notes, intensity_remarks(sample).get(job.modality)]
    image = reorient(image, job.orientation)
    label = None if label is None else reorient(label, job.orientation)
    present: set[int] = set()
    if job.spacing is not None:
        shape = image.shape
        with DatasetError.with_file(case.image):
            image = resample(image, job.spacing, job.resampling)
        remarks.append(coarse_remark(shape, image.shape))
        contents.append(voxel_digest(image.array))
        if label is not None:
            present = _present(case, label, stored_counts, image.shape)
            label = resample(label, job.spacing, order="nearest")
    # dataset.json and all who read the folder count in mm.
    header = None if image.header is None else image.header.in_mm()
    image = Volume(np.ascontiguousarray(image.array, np.float32), image.affine, header)
    label = None if label is None else dataclasses.replace(label, header=header)
    array = image.array if image.array.ndim == 4 else image.array[..., None]
    spacing = (float(image.spacing[0]), float(image.spacing[1]), float(image.spacing[2]))
    class_counts = None if label is None else count_values(label.array)
    try:
        if job.nifti:
            note = write_volume(job.image_path, image, dtype=np.float32, warn=False)
            remarks += [f"{job.image_path.name}: {note}"] if note is not None else []
        if job.nifti and label is not None:
            write_volume(job.label_path, label, names=job.labels, warn=False)
        if lost := sorted(present - (class_counts or {}).keys()):
            names = ", ".join(job.labels.get(value, f"label {value}") for value in lost)
            size = " x ".join(f"{mm:.3g}" for mm in spacing)
            remarks.append(f"no voxel is left of {names} after resampling to {size} mm")
        entry = StoreEntry(
            id=case.id,
            shape=image.shape,
            channels=array.shape[3],
            spacing=spacing,
            affine=tuple(tuple(float(v) for v in row) for row in image.affine),
            modality=job.modality,
            statistics=statistics(array),
            body_box=store.body_box(array, job.modality),
            class_counts=class_counts,
            fingerprint=fingerprint,
            labelled=case.labelled,
            remarks=tuple(str(remark) for remark in remarks if remark is not None),
            percentiles=sample_percentiles(sample),
            stored_counts={} if job.labels else stored_counts,
            contents=tuple(dict.fromkeys(contents)),
        )
        return store.write_case(job.store, entry, array, None if label is None else np.ascontiguousarray(label.array))
    except OutputError:
        # Without its store entry a file would never be read, and on a full disk it takes the room of others.
        for path in (job.image_path, job.label_path) if job.nifti else ():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        shutil.rmtree(job.store / case.id, ignore_errors=True)
        raise


def _present(case: Case, label: Volume, counts: Mapping[int, int], shape: tuple[int, ...]) -> set[int]:
    """Find the structures of a label map that is to have another shape; masks only where some may be lost."""
    if counts:
        return {value if case.values is None else case.values.get(value, 0) for value in counts} - {0}
    few = math.prod(shape) * _MAY_LOSE <= math.prod(label.shape)
    return count_values(label.array).keys() - {0} if few else set()


def up_to_date(job: CaseJob) -> StoreEntry | None:
    """Give the entry of a case that is done from the same content and settings. Raises DatasetError, OutputError."""
    entry = store.read_entry(job.store, job.case.id)
    if entry is None or entry.id != job.case.id:
        return None
    fingerprint = dict(entry.fingerprint)
    recorded = fingerprint.pop("sources", None)
    if fingerprint.get("version") == 1 and _as_in_version_1(job.case):
        fingerprint |= {"spacing_scale": None, "version": CODE_VERSION}
    if fingerprint != job.settings():
        return None
    expected = [*job.written(entry)]
    if job.sampled and job.modality == "ct" and job.case.has_label:
        expected.append(job.store / job.case.id / store.INTENSITIES)
    if not all(as_on_disk(path).is_file() for path in expected):
        return None
    sources = _record_now(recorded, _sources(job.case))
    if sources in (None, recorded):
        return None if sources is None else entry
    entry = dataclasses.replace(entry, fingerprint={"sources": sources} | fingerprint)
    store.rewrite_entry(job.store, entry)
    return entry


def _sources(case: Case) -> list[Path]:
    return [part for path in (*case.image_files, *case.label_files) for part in parts(path)]


def _record_now(recorded: Any, files: list[Path]) -> Any:
    """Give what an entry has to say of its sources where they are as it says; None where they changed."""
    if not isinstance(recorded, list):
        return renewed(recorded, files)
    # By an earlier version, which knew of each file where it lay, its size and when it was written.
    try:
        stats = [(path, path.stat()) for path in files]
    except OSError as error:
        raise not_read(error.filename, error) from error
    return recorded if recorded == [[place_of(path), s.st_size, s.st_mtime_ns] for path, s in stats] else None


def _as_in_version_1(case: Case) -> bool:
    """Tell whether version 1, which knew one affine in mm and nothing of DICOM's MONOCHROME1, did the same."""
    for path in case.image_files:
        if path.is_dir():
            return False
        grid = read_grid(path, spacing_scale=case.spacing_scale)
        alike = all(grid_shift(grid.affine, other, grid.shape)[0] < ROUNDING_VOXELS for other in grid.grids)
        if not alike or grid.header is None or grid.header.scale != 1:
            return False
    return True


def new_numbers(entry: StoreEntry, values: Mapping[int, int]) -> dict[int, int]:
    """Map each label value of a case to its number in a dataset; values: number -> stored value."""
    numbers = {stored: number for number, stored in values.items()}
    stored = {value: entry.values.get(value, value) for value in entry.foreground_counts}
    return {value: numbers.get(old, old) for value, old in stored.items()}


def renumber_case(job: CaseJob, values: Mapping[int, int], names: Mapping[int, str]) -> StoreEntry:
    """Write the label maps of a case that is done by the dataset's numbers. Raises DatasetError, OutputError.

    values: number -> stored value, of the whole dataset. names: number -> structure.
    """
    entry = store.read_entry(job.store, job.case.id)
    if entry is None:
        raise DatasetError("no entry in the patch store", case=job.case.id, file=job.store / job.case.id)
    table = new_numbers(entry, values)
    label = replace_values(store.whole_label(job.store, job.case.id), table)
    # Without nifti no file of the dataset holds these numbers.
    volume = read_labels(job.label_path) if job.nifti else Volume(label, np.array(entry.affine))
    differing = {number: values[number] for number in table.values() if values.get(number, number) != number}
    store.remove_entry(job.store, job.case.id)
    job.label_path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(job.label_path, dataclasses.replace(volume, array=label), names=names, warn=False)
    return store.rewrite_label(job.store, dataclasses.replace(entry, values=differing), label, table)


# Memory: of the scan before and after resampling together, 9 were measured for an int16 CT, more for stored float64.
_PEAK = 16
# Bytes on the disk for each voxel and channel, as measured by benchmarks/disk.py: resampled values are fractions, and
# hardly packed. Those that a scan has already differ: 1.2 in the store for whole numbers, 3.3 for scaled ones.
_IMAGE_FILE, _IMAGE_FILE_RESAMPLED = 1.4, 3.3
_STORED, _STORED_RESAMPLED = 2.5, 3.3
_LABEL = 0.03  # of the file, and as much in the store
# The store keeps so many voxels of each structure, 12 bytes each; next to never are more than a twentieth labelled.
_POSITIONS, _POSITION, _LABELLED = 20_000, 12, 20
# Scans without their surroundings, mostly zeros, are packed to a quarter of the estimate: refused is only what would
# need ten times the free space.
_CLEARLY, _CLOSE = 0.1, 1.2


@dataclass(frozen=True)
class Footprint:
    """Bytes that a case takes: memory at its peak, and files that it writes."""

    peak: int
    written: int


def footprint(job: CaseJob) -> Footprint:
    """Judge a case by its header; next to nothing where that is damaged or its grid refused, as it will fail."""
    try:
        read = read_grid(job.case.image, spacing_scale=job.case.spacing_scale, series=job.case.series)
        oriented = reorient(read, job.orientation)
        grid, new = oriented.affine, oriented.shape
        if job.spacing is not None:
            grid, new = resampled_grid(oriented.affine, oriented.shape, job.spacing)
    except DatasetError:
        return Footprint(1, 0)
    before, voxels = (math.prod(map(float, size[:3])) for size in (oriented.shape, new))
    resampled = grid is not oriented.affine
    each = job.channels * (_STORED_RESAMPLED if resampled else _STORED)
    if job.nifti:
        each += job.channels * (_IMAGE_FILE_RESAMPLED if resampled else _IMAGE_FILE)
    written = each * voxels
    if job.case.has_label:
        positions = min(_POSITIONS * max(len(job.labels), 1), voxels / _LABELLED)
        written += _LABEL * voxels * (1 + job.nifti) + _POSITION * positions
    return Footprint(int(_PEAK * job.channels * (before + voxels)), int(written))


def require_disk(output: Path, jobs: Collection[CaseJob], footprints: Mapping[str, Footprint], say: Say) -> None:
    """Say what the cases will take in `output` and what is free there; files that they replace count as free.

    footprints: by case. Raises OutputError: clearly too little is free.
    """
    free = free_bytes(output) if jobs else None
    if free is None:
        return
    replaced = (bytes_of(path) for job in jobs for path in (job.image_path, job.label_path, job.store / job.case.id))
    needed, free = sum(footprints[job.case.id].written for job in jobs), free + sum(replaced)
    nifti = any(job.nifti for job in jobs)
    coarser = ", or choose a coarser --spacing" if nifti else ""
    action = f"Free some space or name another {'--output_path' if nifti else '--output_dir'}{coarser}"
    text = f"{counted(len(jobs), 'case', 'take')} about {said_bytes(needed)}, {said_bytes(free)} are free"
    if _CLEARLY * needed > free:
        raise OutputError(f"{output}: {text}. {action}")
    say(f"Disk: {text} in {output}")
    if _CLOSE * needed > free:
        say(f"Note: the disk may get full, as sizes are estimates. {action}")
