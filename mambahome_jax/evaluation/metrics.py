"""Agreement of two label maps: Dice, Hausdorff distance, average surface distance and normalised surface Dice.

By default definitions are those of MONAI's voxel metrics (DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric,
SurfaceDiceMetric with use_subvoxels=False). The surface of a mask is the mask minus its erosion with the
6-neighbourhood, where everything outside the image counts as background; a distance goes in mm from a surface voxel of
one mask to the nearest surface voxel of the other. Each structure is judged on its own, as a binary mask.

With surface="area" they are those of the package surface-distance, and of MONAI's use_subvoxels=True: the surface is
made of patches between voxels (surface_area.py), each of which counts by its area in mm2.

`classes` is the number of foreground classes (labels 1..classes) or a sequence of label values; every result is a
float64 array with one entry a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from mambahome_jax.config import Surface
from mambahome_jax.errors import ConfigError
from mambahome_jax.evaluation.surface_area import areas_of, codes_of

Classes = int | Sequence[int]
Spacing = float | Sequence[float] | np.ndarray
LARGEST_LABEL = 65535


@dataclass(frozen=True)
class Comparison:
    """One structure in two label maps.

    `prediction_to_reference` (n,) and `reference_to_prediction` (m,) are float64 surface distances in mm, one entry a
    surface voxel or patch, in no particular order; None where either mask is empty. `prediction_areas` (n,) and
    `reference_areas` (m,) are the areas of these patches in mm2, None where voxels are counted.
    """

    predicted: int
    reference: int
    overlap: int
    prediction_to_reference: np.ndarray | None = None
    reference_to_prediction: np.ndarray | None = None
    prediction_areas: np.ndarray | None = None
    reference_areas: np.ndarray | None = None
    surface: Surface = "voxels"

    def dice(self, ignore_empty: bool = True) -> float:
        if self.reference == 0:
            return np.nan if ignore_empty else float(self.predicted == 0)
        return 2 * self.overlap / (self.predicted + self.reference)

    def hausdorff(self, percentile: float = 100, directed: bool = False) -> float:
        if self.prediction_to_reference is None or self.reference_to_prediction is None:
            if self.surface == "area":
                return np.inf
            # As in MONAI: the maximum over an empty surface is inf, but a percentile interpolates inf - inf.
            return np.inf if percentile == 100 and self.predicted + self.reference else np.nan
        there = _percentile(self.prediction_to_reference, self.prediction_areas, percentile)
        if directed:
            return there
        return max(there, _percentile(self.reference_to_prediction, self.reference_areas, percentile))

    def mean_distance(self, directed: bool = False) -> float:
        if self.prediction_to_reference is None or self.reference_to_prediction is None:
            # An empty surface has no distances of its own, says surface-distance; MONAI asks what is in either mask.
            own = self.predicted if directed and self.surface == "area" else self.predicted + self.reference
            return np.inf if own else np.nan
        there, back = self.prediction_to_reference, self.reference_to_prediction
        if directed:
            return float(np.average(there, weights=self.prediction_areas))
        sums = _weighed(there, self.prediction_areas), _weighed(back, self.reference_areas)
        return sum(far for far, _ in sums) / sum(whole for _, whole in sums)

    def surface_dice(self, tolerance_mm: float) -> float:
        if self.prediction_to_reference is None or self.reference_to_prediction is None:
            return 0.0 if self.predicted + self.reference else np.nan
        there, back = self.prediction_to_reference, self.reference_to_prediction
        sums = (
            _weighed(there <= tolerance_mm, self.prediction_areas),
            _weighed(back <= tolerance_mm, self.reference_areas),
        )
        return sum(near for near, _ in sums) / sum(whole for _, whole in sums)


def dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing | None = None,
    *,
    ignore_empty: bool = True,
) -> np.ndarray:
    """Dice overlap 2TP / (P + R) of each class; `spacing` has no influence.

    prediction, reference: integer (D, H, W). Where the reference is empty: nan, or with `ignore_empty=False` 1 if the
    prediction is empty too, else 0. Raises ConfigError where shapes, labels or spacing do not fit.
    """
    pairs = compare(prediction, reference, classes, spacing, distances=False)
    return np.array([pair.dice(ignore_empty) for pair in pairs])


def hausdorff(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    *,
    percentile: float = 100,
    directed: bool = False,
    surface: Surface = "voxels",
) -> np.ndarray:
    """Hausdorff distance of each class in mm: larger of both directions, or `directed` from prediction to reference.

    prediction, reference: integer (D, H, W); spacing: (3,) mm. `percentile` (linear interpolation) of each direction's
    distances; 100 is the maximum. Both masks empty: nan. One empty: inf for the maximum, nan for a percentile.
    surface: "area" weighs by area, without interpolation, and gives inf where any mask is empty.
    Raises ConfigError where shapes, labels or spacing do not fit.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    return np.array([pair.hausdorff(percentile, directed) for pair in pairs])


def hd95(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    *,
    surface: Surface = "voxels",
) -> np.ndarray:
    """95th percentile of the Hausdorff distance in mm; see `hausdorff`."""
    return hausdorff(prediction, reference, classes, spacing, percentile=95, surface=surface)


def assd(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    *,
    directed: bool = False,
    surface: Surface = "voxels",
) -> np.ndarray:
    """Average symmetric surface distance of each class in mm: mean of both directions' distances, concatenated.

    prediction, reference: integer (D, H, W); spacing: (3,) mm. `directed`: from prediction to reference only. One mask
    empty: inf; both: nan. surface: "area" weighs by area; from an empty mask `directed` is then nan.
    Raises ConfigError where shapes, labels or spacing do not fit.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    return np.array([pair.mean_distance(directed) for pair in pairs])


def nsd(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    tolerance_mm: float | Sequence[float] = 1.0,
    *,
    surface: Surface = "voxels",
) -> np.ndarray:
    """Normalised surface Dice of each class: share of all surface voxels within `tolerance_mm` (one, or one a class).

    prediction, reference: integer (D, H, W); spacing: (3,) mm; tolerance inclusive. One mask empty: 0; both: nan.
    surface: "area" takes the share of the area instead of that of the voxels.
    Raises ConfigError where shapes, labels, spacing or tolerances do not fit.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    tolerances = np.asarray(tolerance_mm, np.float64)
    if tolerances.ndim > 1 or (tolerances.ndim == 1 and len(tolerances) != len(pairs)):
        raise ConfigError(
            f"tolerance_mm has shape {tolerances.shape}; expected one number, or one for each of {len(pairs)}"
        )
    if not (tolerances >= 0).all():
        raise ConfigError(f"tolerance_mm is {tolerance_mm}; expected 0 or more")
    tolerances = np.broadcast_to(tolerances, len(pairs))
    return np.array([pair.surface_dice(float(limit)) for pair, limit in zip(pairs, tolerances, strict=True)])


def compare(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing | None = None,
    *,
    distances: bool = True,
    surface: Surface = "voxels",
) -> list[Comparison]:
    """Each class' `Comparison`, from which all metrics follow; `distances=False` leaves the surfaces out.

    prediction, reference: integer (D, H, W), also float with whole numbers; spacing: (3,) mm, one number for all axes,
    None for 1. surface: what is counted, see the head of this module.
    Raises ConfigError where shapes, labels or spacing do not fit, and for areas of other than three axes.
    """
    prediction, reference = as_labels(prediction, "prediction"), as_labels(reference, "reference")
    if prediction.shape != reference.shape:
        raise ConfigError(f"prediction has shape {prediction.shape}, reference {reference.shape}; expected the same")
    labels = _label_values(classes)
    if surface not in get_args(Surface) or (surface == "area" and prediction.ndim != 3):
        expected = f"one of {', '.join(get_args(Surface))}; area of three axes"
        raise ConfigError(f"surface is {surface!r} of {prediction.ndim} axes; expected {expected}")
    steps = np.asarray(1.0 if spacing is None else spacing, np.float64)
    if steps.shape not in ((), (prediction.ndim,)):
        raise ConfigError(f"spacing is {spacing}; expected one number, or one for each of {prediction.ndim} axes")
    steps = np.broadcast_to(steps, prediction.ndim)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ConfigError(f"spacing is {spacing}; expected positive numbers in mm")
    predicted_boxes, reference_boxes = _boxes(prediction, labels), _boxes(reference, labels)
    result = []
    for label, *boxes in zip(labels, predicted_boxes, reference_boxes, strict=True):
        found = [box for box in boxes if box is not None]
        if not found:
            result.append(Comparison(0, 0, 0, surface=surface))
            continue
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found, strict=True))
        mask, target = (np.ascontiguousarray(array[box]) == label for array in (prediction, reference))
        result.append(_compare_masks(mask, target, steps, distances, surface))
    return result


def as_labels(array: np.ndarray, name: str = "label map") -> np.ndarray:
    """A label map as integers. Raises ConfigError where it is not one: fractions, NaN, no axes."""
    array = np.asarray(array)
    if array.ndim == 0:
        raise ConfigError(f"{name} is a single number; expected an array (D, H, W)")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer):
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"{name} has dtype {array.dtype}; expected integers")
    whole = np.rint(array)
    if not np.array_equal(whole, array) or (np.abs(whole) > LARGEST_LABEL).any():
        raise ConfigError(f"{name} holds fractions, NaN or values above {LARGEST_LABEL}; expected whole label values")
    return whole.astype(np.int32)


def _label_values(classes: Classes) -> list[int]:
    labels = list(range(1, classes + 1)) if isinstance(classes, int | np.integer) else [int(c) for c in classes]
    if not labels or min(labels) < 1 or max(labels) > LARGEST_LABEL:
        expected = f"a number of foreground classes, or label values from 1 to {LARGEST_LABEL}"
        raise ConfigError(f"classes is {classes!r}; expected {expected}")
    return labels


def _boxes(array: np.ndarray, labels: list[int]) -> list[tuple[slice, ...] | None]:
    if array.dtype.itemsize > 4 or array.dtype == np.uint32:
        array = np.where((array > 0) & (array <= LARGEST_LABEL), array, 0).astype(np.int32)
    # nibabel gives arrays in Fortran order, over which a scan in C order is several times slower.
    if array.flags.f_contiguous:
        found = [box and box[::-1] for box in ndimage.find_objects(array.T, max_label=max(labels))]
    else:
        found = ndimage.find_objects(array, max_label=max(labels))
    return [found[label - 1] for label in labels]


def _compare_masks(
    predicted: np.ndarray, reference: np.ndarray, spacing: np.ndarray, distances: bool, kind: Surface
) -> Comparison:
    sizes, overlap = (int(predicted.sum()), int(reference.sum())), int((predicted & reference).sum())
    if not distances or 0 in sizes:
        return Comparison(*sizes, overlap, surface=kind)
    if kind == "voxels":
        surface, target = _surface(predicted), _surface(reference)
        return Comparison(*sizes, overlap, _distances(surface, target, spacing), _distances(target, surface, spacing))
    codes, other = codes_of(predicted), codes_of(reference)
    surface, target = ((found > 0) & (found < 255) for found in (codes, other))
    there, back = _distances(surface, target, spacing), _distances(target, surface, spacing)
    areas, both = areas_of(spacing), surface & target
    # In the order of `_distances`: first those that are in both surfaces.
    mine = areas[np.concatenate([codes[both], codes[surface & ~both]])]
    theirs = areas[np.concatenate([other[both], other[target & ~both]])]
    return Comparison(*sizes, overlap, there, back, mine, theirs, surface=kind)


def _percentile(distances: np.ndarray, areas: np.ndarray | None, percentile: float) -> float:
    """Of distances, interpolated; of those of patches the first up to which lies that share of the area."""
    if areas is None:
        return float(np.percentile(distances, percentile))
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order][min(int(np.searchsorted(share, percentile / 100)), len(order) - 1)])


def _weighed(values: np.ndarray, areas: np.ndarray | None) -> tuple[float, float]:
    """Sum of values by area, and of areas; of what has none, sum and number."""
    if areas is None:
        return float(values.sum()), float(values.size)
    return float((values * areas).sum()), float(areas.sum())


def _surface(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    for axis in range(mask.ndim):
        before, after = (np.moveaxis(a, axis, 0) for a in (inner, mask))
        before[1:] &= after[:-1]
        before[:-1] &= after[1:]
        before[0] = False
        before[-1] = False
    return mask & ~inner


def _distances(start: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    away = start & ~target
    here = np.count_nonzero(start) - np.count_nonzero(away)
    points, goals = _positions(away), _positions(target)
    # A tree costs about 1.3 us a point, a distance transform 0.15 us and 44 bytes for each voxel of the box.
    if 10 * (len(points) + len(goals)) > start.size and start.size < 20_000_000:
        far = ndimage.distance_transform_edt(~target, sampling=spacing)[away]
    else:
        nearest = cKDTree(goals * spacing).query(points * spacing)[1] if len(points) else np.zeros(0, int)
        # From whole voxel offsets, so that a distance equal to a tolerance is not moved past it by rounding.
        far = np.sqrt((((points - goals[nearest]) * spacing) ** 2).sum(axis=1))
    return np.concatenate([np.zeros(here), far])


def _positions(mask: np.ndarray) -> np.ndarray:
    """(n, axes) indices of the voxels that are set; argwhere takes several times as long."""
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), axis=-1)
