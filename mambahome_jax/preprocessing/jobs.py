"""The jobs that preprocess has to do: their settings, modality, memory, and the folder that they write to."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets import Dataset
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import reorient, resampled_grid
from mambahome_jax.imaging.plausibility import guessed_modality
from mambahome_jax.imaging.volume import Volume, read_geometry, read_volume
from mambahome_jax.preprocessing.case import CaseJob
from mambahome_jax.support.files import not_written
from mambahome_jax.support.processes import count_workers

_LEFTOVERS = (".*.partial", ".*.partial.*", ".*.old", ".*.probe")
_SAMPLED = 3
# Of the scan before and after resampling together: 9 measured for an int16 CT, more for stored float64.
_BYTES_A_VOXEL = 16


def make_jobs(
    dataset: Dataset,
    output: Path,
    *,
    spacing: tuple[float, float, float] | None,
    orientation: str,
    asked: Modality | None,
    nifti: bool,
    sampled: bool,
    say: Callable[[str], None],
) -> list[CaseJob]:
    """One job a case, in the dataset's order; see `CaseJob`. asked: modality instead of what the dataset says."""
    silent: Modality | None = None
    if asked is not None or any(case.modality is None for case in dataset.cases):
        silent, reason = choose_modality(dataset, asked)
        override = "" if asked else "; --modality ct|mr|us overrides"
        say(f"Modality: {silent}, {reason}{override}")
    else:
        named = sorted({str(case.modality) for case in dataset.cases})
        say(f"Modality: {', '.join(named)}, as the dataset says; --modality ct|mr|us overrides")
    return [
        CaseJob(
            case=case,
            output=output,
            channels=len(dataset.channels),
            labels=dict(dataset.labels),
            spacing=spacing,
            orientation=orientation,
            modality=asked or case.modality or silent or "ct",
            # A label map that is made here, or channels put together, are in no file of the dataset's own.
            nifti=nifti or bool(case.masks or case.images or case.values),
            hint=dataset.hint,
            sampled=sampled,
        )
        for case in dataset.cases
    ]


def choose_modality(dataset: Dataset, asked: Modality | None) -> tuple[Modality, str]:
    """Modality of the cases that do not name their own, and why: asked for, or by the values of a few scans."""
    if asked is not None:
        return asked, "as asked for by --modality"
    extremes: list[tuple[float, float]] = []
    for index in np.random.default_rng(0).permutation(len(dataset.cases)):
        case = dataset.cases[index]
        if case.modality is None and len(extremes) < _SAMPLED:
            try:
                array = read_volume(case.image, spacing_scale=case.spacing_scale, series=case.series).array
                extremes.append((float(array.min()), float(array.max())))
            except DatasetError:
                # Reported when the case's turn comes.
                continue
    values = ", ".join(f"{low:g}" for low, _ in extremes) or "unknown"
    if guessed_modality(extremes) == "ct":
        return "ct", f"guessed from the lowest values of {len(extremes)} scans ({values}): Hounsfield units of air"
    return "mr", f"guessed from the lowest values of {len(extremes)} scans ({values}): no Hounsfield units of air"


def choose_workers(todo: list[CaseJob], asked: int | None, say: Callable[[str], None]) -> int:
    """Processes to use: as many as asked for or cores are there, as far as memory holds that many of the largest."""
    wanted, workers = count_workers(asked, todo, _peak_bytes)
    if workers < wanted:
        say(f"{workers} processes instead of {wanted}: memory for more of the largest scan is not free")
    return workers


def _peak_bytes(job: CaseJob) -> int:
    """Memory that a case takes at its peak, judged by its header; little where it is damaged or its grid refused."""
    try:
        shape, affine = read_geometry(job.case.image, spacing_scale=job.case.spacing_scale, series=job.case.series)
        oriented = reorient(Volume(np.broadcast_to(np.uint8(0), shape), affine), job.orientation)
        new = oriented.shape if job.spacing is None else resampled_grid(oriented.affine, oriented.shape, job.spacing)[1]
    except DatasetError:
        # Reported when the case's turn comes.
        return 1
    return _BYTES_A_VOXEL * job.channels * int(np.prod(oriented.shape, dtype=float) + np.prod(new, dtype=float))


def open_output(output: Path, nifti: bool) -> None:
    """Make the output folders, see that they can be written, and clear what an interrupted run left behind."""
    try:
        for folder in [output / "store", *([output / "images", output / "labels"] if nifti else [])]:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        for folder in (output, output / "store", output / "images", output / "labels"):
            for leftover in (path for pattern in _LEFTOVERS for path in folder.glob(pattern)):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    except OSError as error:
        raise not_written(error.filename or output, error, "--output_path") from error
