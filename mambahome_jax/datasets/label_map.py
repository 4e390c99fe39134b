"""The label map of a case as training is to see it: masks merged, values checked and replaced."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mambahome_jax.datasets.base import Case
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.grids import require_same_grid
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume

_SLAB = 1 << 20


def read_image(case: Case, channels: int, *, as_stored: bool = False) -> Volume:
    """Image (D0, D1, D2[, C]) float32; the channels stacked where each has its own file.

    as_stored: as `read_volume` takes it; channels of several types become one that holds them all.
    Raises DatasetError: as read_volume; files of different grids.
    """
    if not case.images:
        return read_volume(case.image, channels=channels, as_stored=as_stored)
    if len(case.images) != channels:
        raise DatasetError(f"{len(case.images)} files", file=case.image, expected=f"{channels}, a file a channel")
    first = read_volume(case.image, channels=1, as_stored=as_stored)
    stack = np.empty((*first.shape, channels), first.array.dtype, order="F")
    stack[..., 0] = first.array
    # Of the first only the grid is needed from here on.
    first = Volume(stack[..., 0], first.affine)
    for number, path in enumerate(case.images[1:], start=1):
        volume = read_volume(path, channels=1, as_stored=as_stored)
        require_same_grid(first, volume, path, f"Bring it onto the grid of {case.image.name} first.")
        if not np.can_cast(volume.array.dtype, stack.dtype):
            first = Volume(np.broadcast_to(np.uint8(0), first.shape), first.affine)
            stack = stack.astype(_holding(stack.dtype, volume.array.dtype), order="F")
        stack[..., number] = volume.array
    return Volume(stack, first.affine)


def _holding(first: np.dtype, second: np.dtype) -> np.dtype:
    """A type that holds the values of both, float32 at most: what it rounds, the network would see rounded too."""
    both = np.result_type(first, second)
    return np.dtype(np.float32) if both.itemsize > 4 else both


def read_label_map(
    case: Case, image: Volume, labels: Mapping[int, str], hint: str = ""
) -> tuple[Volume, tuple[str, ...]] | tuple[None, tuple[()]]:
    """Label map (D0, D1, D2) uint8 on the image's grid, and remarks on what was dealt with; None without a label.

    labels: value -> name after `Case.values`; empty allows every value up to 255. hint: what to do about others.
    Where masks overlap, the later of `Case.masks` has the voxel, and the remark says how many there are.
    Raises DatasetError: as read_labels; another grid than the image's; unknown values; a mask that is not binary; a
    case of which all masks are empty, or the map is, where that means that nobody labelled it.
    """
    if case.masks and case.label is None:
        label, remarks = _merge(case, image, labels)
    elif case.label is not None:
        label, remarks = _checked(case, case.label, image, labels, hint), ()
    else:
        return None, ()
    # The label takes the image's affine: both are then resampled to exactly one grid.
    return Volume(label, image.affine), remarks


def count_values(label: np.ndarray) -> dict[int, int]:
    """Voxels of each value that occurs in a label map of uint8 or uint16, by value."""
    flat = label.ravel(order="K")
    counts = np.zeros(1, np.int64)
    # bincount widens what it is given to int64: eight times a label map, were it not for the slabs.
    for start in range(0, flat.size, _SLAB):
        found = np.bincount(flat[start : start + _SLAB], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _checked(case: Case, file: Path, image: Volume, labels: Mapping[int, str], hint: str) -> np.ndarray:
    label = read_labels(file)
    require_same_grid(image, label, file)
    found = sorted(count_values(label.array).keys() - {0})
    known = labels if case.values is None else case.values
    unknown = [value for value in found if (value not in known if known else value > 255)]
    if unknown:
        names = labels if case.values is None else {v: labels.get(new, "left out") for v, new in case.values.items()}
        expected = ", ".join(f"{value} {name}" for value, name in sorted(names.items())) if known else "0 to 255"
        action = hint or "Correct the label map, or the table of labels in dataset.json."
        what = "unknown label values " + ", ".join(map(str, unknown[:20]))
        raise DatasetError(what, file=file, expected=expected, action=action)
    if not found and not case.may_be_empty:
        raise _nothing_labelled(file, "the label map is empty")
    if case.values is None:
        return label.array.astype(np.uint8, copy=False)
    table = np.zeros(max([*case.values, 0]) + 1, np.uint8)
    for stored, value in case.values.items():
        table[stored] = value
    return table[label.array]


def _merge(case: Case, image: Volume, labels: Mapping[int, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    merged = np.zeros(image.shape, np.uint8, order="F")
    overlaps: dict[tuple[int, int], int] = {}
    empty, unread = True, []
    for stored, file in case.masks:
        value = stored if case.values is None else case.values.get(stored, 0)
        if value == 0:
            unread.append(file)
            continue
        inside = _read_mask(file, image)
        before = count_values(merged[inside])
        empty &= not before
        for other, count in before.items():
            if other not in (0, value):
                overlaps[other, value] = overlaps.get((other, value), 0) + count
        merged[inside] = value
    # Structures that were left out still tell whether the case was labelled at all.
    if empty and not case.may_be_empty and not any(_read_mask(file, image).any() for file in unread):
        raise _nothing_labelled(case.masks[0][1].parent, f"all {len(case.masks)} masks are empty")
    if not overlaps:
        return merged, ()
    (first, second), most = max(overlaps.items(), key=lambda item: item[1])
    pair = f"{labels.get(first, first)} and {labels.get(second, second)}"
    total = sum(overlaps.values())
    return merged, (f"{total} voxels lie in two masks (most: {most} in {pair}); the later in the table has them",)


def _read_mask(file: Path, image: Volume) -> np.ndarray:
    mask = read_labels(file)
    require_same_grid(image, mask, file)
    # Counting takes longer than reading, and nearly every mask is of 0 and 1.
    values = sorted(count_values(mask.array).keys() - {0}) if mask.array.max() > 1 else []
    if len(values) > 1:
        raise DatasetError(f"values {', '.join(map(str, values[:5]))}", file=file, expected="a mask of 0 and 1")
    return mask.array > 0


def _nothing_labelled(file: Path, found: str) -> DatasetError:
    action = "Nobody labelled this case; it is left out, as it would teach that nothing is there."
    return DatasetError(found, file=file, expected="at least one structure", action=action)
