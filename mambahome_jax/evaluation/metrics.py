"""Agreement of two label maps: Dice, Hausdorff distance, average surface distance and normalised surface Dice.

By default definitions are those of MONAI's voxel metrics (DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric,
SurfaceDiceMetric with use_subvoxels=False). The surface of a mask is the mask minus its erosion with the
6-neighbourhood, where everything outside the image counts as background; a distance goes in mm from a surface voxel of
one mask to the nearest surface voxel of the other. Each structure is judged on its own, as a binary mask.

With surface="area" they are those of the package surface-distance, and of MONAI's use_subvoxels=True: the surface is
made of patches between voxels (see `codes_of`), each of which counts by its area in mm2.

prediction and reference are label maps (D, H, W) of integers, or of floats that are whole numbers. `classes` is the
number of foreground classes (labels 1..classes) or a sequence of label values; every result is a float64 array with one
entry a class. `spacing` in mm has one value an axis, or one for all. Every function raises ConfigError where shapes,
labels, spacing, surface or tolerances do not fit.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from mambahome_jax.config import Surface
from mambahome_jax.errors import ConfigError
from mambahome_jax.support.keywords import checked

Classes = int | Sequence[int]
Spacing = float | Sequence[float] | np.ndarray
LARGEST_LABEL = 65535


@checked
def dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing | None = None,
    *,
    ignore_empty: bool = True,
) -> np.ndarray:
    """Compute the Dice overlap 2TP / (P + R) of each class; `spacing` has no influence.

    Where the reference is empty: nan, or with `ignore_empty=False` 1 if the prediction is empty too, else 0.
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
    """Compute the Hausdorff distance of each class in mm; nan where both masks are empty.

    Args:
        prediction, reference, classes, spacing: see the head of this module.
        percentile: of each direction's distances, interpolated linearly; 100 is the maximum. Where one mask is empty,
            the maximum is inf and any other percentile nan.
        directed: from prediction to reference, instead of the larger of both directions.
        surface: "area" weighs by area, without interpolation, and gives inf where any mask is empty.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    return np.array([pair.hausdorff(percentile, directed) for pair in pairs])


@checked
def hd95(
    prediction: np.ndarray, reference: np.ndarray, classes: Classes, spacing: Spacing, *, surface: Surface = "voxels"
) -> np.ndarray:
    """Compute the 95th percentile of the Hausdorff distance in mm; see `hausdorff`."""
    return hausdorff(prediction, reference, classes, spacing, percentile=95, surface=surface)


@checked
def assd(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    *,
    directed: bool = False,
    surface: Surface = "voxels",
) -> np.ndarray:
    """Compute the average symmetric surface distance of each class in mm: mean of both directions together.

    One mask empty: inf; both: nan. `directed`: from prediction to reference only. surface: "area" weighs by area; from
    an empty mask `directed` is then nan.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    return np.array([pair.mean_distance(directed) for pair in pairs])


@checked
def nsd(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing,
    tolerance_mm: float | Sequence[float] = 1.0,
    *,
    surface: Surface = "voxels",
) -> np.ndarray:
    """Compute the normalised surface Dice of each class: share of both surfaces within `tolerance_mm`, inclusive.

    One mask empty: 0; both: nan. tolerance_mm: one, or one a class. surface: share of the voxels, or of the area.
    """
    pairs = compare(prediction, reference, classes, spacing, surface=surface)
    limits = np.asarray(tolerance_mm, np.float64)
    if limits.shape not in ((), (len(pairs),)):
        raise ConfigError(
            f"tolerance_mm has shape {limits.shape}; expected one number, or one for each of {len(pairs)}"
        )
    if not (limits >= 0).all():
        raise ConfigError(f"tolerance_mm is {tolerance_mm}; expected 0 or more")
    limits = np.broadcast_to(limits, len(pairs))
    return np.array([pair.surface_dice(float(limit)) for pair, limit in zip(pairs, limits, strict=True)])


@dataclass(frozen=True)
class Distances:
    """From one surface to the other: `mm` (n,) float64, one entry a surface voxel or patch, in no particular order.

    areas: (n,) mm2 of the patches, None where voxels are counted.
    """

    mm: np.ndarray
    areas: np.ndarray | None = None

    def percentile(self, percentile: float) -> float:
        """Interpolate between voxels; of patches return the first distance up to which lies that share of the area."""
        if self.areas is None:
            return float(np.percentile(self.mm, percentile))
        order = np.lexsort((self.areas, self.mm))
        share = np.cumsum(self.areas[order]) / self.areas.sum()
        return float(self.mm[order][min(int(np.searchsorted(share, percentile / 100)), len(order) - 1)])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of one value an entry, and that of the entries: by area, or in number."""
        if self.areas is None:
            return np.array([float(values.sum()), float(values.size)])
        return np.array([float((values * self.areas).sum()), float(self.areas.sum())])


@dataclass(frozen=True)
class Comparison:
    """One structure in two label maps, in voxels, and the `Distances` from prediction to reference and back.

    distances: None where either mask is empty, or surfaces are left out.
    """

    predicted: int
    reference: int
    overlap: int
    distances: tuple[Distances, Distances] | None = None
    surface: Surface = "voxels"

    def dice(self, ignore_empty: bool = True) -> float:
        if self.reference == 0:
            return np.nan if ignore_empty else float(self.predicted == 0)
        return 2 * self.overlap / (self.predicted + self.reference)

    def hausdorff(self, percentile: float = 100, directed: bool = False) -> float:
        if self.distances is None:
            if self.surface == "area":
                return np.inf
            # As in MONAI: the maximum over an empty surface is inf, but a percentile interpolates inf - inf.
            return np.inf if percentile == 100 and self.predicted + self.reference else np.nan
        return max(one.percentile(percentile) for one in self.distances[: 1 if directed else 2])

    def mean_distance(self, directed: bool = False) -> float:
        if self.distances is None:
            # An empty surface has no distances of its own, says surface-distance; MONAI asks what is in either mask.
            own = self.predicted if directed and self.surface == "area" else self.predicted + self.reference
            return np.inf if own else np.nan
        there, back = self.distances
        if directed:
            return float(np.average(there.mm, weights=there.areas))
        total, size = there.sums(there.mm) + back.sums(back.mm)
        return float(total / size)

    def surface_dice(self, tolerance_mm: float) -> float:
        if self.distances is None:
            return 0.0 if self.predicted + self.reference else np.nan
        there, back = self.distances
        near, size = there.sums(there.mm <= tolerance_mm) + back.sums(back.mm <= tolerance_mm)
        return float(near / size)


def compare(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Classes,
    spacing: Spacing | None = None,
    *,
    distances: bool = True,
    surface: Surface = "voxels",
) -> list[Comparison]:
    """Return each class' `Comparison`, from which all metrics follow; `distances=False` leaves the surfaces out."""
    prediction, reference = _as_labels(prediction, "prediction"), _as_labels(reference, "reference")
    if prediction.shape != reference.shape:
        raise ConfigError(f"prediction has shape {prediction.shape}, reference {reference.shape}; expected the same")
    values = range(1, classes + 1) if isinstance(classes, int | np.integer) else classes
    labels = [int(c) if isinstance(c, int | np.integer) else 0 for c in values]
    if not labels or min(labels) < 1 or max(labels) > LARGEST_LABEL:
        expected = f"a number of foreground classes, or label values from 1 to {LARGEST_LABEL}"
        raise ConfigError(f"classes is {classes!r}; expected {expected}")
    if surface not in get_args(Surface) or (surface == "area" and prediction.ndim != 3):
        expected = f"one of {', '.join(get_args(Surface))}; area of three axes"
        raise ConfigError(f"surface is {surface!r} of {prediction.ndim} axes; expected {expected}")
    steps = np.asarray(1.0 if spacing is None else spacing, np.float64)
    if steps.shape not in ((), (prediction.ndim,)):
        raise ConfigError(f"spacing is {spacing}; expected one number, or one for each of {prediction.ndim} axes")
    steps = np.broadcast_to(steps, prediction.ndim)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ConfigError(f"spacing is {spacing}; expected positive numbers in mm")
    result = []
    for label, *boxes in zip(labels, _boxes(prediction, labels), _boxes(reference, labels), strict=True):
        present = [box for box in boxes if box is not None]
        if not present:
            result.append(Comparison(0, 0, 0, surface=surface))
            continue
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*present, strict=True))
        mask, target = (np.ascontiguousarray(array[box]) == label for array in (prediction, reference))
        sizes = int(mask.sum()), int(target.sum())
        between = _both_ways(mask, target, steps, surface) if distances and 0 not in sizes else None
        result.append(Comparison(*sizes, int((mask & target).sum()), between, surface))
    return result


def _as_labels(array: np.ndarray, name: str) -> np.ndarray:
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


def _boxes(array: np.ndarray, labels: list[int]) -> list[tuple[slice, ...] | None]:
    if array.dtype.itemsize > 4 or array.dtype == np.uint32:
        array = np.where((array > 0) & (array <= LARGEST_LABEL), array, 0).astype(np.int32)
    # nibabel gives arrays in Fortran order, over which a scan in C order is several times slower.
    if array.flags.f_contiguous:
        boxes = [box and box[::-1] for box in ndimage.find_objects(array.T, max_label=max(labels))]
    else:
        boxes = ndimage.find_objects(array, max_label=max(labels))
    return [boxes[label - 1] for label in labels]


def _both_ways(mask: np.ndarray, target: np.ndarray, spacing: np.ndarray, kind: Surface) -> tuple[Distances, Distances]:
    """Measure from the surface of a mask to that of another, and back; neither is empty."""
    if kind == "voxels":
        one, other = _surface(mask), _surface(target)
        return Distances(_distances(one, other, spacing)), Distances(_distances(other, one, spacing))
    codes = codes_of(mask), codes_of(target)
    one, other = ((code > 0) & (code < 255) for code in codes)
    areas, both = areas_of(spacing), one & other

    def weighed(code: np.ndarray, start: np.ndarray, end: np.ndarray) -> Distances:
        # In the order of `_distances`: first those that are in both surfaces.
        return Distances(_distances(start, end, spacing), areas[np.concatenate([code[both], code[start & ~both]])])

    return weighed(codes[0], one, other), weighed(codes[1], other, one)


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
    """Measure from each voxel of `start` to the nearest of `target`: zeros of those in both first, then the others."""
    away = start & ~target
    points, goals = _positions(away), _positions(target)
    # A tree costs about 1.3 us a point, a distance transform 0.15 us and 44 bytes for each voxel of the box. In float64
    # both, as a distance equal to a tolerance counts as within it.
    if 10 * (len(points) + len(goals)) > start.size and start.size < 20_000_000:
        far = ndimage.distance_transform_edt(~target, sampling=spacing)[away]
    else:
        nearest = cKDTree(goals * spacing).query(points * spacing)[1] if len(points) else np.zeros(0, int)
        # From whole voxel offsets, so that a distance equal to a tolerance is not moved past it by rounding.
        far = np.sqrt((((points - goals[nearest]) * spacing) ** 2).sum(axis=1))
    return np.concatenate([np.zeros(np.count_nonzero(start) - len(points)), far])


def _positions(mask: np.ndarray) -> np.ndarray:
    """(n, axes) indices of the voxels that are set; argwhere takes several times as long."""
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), axis=-1)


_Corner = tuple[int, int, int]
_Point = tuple[float, float, float]
_CORNERS: tuple[_Corner, ...] = tuple((i, j, k) for i, j, k in itertools.product((0, 1), repeat=3))


def codes_of(mask: np.ndarray) -> np.ndarray:
    """(D + 1, H + 1, W + 1) uint8: of a mask (D, H, W), which of the 2 x 2 x 2 voxels around each corner are in it.

    Bit n is the n-th of those voxels in the order of their indices; outside of the array nothing is in it.
    """
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(_CORNERS):
        # The voxel at `corner` of the eight around a point is that point's index less 1, plus the corner.
        place = tuple(slice(1 - c, 1 - c + n) for c, n in zip(corner, mask.shape, strict=True))
        codes[place] |= mask.astype(np.uint8) << bit
    return codes


def areas_of(spacing: np.ndarray) -> np.ndarray:
    """(256,) float64, mm2 of the patch of each code at a spacing (3,) in mm; 0 where there is none."""
    # A triangle's area vector is a cross product: its entries scale with the spacing of the other two axes.
    scale = np.prod(spacing) / np.asarray(spacing, np.float64)
    return np.array([np.linalg.norm(vectors * scale, axis=1).sum() for vectors in _vectors()])


@functools.cache
def _vectors() -> tuple[np.ndarray, ...]:
    """Of each code the area vectors of its triangles, (n, 3), in a cube of unit length."""
    found = []
    for code in range(256):
        inside = {corner: bool(code >> bit & 1) for bit, corner in enumerate(_CORNERS)}
        triangles = [_triangles(np.array(loop)) for loop in _loops(inside)]
        found.append(np.concatenate([np.zeros((0, 3)), *triangles]))
    return tuple(found)


def _loops(inside: dict[_Corner, bool]) -> list[list[_Point]]:
    """Closed loops of the middles of edges that the surface crosses."""
    cut_off = sum(inside.values()) <= 4
    beside: dict[_Point, list[_Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = [_on_face(axis, side, *corner) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        middles = [_middle(ring[i], ring[i - 1]) for i in range(4) if inside[ring[i]] != inside[ring[i - 1]]]
        if len(middles) == 2:
            pairs = [(middles[0], middles[1])]
        else:
            ends = [i for i in range(4) if len(middles) == 4 and inside[ring[i]] == cut_off]
            pairs = [(_middle(ring[i], ring[i - 1]), _middle(ring[i], ring[(i + 1) % 4])) for i in ends]
        for one, other in pairs:
            beside.setdefault(one, []).append(other)
            beside.setdefault(other, []).append(one)
    loops = []
    while beside:
        loop = [next(iter(beside))]
        # Each middle lies on two faces, so it has two neighbours; a walk that never turns back ends where it began.
        while following := [point for point in beside.pop(loop[-1]) if point in beside]:
            loop.append(following[0])
        loops.append(loop)
    return loops


def _triangles(loop: np.ndarray) -> np.ndarray:
    """(n - 2, 3) area vectors of the triangles that a loop (n, 3) is cut into."""
    fans = []
    for start in range(len(loop)):
        sides = np.roll(loop, -start, axis=0)[1:] - loop[start]
        fans.append(np.cross(sides[:-1], sides[1:]) / 2)
    return max(fans, key=lambda fan: round(float(np.linalg.norm(fan, axis=1).sum()), 9))


def _on_face(axis: int, side: int, first: int, second: int) -> _Corner:
    corner = [first, second]
    corner.insert(axis, side)
    return corner[0], corner[1], corner[2]


def _middle(one: _Corner, other: _Corner) -> _Point:
    a, b, c = ((x + y) / 2 for x, y in zip(one, other, strict=True))
    return a, b, c
