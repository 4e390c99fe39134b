"""The voxels of cases: image and label map as training is to see them, strays of a brush, scans under two names."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mambahome_jax.datasets.base import Case
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import axis_order, on_grid_of, orientation_of
from mambahome_jax.imaging.plausibility import resembles_image, same_voxels
from mambahome_jax.imaging.volume import Volume, count_values, read_labels, read_volume, replace_values
from mambahome_jax.support.console import counted

# A brush of three voxels, or a click that went astray, in hardly any of the label maps.
_FEW_VOXELS, _FEW_CASES = 27, 0.05
_POINTS = 8  # of a thumbnail along each axis
# Rounding to whole numbers leaves 0.9999 or more. Two phases of one heart have 0.99, two patients less, and two
# synthetic scans that differ in their noise alone 0.9997.
_SAME = 0.9999
_FEWEST_VALUES = 64  # that are not background, or what is alike is the background


def read_image(case: Case, channels: int, *, as_stored: bool = False) -> Volume:
    """Read the image (D0, D1, D2[, C]) float32; the channels stacked where each has its own file.

    as_stored: see `read_volume`; channels of several types become one that holds them all.
    Raises DatasetError: as read_volume; files of different grids.
    """
    scale = case.spacing_scale
    if not case.images:
        return read_volume(case.image, channels=channels, as_stored=as_stored, spacing_scale=scale, series=case.series)
    if len(case.images) != channels:
        raise DatasetError(f"{len(case.images)} files", file=case.image, expected=f"{channels}, a file a channel")
    first = read_volume(case.image, channels=1, as_stored=as_stored, spacing_scale=scale)
    stack = np.empty((*first.shape, channels), first.array.dtype, order="F")
    stack[..., 0] = first.array
    # Of the first only the grid is needed from here on.
    first = replace(first, array=np.broadcast_to(np.uint8(0), first.shape))
    for number, path in enumerate(case.images[1:], start=1):
        volume = read_volume(path, channels=1, as_stored=as_stored, spacing_scale=scale)
        volume = on_grid_of(first, volume, path, f"Bring it onto the grid of {case.image.name} first.")
        if not np.can_cast(volume.array.dtype, stack.dtype):
            both = np.result_type(stack.dtype, volume.array.dtype)
            # What float32 rounds, the network would see rounded too.
            stack = stack.astype(np.float32 if both.itemsize > 4 else both, order="F")
        stack[..., number] = volume.array
    return replace(first, array=stack)


def read_label_map(
    case: Case, image: Volume, labels: Mapping[int, str], hint: str = ""
) -> tuple[Volume | None, tuple[str, ...], dict[int, int]]:
    """Read the label map on the image's grid, None without one; remarks; and the voxels of each stored value but 0.

    It is (D0, D1, D2) uint8, or uint16 beyond 255. labels: value -> name after `Case.values`; empty allows every value.
    hint: what to do about others. Masks have no stored values; of two that overlap the later in `Case.masks` wins.
    Raises DatasetError: as read_labels; another grid than the image's; the image itself, or another image; unknown
    values; a mask that is not binary; no structure where that means that nobody labelled the case.
    """
    counts: dict[int, int] = {}
    remarks: tuple[str, ...] = ()
    if case.label is not None:
        label, counts = _checked(case, case.label, image, labels, hint)
    elif case.masks:
        label, remarks = _merged(case, image, labels)
    else:
        return None, (), {}
    # The label takes the image's affine: both are then resampled to exactly one grid.
    return replace(image, array=label), remarks, counts


def own_image(file: Path) -> DatasetError:
    """The error for a label map that is a copy of its image."""
    action = "Put the label map in its place: was the folder of images copied, or one file named twice?"
    return DatasetError("every voxel is as in its image", file=file, expected="a label map", action=action)


def _nothing_labelled(file: Path, problem: str) -> DatasetError:
    action = "Nobody labelled this case; it is left out, as it would teach that nothing is there."
    return DatasetError(problem, file=file, expected="at least one structure", action=action)


def _read_labels(file: Path, case: Case, image: Volume, *, any_value: bool = False) -> np.ndarray:
    """Read labels on the image's grid. Raises DatasetError: where they are the image, that is the reason to tell."""
    try:
        label = read_labels(file, any_value=any_value, spacing_scale=case.spacing_scale)
    except DatasetError as error:
        raise (own_image(file) if _holds_image(file, image) else error) from error.__cause__
    return on_grid_of(image, label, file).array


def _holds_image(file: Path, image: Volume) -> bool:
    """Whether a file that cannot be read as a label map has the voxels of the image in a channel."""
    try:
        voxels = read_volume(file, spacing_scale=1).array
    except DatasetError:
        return False
    channels = voxels if voxels.ndim == 4 else voxels[..., None]
    return any(same_voxels(channels[..., c], image.array) for c in range(channels.shape[3]))


def _checked(
    case: Case, file: Path, image: Volume, labels: Mapping[int, str], hint: str
) -> tuple[np.ndarray, dict[int, int]]:
    """The label map of a file with its values replaced, and the voxels of each stored value but 0."""
    label = _read_labels(file, case, image, any_value=case.values is not None)
    if label.dtype.kind == "u":
        counts = count_values(label)
    else:
        counts = {int(value): int(count) for value, count in zip(*np.unique(label, return_counts=True), strict=True)}
    counts.pop(0, None)
    if counts and same_voxels(label, image.array, len(counts)):
        raise own_image(file)
    known = labels if case.values is None else case.values
    unknown = [value for value in counts if value not in known] if known else []
    if unknown:
        names = labels if case.values is None else {v: labels.get(new, "left out") for v, new in case.values.items()}
        expected = ", ".join(f"{value} {name}" for value, name in sorted(names.items()))
        action = hint or "Correct the label map, the table of labels in dataset.json, or --label_map."
        problem = f"unknown label values {', '.join(map(str, unknown[:20]))}"
        raise DatasetError(problem, file=file, expected=expected, action=action)
    if not counts and not case.may_be_empty:
        raise _nothing_labelled(file, "the label map is empty")
    if not known and resembles_image(label, len(counts)):
        # The image too, where it was shifted, scaled or filtered on the way.
        problem = f"{len(counts)} values without a name, which change from voxel to voxel"
        action = "Is this an image? If it is a label map, name its structures by preprocess.py --label_map FILE."
        raise DatasetError(problem, file=file, expected="a label map", action=action)
    return label if case.values is None else replace_values(label, case.values), counts


def _merged(case: Case, image: Volume, labels: Mapping[int, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The masks of a case laid over each other, and a remark where they overlap."""
    most = max([*(value for value, _ in case.masks), *(case.values or {}).values()])
    merged = np.zeros(image.shape, np.uint8 if most <= 255 else np.uint16, order="F")
    overlaps: dict[tuple[int, int], int] = defaultdict(int)
    empty, unread = True, []
    for stored, file in case.masks:
        value = stored if case.values is None else case.values.get(stored, 0)
        if value == 0:
            unread.append(file)
            continue
        inside = _read_mask(case, file, image)
        before = count_values(merged[inside])
        empty &= not before
        for other in before.keys() - {0, value}:
            overlaps[other, value] += before[other]
        merged[inside] = value
    # Structures that were left out still tell whether the case was labelled at all.
    if empty and not case.may_be_empty and not any(_read_mask(case, file, image).any() for file in unread):
        raise _nothing_labelled(case.masks[0][1].parent, f"all {len(case.masks)} masks are empty")
    if not overlaps:
        return merged, ()
    pair, largest = max(overlaps.items(), key=lambda item: item[1])
    names = " and ".join(str(labels.get(value, value)) for value in pair)
    total = sum(overlaps.values())
    return merged, (
        f"{counted(total, 'voxel', 'lie')} in two masks (most: {largest} in {names}); the later in the table has them",
    )


def _read_mask(case: Case, file: Path, image: Volume) -> np.ndarray:
    mask = _read_labels(file, case, image)
    # Counting takes longer than reading, and nearly every mask is of 0 and 1.
    values = sorted(count_values(mask).keys() - {0}) if mask.max() > 1 else []
    if len(values) > 1:
        if same_voxels(mask, image.array):
            raise own_image(file)
        raise DatasetError(f"values {', '.join(map(str, values[:5]))}", file=file, expected="a mask of 0 and 1")
    return mask > 0


@dataclass(frozen=True)
class StrayValue:
    """A label value with few voxels, in few of many label maps. voxels: of each of these cases."""

    value: int
    voxels: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{counted(count, 'voxel')} of {case}" for case, count in self.voxels.items())
        return f"label value {self.value} occurs in {where} alone"


def stray_values(counts: Mapping[str, Mapping[int, int]]) -> list[StrayValue]:
    """Values that a slip may have drawn: at most 27 voxels a case, in one case or up to 5 % of them, not in half.

    counts: case -> voxels of each value but 0 in its label map.
    """
    cases: dict[int, dict[str, int]] = defaultdict(dict)
    for case, voxels_of in counts.items():
        for value, voxels in voxels_of.items():
            cases[value][case] = voxels
    most = min(max(1, _FEW_CASES * len(counts)), len(counts) / 2)
    strays = (StrayValue(value, voxels) for value, voxels in sorted(cases.items()) if len(voxels) <= most)
    return [stray for stray in strays if max(stray.voxels.values()) <= _FEW_VOXELS]


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
    """(case, earlier case) of scans that are the same but for rounding, scaling or the order of their axes.

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
