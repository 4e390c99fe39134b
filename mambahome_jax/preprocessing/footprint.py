"""What a case takes, judged by its header: memory at its peak, and room on the disk."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.geometry import reorient, resampled_grid
from mambahome_jax.imaging.volume import read_grid
from mambahome_jax.preprocessing.case import CaseJob
from mambahome_jax.support.console import Say
from mambahome_jax.support.files import bytes_of, free_bytes, said_bytes

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
    text = f"{len(jobs)} cases take about {said_bytes(needed)}, {said_bytes(free)} are free"
    if _CLEARLY * needed > free:
        raise OutputError(f"{output}: {text}. {action}")
    say(f"Disk: {text} in {output}")
    if _CLOSE * needed > free:
        say(f"Note: the disk may get full, as sizes are estimates. {action}")
