"""What the scans of a dataset measure: the numbers that a plan is made of. Reads no voxel."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mambahome_jax.datasets.base import Dataset
from mambahome_jax.datasets.prepared import Prepared, usable_cases
from mambahome_jax.datasets.structures import sides
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import read_grid
from mambahome_jax.patches.store import StoreEntry


@dataclass(frozen=True)
class Fingerprint:
    """Measurements of the cases, along the axes that the volumes have after reorientation.

    spacings: (cases, 3) mm, and shapes: (cases, 3) voxels, before resampling where they are known. patients: how many,
    0 for one a case. pairs: structures whose names differ in the side; alone: those of one side without a counterpart.
    classes: background included. resampled: the spacing in mm that the cases have been brought to, None before that.
    details: measured after resampling, for a reader of plan.json.
    """

    spacings: np.ndarray
    shapes: np.ndarray
    pairs: tuple[tuple[str, str], ...] = ()
    alone: tuple[str, ...] = ()
    classes: int = 2
    patients: int = 0
    resampled: tuple[float, ...] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def median_shape(self, spacing: Sequence[float]) -> np.ndarray:
        """Voxels of the median scan once it is resampled, (3,), maybe halves; an axis of 0 mm keeps the scans' own."""
        target = np.where(np.array(spacing) > 0, spacing, self.spacings)
        return np.median(np.round(self.shapes * self.spacings / target), axis=0)

    def to_json(self) -> dict[str, Any]:
        """Return the summary that plan.json holds beside the settings."""
        median = {
            "spacing_mm": np.median(self.spacings, axis=0),
            "shape": np.median(self.shapes, axis=0),
            "extent_mm": np.median(self.spacings * self.shapes, axis=0),
        }
        rounded = {name: [float(f"{value:.6g}") for value in row] for name, row in median.items()}
        return {"cases": len(self.shapes), "median": rounded, "sides": self.pairs, **self.details}


def voxel_size(spacing: Sequence[float], spacings: Sequence[Any] | np.ndarray) -> tuple[float, float, float]:
    """Voxels in mm after resampling to a spacing: along an axis of 0, the median of the cases' own, (cases, 3)."""
    a, b, c = (float(mm if mm > 0 else own) for mm, own in zip(spacing, np.median(spacings, axis=0), strict=True))
    return a, b, c


def measure_labels(labels: Mapping[int, str]) -> dict[str, Any]:
    """Return the fields `pairs`, `alone` and `classes` of a table of structures."""
    pairs, alone = sides(labels, "LR")
    return {
        "pairs": tuple((labels[one], labels[other]) for one, other in pairs),
        "alone": alone,
        "classes": 1 + max(len(labels), 1),
    }


def fingerprint_of_headers(dataset: Dataset, orientation: str) -> Fingerprint | None:
    """Measure the scans by their headers, along axes of that orientation; None where none of them can be read."""
    spacings, shapes = [], []
    for case in dataset.cases:
        # A file that cannot be read is reported when its turn comes.
        with contextlib.suppress(DatasetError, OSError):
            grid = read_grid(case.image, spacing_scale=case.spacing_scale, series=case.series)
            oriented = reorient(grid, orientation)
            spacings.append(oriented.spacing)
            shapes.append(oriented.shape[:3])
    if not shapes:
        return None
    patients = len({case.patient for case in dataset.cases if case.has_label and case.split != "test"})
    measured = np.array(spacings, float), np.array(shapes, float)
    return Fingerprint(*measured, **measure_labels(dataset.labels), patients=patients)


def fingerprint_of_prepared(prepared: Prepared, entries: Sequence[StoreEntry]) -> Fingerprint:
    """Measure a preprocessed dataset by its patch store. entries: one at least."""
    spacings = np.array([entry.spacing for entry in entries], float)
    body = np.array([np.subtract(*entry.body_box[::-1]) for entry in entries], float)
    structures = {}
    for value, name in prepared.labels.items():
        present = [entry for entry in entries if value in entry.foreground_counts]
        ml = [entry.foreground_counts[value] * float(np.prod(entry.spacing)) / 1000 for entry in present]
        structures[name] = {"cases": len(ml), "median_ml": float(f"{np.median(ml):.4g}") if ml else None}
    percentiles = [entry.percentiles for entry in entries if len(entry.percentiles) == len(prepared.channels)]
    return Fingerprint(
        spacings,
        np.array([entry.shape for entry in entries], float),
        **measure_labels(prepared.labels),
        patients=len({case.patient for case in usable_cases(prepared)}),
        resampled=prepared.spacing or (0.0, 0.0, 0.0),
        details={
            "resampled": {
                "shape": np.median([entry.shape for entry in entries], axis=0).tolist(),
                "shape_after_cropping": np.median(body, axis=0).tolist(),
            },
            "intensity_percentiles": np.median(percentiles, axis=0).tolist() if percentiles else None,
            "structures": structures,
        },
    )
