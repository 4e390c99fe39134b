"""Scans that are the same but for rounding, scaling or the order of their axes, by some hundred voxels of each."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from mambahome_jax.imaging.geometry import axis_order, orientation_of
from mambahome_jax.imaging.volume import Volume

_POINTS = 8  # along each axis
# Rounding to whole numbers leaves 0.9999 or more. Two phases of one heart have 0.99, two patients less, and two
# synthetic scans that differ in their noise alone 0.9997.
_SAME = 0.9999
_FEWEST_VALUES = 64  # that are not background, or what is alike is the background


def thumbnail_of(image: Volume) -> np.ndarray | None:
    """(512,) float32 of mean 0 and length 1: voxels of the first channel on a coarse grid, axes in the order R, A, S.

    None where the scan is too plain to be known again.
    """
    orientation = orientation_of(image.affine)
    array = image.array if image.array.ndim == 3 else image.array[..., 0]
    points = [np.linspace(0, n - 1, _POINTS).round().astype(int) for n in array.shape]
    points = [p[::-1] if letter in "LPI" else p for p, letter in zip(points, orientation, strict=True)]
    values = array[np.ix_(*points)].transpose(axis_order(orientation)).astype(np.float64).ravel()
    _, counts = np.unique(values, return_counts=True)
    values -= values.mean()
    length = float(np.linalg.norm(values))
    if values.size - counts.max() < _FEWEST_VALUES or not np.isfinite(length) or length == 0:
        return None
    return (values / length).astype(np.float32)


def near_duplicates(thumbnails: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """(case, earlier case) of each scan that has the shape and the looks of an earlier one.

    thumbnails: by case, of `thumbnail_of`. shapes: of each of these cases, axes in the order R, A, S.
    """
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for case in thumbnails:
        groups[tuple(shapes[case])].append(case)
    pairs = []
    for group in groups.values():
        rows = np.array([thumbnails[case] for case in group], np.float64)
        for number in range(1, len(group)):
            alike = rows[:number] @ rows[number]
            nearest = int(alike.argmax())
            if alike[nearest] > _SAME:
                pairs.append((group[number], group[nearest]))
    return pairs
