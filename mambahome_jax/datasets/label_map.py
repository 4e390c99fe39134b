"""The label map of a case as training is to see it: masks merged, values checked and replaced."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mambahome_jax.datasets.base import Case
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import require_same_grid
from mambahome_jax.imaging.plausibility import resembles_image, same_voxels
from mambahome_jax.imaging.volume import Volume, count_values, read_labels, read_volume, replace_values


def read_image(case: Case, channels: int, *, as_stored: bool = False) -> Volume:
    """Image (D0, D1, D2[, C]) float32; the channels stacked where each has its own file.

    as_stored: as `read_volume` takes it; channels of several types become one that holds them all.
    Raises DatasetError: as read_volume; files of different grids.
    """
    if not case.images:
        scale, series = case.spacing_scale, case.series
        return read_volume(case.image, channels=channels, as_stored=as_stored, spacing_scale=scale, series=series)
    if len(case.images) != channels:
        raise DatasetError(f"{len(case.images)} files", file=case.image, expected=f"{channels}, a file a channel")
    first = read_volume(case.image, channels=1, as_stored=as_stored, spacing_scale=case.spacing_scale)
    stack = np.empty((*first.shape, channels), first.array.dtype, order="F")
    stack[..., 0] = first.array
    # Of the first only the grid is needed from here on.
    first = replace(first, array=stack[..., 0])
    for number, path in enumerate(case.images[1:], start=1):
        volume = read_volume(path, channels=1, as_stored=as_stored, spacing_scale=case.spacing_scale)
        require_same_grid(first, volume, path, f"Bring it onto the grid of {case.image.name} first.")
        if not np.can_cast(volume.array.dtype, stack.dtype):
            first = replace(first, array=np.broadcast_to(np.uint8(0), first.shape))
            stack = stack.astype(_holding(stack.dtype, volume.array.dtype), order="F")
        stack[..., number] = volume.array
    return replace(first, array=stack)


def _holding(first: np.dtype, second: np.dtype) -> np.dtype:
    """A type that holds the values of both, float32 at most: what it rounds, the network would see rounded too."""
    both = np.result_type(first, second)
    return np.dtype(np.float32) if both.itemsize > 4 else both


def read_label_map(
    case: Case, image: Volume, labels: Mapping[int, str], hint: str = ""
) -> tuple[Volume, tuple[str, ...]] | tuple[None, tuple[()]]:
    """Label map (D0, D1, D2) uint8, or uint16 beyond 255, on the image's grid, and remarks on what was dealt with.

    None without a label. labels: value -> name after `Case.values`; empty allows every value up to 65535. hint: what to
    do about others. Where masks overlap, the later of `Case.masks` has the voxel, and the remark says how many there
    are.
    Raises DatasetError: as read_labels; another grid than the image's; the image itself, or another image; unknown
    values; a mask that is not binary; a case of which all masks are empty, or the map is, where that means that nobody
    labelled it.
    """
    label, remarks, _ = read_counted_label_map(case, image, labels, hint)
    return (None, ()) if label is None else (label, remarks)


def read_counted_label_map(
    case: Case, image: Volume, labels: Mapping[int, str], hint: str = ""
) -> tuple[Volume | None, tuple[str, ...], dict[int, int]]:
    """As `read_label_map`, and the voxels of each value but 0 that the file stores; none for masks."""
    counts: dict[int, int] = {}
    remarks: tuple[str, ...] = ()
    if case.masks and case.label is None:
        label, remarks = _merge(case, image, labels)
    elif case.label is not None:
        label, counts = _checked(case, case.label, image, labels, hint)
    else:
        return None, (), {}
    # The label takes the image's affine: both are then resampled to exactly one grid.
    return replace(image, array=label), remarks, counts


def _checked(
    case: Case, file: Path, image: Volume, labels: Mapping[int, str], hint: str
) -> tuple[np.ndarray, dict[int, int]]:
    try:
        label = read_labels(file, any_value=case.values is not None, spacing_scale=case.spacing_scale)
    except DatasetError:
        _refuse_own_image(file, image)
        raise
    require_same_grid(image, label, file)
    counts = _counts(label.array)
    if counts and same_voxels(label.array, image.array, len(counts)):
        raise own_image(file)
    known = labels if case.values is None else case.values
    unknown = [value for value in counts if value not in known] if known else []
    if unknown:
        names = labels if case.values is None else {v: labels.get(new, "left out") for v, new in case.values.items()}
        expected = ", ".join(f"{value} {name}" for value, name in sorted(names.items()))
        action = hint or "Correct the label map, the table of labels in dataset.json, or --label_map."
        what = f"unknown label values {_listed(unknown)}"
        raise DatasetError(what, file=file, expected=expected, action=action)
    if not counts and not case.may_be_empty:
        raise _nothing_labelled(file, "the label map is empty")
    if not known and resembles_image(label.array, len(counts)):
        # The image too, where it was shifted, scaled or filtered on the way.
        found = f"{len(counts)} values without a name, which change from voxel to voxel"
        action = "Is this an image? If it is a label map, name its structures by preprocess.py --label_map FILE."
        raise DatasetError(found, file=file, expected="a label map", action=action)
    return label.array if case.values is None else replace_values(label.array, case.values), counts


def _counts(label: np.ndarray) -> dict[int, int]:
    """Voxels of each value but 0, of any integers."""
    if label.dtype.kind == "u":
        counts = count_values(label)
    else:
        counts = {int(value): int(count) for value, count in zip(*np.unique(label, return_counts=True), strict=True)}
    counts.pop(0, None)
    return counts


def _refuse_own_image(file: Path, image: Volume) -> None:
    """Raises DatasetError where a file that cannot be read as a label map is the image: that is the reason to tell."""
    try:
        voxels = read_volume(file, spacing_scale=1).array
    except DatasetError:
        return
    channels = voxels if voxels.ndim == 4 else voxels[..., None]
    if any(same_voxels(channels[..., c], image.array) for c in range(channels.shape[3])):
        raise own_image(file)


def own_image(file: Path) -> DatasetError:
    """The error for a label map that is a copy of its image."""
    action = "Put the label map in its place: was the folder of images copied, or one file named twice?"
    return DatasetError("every voxel is as in its image", file=file, expected="a label map", action=action)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, list(values)[:20]))


def _merge(case: Case, image: Volume, labels: Mapping[int, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    most = max([*(value for value, _ in case.masks), *(case.values or {}).values()])
    merged = np.zeros(image.shape, np.uint8 if most <= 255 else np.uint16, order="F")
    overlaps: dict[tuple[int, int], int] = {}
    empty, unread = True, []
    for stored, file in case.masks:
        value = stored if case.values is None else case.values.get(stored, 0)
        if value == 0:
            unread.append(file)
            continue
        inside = _read_mask(case, file, image)
        before = count_values(merged[inside])
        empty &= not before
        for other, count in before.items():
            if other not in (0, value):
                overlaps[other, value] = overlaps.get((other, value), 0) + count
        merged[inside] = value
    # Structures that were left out still tell whether the case was labelled at all.
    if empty and not case.may_be_empty and not any(_read_mask(case, file, image).any() for file in unread):
        raise _nothing_labelled(case.masks[0][1].parent, f"all {len(case.masks)} masks are empty")
    if not overlaps:
        return merged, ()
    (first, second), largest = max(overlaps.items(), key=lambda item: item[1])
    pair = f"{labels.get(first, first)} and {labels.get(second, second)}"
    total = sum(overlaps.values())
    return merged, (f"{total} voxels lie in two masks (most: {largest} in {pair}); the later in the table has them",)


def _read_mask(case: Case, file: Path, image: Volume) -> np.ndarray:
    try:
        mask = read_labels(file, spacing_scale=case.spacing_scale)
    except DatasetError:
        _refuse_own_image(file, image)
        raise
    require_same_grid(image, mask, file)
    # Counting takes longer than reading, and nearly every mask is of 0 and 1.
    values = sorted(count_values(mask.array).keys() - {0}) if mask.array.max() > 1 else []
    if len(values) > 1 and same_voxels(mask.array, image.array):
        raise own_image(file)
    if len(values) > 1:
        raise DatasetError(f"values {', '.join(map(str, values[:5]))}", file=file, expected="a mask of 0 and 1")
    return mask.array > 0


def _nothing_labelled(file: Path, found: str) -> DatasetError:
    action = "Nobody labelled this case; it is left out, as it would teach that nothing is there."
    return DatasetError(found, file=file, expected="at least one structure", action=action)


# A brush of three voxels, or a click that went astray, in hardly any of the label maps.
_FEW_VOXELS, _FEW_CASES = 27, 0.05


@dataclass(frozen=True)
class StrayValue:
    """A label value with few voxels, in few of many label maps. voxels: of each of these cases."""

    value: int
    voxels: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{count} voxel{'s' * (count != 1)} of {case}" for case, count in self.voxels.items())
        return f"label value {self.value} occurs in {where} alone"


def stray_values(counts: Mapping[str, Mapping[int, int]]) -> list[StrayValue]:
    """Values that a slip may have drawn: at most 27 voxels a case, in one case or up to 5 % of them, not in half.

    counts: case -> voxels of each value but 0 in its label map.
    """
    cases: dict[int, dict[str, int]] = {}
    for case, found in counts.items():
        for value, voxels in found.items():
            cases.setdefault(value, {})[case] = voxels
    most = min(max(1, _FEW_CASES * len(counts)), len(counts) / 2)
    return [
        StrayValue(value, found)
        for value, found in sorted(cases.items())
        if len(found) <= most and max(found.values()) <= _FEW_VOXELS
    ]
