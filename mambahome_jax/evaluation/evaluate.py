"""Label maps against references, case by case, and what comes of all cases together."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.config import Surface
from mambahome_jax.errors import DatasetError
from mambahome_jax.evaluation.metrics import compare
from mambahome_jax.evaluation.scores import METRICS, Score
from mambahome_jax.imaging.geometry import SCORE_VOXELS, require_same_grid
from mambahome_jax.imaging.plausibility import resembles_image
from mambahome_jax.imaging.volume import Volume, read_grid, read_labels, replace_values
from mambahome_jax.support.files import csv_name, write_csv, write_json

COLUMNS = ("case", "structure", *METRICS, "volume_ml", "reference_volume_ml", "volume_difference_ml")
DEFINITIONS = {
    "mean": "mean over structures of each structure's mean over cases; nan and inf are left out",
    "dice": "2TP / (P + R); nan where the reference is empty",
    "hd95": "mm; larger of both directions' 95th percentiles of surface distance; nan where one mask is empty",
    "assd": "mm; mean of both directions' surface distances together; inf where one mask is empty, nan where both are",
    "volume_difference_ml": "prediction minus reference",
    "nsd": "share of surface voxels within the tolerance; 0 where one mask is empty, nan where both are",
}
# What is else with surface="area".
DEFINITIONS_BY_AREA = {
    "hd95": "mm; larger of both directions' distances that 95 % of the area is within; inf where a mask is empty",
    "assd": "mm; mean of both directions' distances by area; inf where one mask is empty, nan where both are",
    "nsd": "share of the surfaces' area within the tolerance; 0 where one mask is empty, nan where both are",
}


@dataclass(frozen=True)
class Pair:
    """A label map to judge and its reference, both files; names: label value -> structure, judged in any case.

    surface: what distances are taken of, see `metrics`.
    reference_values: what to replace the reference's values by (others become background), None for nothing.
    labelled: values that the reference labels wherever they occur, None for all; the others are not judged.
    spacing_scale: as `read_volume` takes it, for both files.
    """

    case: str
    prediction: Path
    reference: Path
    names: Mapping[int, str]
    tolerance_mm: float = 1.0
    surface: Surface = "voxels"
    reference_values: Mapping[int, int] | None = None
    labelled: tuple[int, ...] | None = None
    spacing_scale: float | None = None


def evaluate_case(pair: Pair) -> list[Score]:
    """Every structure that is named, or found in either label map.

    Raises DatasetError: a file cannot be read, is no label map (an image too), or the two are not on the same grid.
    """
    prediction, reference = read_pair(pair)
    ours, theirs = _values(prediction), _values(reference)
    for volume, values, file in ((prediction, ours, pair.prediction), (reference, theirs, pair.reference)):
        unnamed = {*values} - {0, *pair.names}
        if unnamed and resembles_image(volume.array, len(unnamed)):
            found = f"{len(unnamed)} values without a name, which change from voxel to voxel"
            action = "Is this an image? If it is a label map, name its structures by --labels FILE."
            raise DatasetError(found, file=file, expected="a label map", action=action)
    labels = sorted({*pair.names, *ours, *theirs} - {0})
    labels = [label for label in labels if pair.labelled is None or label in pair.labelled]
    if not labels:
        return []
    voxel_ml = abs(float(np.linalg.det(reference.affine[:3, :3]))) / 1000
    comparisons = compare(prediction.array, reference.array, labels, reference.spacing, surface=pair.surface)
    return [
        Score(
            case=pair.case,
            label=label,
            structure=pair.names.get(label, f"label_{label}"),
            dice=found.dice(),
            hd95=found.hausdorff(95),
            assd=found.mean_distance(),
            nsd=found.surface_dice(pair.tolerance_mm),
            volume_ml=found.predicted * voxel_ml,
            reference_volume_ml=found.reference * voxel_ml,
        )
        for label, found in zip(labels, comparisons, strict=True)
    ]


def read_pair(pair: Pair) -> tuple[Volume, Volume]:
    """Prediction and reference, (D0, D1, D2) label values of the prediction's table, on the same grid.

    Raises DatasetError: a file cannot be read, is no label map, or the two are not on the same grid.
    """
    ours, truth = (read_grid(file, spacing_scale=pair.spacing_scale) for file in (pair.prediction, pair.reference))
    action = f"Bring it to the grid of {pair.reference} first."
    require_same_grid(truth, ours, pair.prediction, action, voxels=SCORE_VOXELS, name="reference")
    prediction, reference = (
        read_labels(file, spacing_scale=pair.spacing_scale) for file in (pair.prediction, pair.reference)
    )
    if pair.reference_values is not None:
        reference = replace(reference, array=replace_values(reference.array, pair.reference_values))
    return prediction, reference


def summarise(scores: Iterable[Score]) -> dict[str, Any]:
    """{"mean": {metric: value}, "structures": {name: {metric: value, "cases": counts}}}.

    A structure's value is its mean over cases, the mean that over structures; nan and inf are left out, and where
    nothing is left the value is nan. counts: cases with the structure in "both" label maps, "missed" (reference only),
    "invented" (prediction only) and "absent" (neither).
    """
    rows = list(scores)
    structures: dict[str, Any] = {}
    for _, name in sorted({(row.label, row.structure) for row in rows}):
        own = [row for row in rows if row.structure == name]
        entry: dict[str, Any] = {metric: _finite_mean([getattr(row, metric) for row in own]) for metric in METRICS}
        for volume in ("volume_ml", "reference_volume_ml", "volume_difference_ml"):
            entry[volume] = _finite_mean([getattr(row, volume) for row in own])
        present = [(row.volume_ml > 0, row.reference_volume_ml > 0) for row in own]
        entry["cases"] = {
            "both": present.count((True, True)),
            "missed": present.count((False, True)),
            "invented": present.count((True, False)),
            "absent": len({row.case for row in rows}) - len(present) + present.count((False, False)),
        }
        structures[name] = entry
    mean = {metric: _finite_mean([entry[metric] for entry in structures.values()]) for metric in METRICS}
    return {"mean": mean, "structures": structures}


def write_metrics(path: Path, scores: Iterable[Score]) -> None:
    """Write metrics.csv (COLUMNS; undefined values as nan and inf), whole or not at all. Raises OutputError.

    Names are as `csv_name` makes them.
    """
    rows = [
        (csv_name(row.case), csv_name(row.structure), *(f"{getattr(row, name):.6g}" for name in COLUMNS[2:]))
        for row in scores
    ]
    write_csv(path, COLUMNS, rows, "--output_dir", parents=True)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, whole or not at all; JSON has no nan or inf, they become null. Raises OutputError."""
    write_json(path, summary, "--output_dir", parents=True)


def _values(volume: Volume) -> list[int]:
    present = np.zeros(int(volume.array.max()) + 1, bool)
    present[volume.array] = True
    return [int(value) for value in np.flatnonzero(present)]


def _finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
