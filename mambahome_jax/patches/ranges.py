"""The ranges of the scans of a training, which its checkpoint carries, from the entries of the patch store."""

from collections.abc import Mapping, Sequence

import numpy as np

from mambahome_jax.config import Modality, ScanRanges, StructureRange
from mambahome_jax.imaging.plausibility import extent_mm
from mambahome_jax.patches.store import StoreEntry


def training_ranges(
    entries: Sequence[StoreEntry], structures: Mapping[int, str], modality: Modality | None = None
) -> tuple[ScanRanges, ...]:
    """Measure the cases that are trained on, one entry a modality; modality: instead of each case's own."""
    groups: dict[Modality, list[StoreEntry]] = {}
    for entry in entries:
        groups.setdefault(modality or entry.modality, []).append(entry)
    return tuple(
        ScanRanges(
            modality=name,
            cases=len(group),
            extent_mm=_ranges(np.array([extent_mm(entry.shape, np.array(entry.affine)) for entry in group])),
            percentiles=_percentiles(group),
            structures=tuple(_structure(group, value, title) for value, title in structures.items()),
        )
        for name, group in sorted(groups.items())
    )


def _percentiles(entries: Sequence[StoreEntry]) -> tuple[tuple[tuple[float, float], ...], ...]:
    percentiles = [entry.percentiles for entry in entries]
    # A store of an earlier version has none, and the ranges of some cases are not those of all.
    return tuple(map(_ranges, np.array(percentiles).transpose(1, 0, 2))) if all(percentiles) else ()


def _structure(entries: Sequence[StoreEntry], value: int, name: str) -> StructureRange:
    labelled = [
        entry
        for entry in entries
        if entry.class_counts is not None and (entry.labelled is None or value in entry.labelled)
    ]
    present = [entry for entry in labelled if value in entry.foreground_counts]
    volumes = [
        entry.foreground_counts[value] * abs(float(np.linalg.det(np.array(entry.affine)[:3, :3]))) / 1000
        for entry in present
    ]
    least, most = (min(volumes), max(volumes)) if volumes else (0.0, 0.0)
    return StructureRange(name, len(labelled), len(present), _short(least), _short(most))


def _ranges(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(least, largest) of each column of (cases, n)."""
    return tuple((_short(low), _short(high)) for low, high in zip(values.min(axis=0), values.max(axis=0), strict=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
