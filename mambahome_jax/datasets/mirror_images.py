"""Whether two structures of a left and a right side are mirror images of each other, by their label maps or names.

A left kidney in a mirrored scan is a right kidney. A left ventricle is not a right one: it is known by its form.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambahome_jax.datasets.files import listed
from mambahome_jax.datasets.mirror import words_of

# Structures told apart by form although their names differ in the side alone: chambers of the heart, lobes, the vessels
# and parts of organs that branch or lie unlike.
_BY_FORM = re.compile(
    r"\b(ventric|atri(um|a|al)\b|auric|appendage|myocard|heart|lob(e|es|ar|us)\b|bronch|flexure|hemiliver|liver|hepatic|"
    r"colon\b|colic|coronary|pulmonary|portal|gastric|gastroepiploic|brachiocephalic|innominate|subclavian|"
    r"common carotid|(renal|gonadal|testicular|ovarian|adrenal|suprarenal) (vein|vena)|recurrent|(hemi)?diaphragm)"
)
# Alike on both sides all the same: ventricles and lobes of the brain, lobes of these glands.
_ALIKE = re.compile(
    r"lateral ventric|ventric.* lateral|\b(frontal|pariet|tempor|occipit|insul|cerebr|cerebel|brain|thyroid|prostat)"
)

FEWEST_CASES = 3
FEWEST_VOXELS = 30
_MEASURES = ("volume", "extent", "extent", "extent", "tilt", "tilt", "tilt", "compactness")
# Differences below these are none, in logarithms (tilt: correlation of two axes): lungs differ by 10 to 15 % in volume.
# The right and the left ventricle of ACDC, without their names, differ by 0.47 in one extent and 0.34 in compactness.
_TOLERANCE = np.array([0.2, 0.15, 0.15, 0.15, 0.2, 0.2, 0.2, 0.15])
# Where the names say that the form tells the two apart, the label maps have to show the contrary without doubt.
_STRICT_TOLERANCE = np.array([0.05, 0.05, 0.05, 0.05, 0.1, 0.1, 0.1, 0.05])


@dataclass(frozen=True)
class Shape:
    """Volume in mm^3 and covariance (3, 3) in mm^2 of the voxels of a structure, along the axes of the array."""

    volume: float
    covariance: np.ndarray


def shape_of(positions: np.ndarray, voxels: int, spacing: Sequence[float]) -> Shape:
    """Shape from positions (n, 3) of voxels, all or an even sample of them; voxels: of all; spacing (3,) mm."""
    size = np.asarray(spacing, float)
    covariance = np.cov(positions * size, rowvar=False) + np.diag(size**2 / 12)
    return Shape(voxels * float(size.prod()), covariance)


def told_by_form(name: str) -> bool:
    """Whether a name with a side, as "left ventricle", is of a structure that is known by its form."""
    words = " ".join(words_of(name))
    return _BY_FORM.search(words) is not None and _ALIKE.search(words) is None


def differences(one: Shape, other: Shape, axis: int) -> np.ndarray:
    """(8,) of `_MEASURES`: `one`, mirrored along an axis of the array, minus `other`."""
    return _measures(one, axis) - _measures(other, None)


def swap_reason(names: tuple[str, str], shapes: Sequence[tuple[Shape, Shape]], axis: int) -> tuple[bool, str]:
    """Whether the labels of two structures trade places in a mirrored volume, and why.

    Args:
        names: of the two structures, which differ in the side.
        shapes: of both in each case that has both.
        axis: of the array, along which volumes are mirrored.

    Fewer than FEWEST_CASES cases say nothing; the names decide then. Else the label maps do: volume, extents, tilt and
    compactness of one, mirrored, are those of the other within the spread of the cases.
    """
    by_form = any(map(told_by_form, names))
    if len(shapes) < FEWEST_CASES:
        return not by_form, f"by their names, as {len(shapes)} cases have both"
    found = np.array([differences(one, other, axis) for one, other in shapes])
    middle = np.median(found, axis=0)
    limit = _STRICT_TOLERANCE if by_form else np.maximum(_TOLERANCE, found.std(axis=0, ddof=1))
    excess = np.abs(middle) / limit
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return True, f"mirror images of each other in {len(shapes)} cases"
    share = f"{abs(math.expm1(middle[worst])):.0%}" if worst not in (4, 5, 6) else f"{abs(middle[worst]):.2f}"
    return False, f"not mirror images in {len(shapes)} cases: {_MEASURES[worst]} differs by {share}"


def choose_swaps(
    labels: Mapping[int, str],
    pairs: Sequence[tuple[int, int]],
    shapes: Mapping[tuple[int, int], Sequence[tuple[Shape, Shape]]],
    axis: int,
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """The pairs whose labels trade places in a mirrored volume; a line that names them, and one on each other pair.

    labels: value -> name. pairs: of values whose names differ in the side. shapes: of each pair, of both structures in
    every case that has both. axis: of the array.
    """
    swapped: dict[tuple[int, int], str] = {}
    lines = []
    for pair in pairs:
        names = (labels[pair[0]], labels[pair[1]])
        swap, reason = swap_reason(names, shapes.get(pair, ()), axis)
        said = f"{names[0]} and {names[1]}"
        if swap:
            swapped[pair] = f"{said} ({reason})"
        else:
            kept = "keep their labels, as form and not side tells them apart"
            lines.append(f"In mirrored scans {said} {kept} ({reason})")
    if swapped:
        lines.insert(0, f"In mirrored scans labels trade places: {listed(swapped.values())}")
    return tuple(swapped), tuple(lines)


def _measures(shape: Shape, mirrored: int | None) -> np.ndarray:
    deviations = np.sqrt(np.diag(shape.covariance))
    correlations = shape.covariance / np.outer(deviations, deviations)
    if mirrored is not None:
        correlations[mirrored] *= -1
        correlations[:, mirrored] *= -1
    # Of an ellipsoid of these moments; a crescent fills less of it, and a cube 0.9.
    ellipsoid = 4 / 3 * math.pi * 5**1.5 * math.sqrt(max(np.linalg.det(shape.covariance), 1e-12))
    tilts = (correlations[0, 1], correlations[0, 2], correlations[1, 2])
    return np.array([math.log(shape.volume), *np.log(deviations), *tilts, math.log(shape.volume / ellipsoid)])
