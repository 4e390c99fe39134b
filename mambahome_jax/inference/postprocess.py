"""What is made of a prediction: chosen structures, the largest part of each, volumes, a file of probabilities."""

import json
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from mambahome_jax.datasets.structures import structure_key
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.volume import Volume, count_values, replace_values, require_volume
from mambahome_jax.support.files import atomic_write
from mambahome_jax.support.keywords import checked

ALL, NONE = "all", "none"
ENTRIES = ("probabilities", "affine", "labels")  # of a file of probabilities
# Voxels belong together where they share a face, an edge or a corner.
_NEIGHBOURS = np.ones((3, 3, 3), bool)


def values_named(
    wanted: str | Sequence[str], names: Mapping[int, str], classes: int | None = None, flag: str = "labels"
) -> tuple[int, ...]:
    """Find the label values of structures, in ascending order.

    wanted: names as preprocess.py compares them (Left kidney is kidney_left), or label values in digits. names: value
    -> name; without any, label_1, label_2 and so on. Raises ConfigError naming `flag`: no such structure.
    """
    words = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    known = dict(names) or {value: f"label_{value}" for value in range(1, classes or 0)}
    by_key = {structure_key(name): value for value, name in known.items()}
    found = set()
    for word in words:
        value = by_key.get(structure_key(str(word)))
        if value is None and str(word).isdecimal() and (not known or int(word) in known) and int(word) > 0:
            value = int(word)
        if value is None:
            there = ", ".join(known.values()) or "label values, as the model has no names"
            raise ConfigError(f"--{flag} {word}: the model has no such structure; expected some of {there}")
        found.add(value)
    return tuple(sorted(found))


def postprocess(
    result: Volume,
    only: Collection[int] | None = None,
    largest: Collection[int] | None = (),
    regions: Mapping[int, Collection[int]] | None = None,
) -> Volume:
    """Do to a label map what was asked for; `result` itself where that is nothing.

    only: label values to keep, None all. largest: those to keep the largest connected part of; None: all that are left.
    regions: see `keep_largest`.
    """
    array = result.array
    if only is not None:
        array = keep_labels(array, only)
    if largest is None or largest:
        array = keep_largest(array, largest, regions)
    return result if array is result.array else replace(result, array=array)


def keep_labels(labels: np.ndarray, values: Collection[int]) -> np.ndarray:
    """Make every other value 0; same type."""
    return replace_values(labels, {value: value for value in values}).astype(labels.dtype, copy=False)


def keep_largest(
    labels: np.ndarray, values: Collection[int] | None = None, regions: Mapping[int, Collection[int]] | None = None
) -> np.ndarray:
    """Keep the largest connected part of each structure, None for all; of equal ones the first in the array's order.

    regions: the label values in each structure that holds more than its own, in the order in which they are written.
    What a region loses stays in those around it: it has the last of them as its value.
    """
    kept, regions = labels.copy(), regions or {}
    for value in regions:
        if values is None or value in values:
            parts = {*regions[value]}
            lost = _all_but_largest(np.isin(kept, [*parts]))
            for part, place in {part: lost & (kept == part) for part in parts}.items():
                around = [other for other in regions if part in regions[other] and not {*regions[other]} <= parts]
                kept[place] = around[-1] if around else 0
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None and value not in regions and (values is None or value in values):
            kept[box][_all_but_largest(labels[box] == value)] = 0
    return kept


def _all_but_largest(structure: np.ndarray) -> np.ndarray:
    """Which voxels of a mask are in none but its smaller connected parts."""
    parts, count = ndimage.label(structure, _NEIGHBOURS)
    if count < 2:
        return np.zeros_like(structure)
    sizes = count_values(parts)
    return structure & (parts != max(range(1, count + 1), key=lambda part: sizes[part]))


@checked
def volumes_ml(
    labels: Volume, names: Mapping[int, str], regions: Mapping[int, Collection[int]] | None = None
) -> dict[str, float]:
    """Millilitres of each structure: of every one in `names` (value -> name), and of other values that occur.

    regions: the label values in a structure that holds more than its own.
    Raises DatasetError: no Volume, values that are not those of a label map.
    """
    require_volume("labels", labels)
    if labels.array.dtype.kind not in "bu":
        action = "Read label maps with read_labels."
        raise DatasetError(f"labels are {labels.array.dtype}", expected="unsigned integers", action=action)
    counts = {value: count for value, count in count_values(labels.array).items() if value}
    voxel_ml = float(abs(np.linalg.det(labels.affine[:3, :3]))) / 1000
    held = {value: tuple((regions or {}).get(value, (value,))) for value in sorted({*names, *counts})}
    return {
        names.get(value, f"label_{value}"): round(sum(counts.get(part, 0) for part in parts) * voxel_ml, 4)
        for value, parts in held.items()
    }


def write_probabilities(path: Path, values: np.ndarray, affine: np.ndarray, names: Mapping[int, str]) -> None:
    """Write an .npz of `probabilities` (D, H, W, classes) and `affine` (4, 4), voxel to RAS mm, whole or not at all.

    names: of the classes; `labels` in the file is the JSON text {"0": "background", "1": name, ...}.
    Raises OutputError: it cannot be written.
    """
    known = {0: "background"} | dict(names)
    text = np.array(json.dumps({str(c): known.get(c, f"label_{c}") for c in range(values.shape[-1])}))
    # Level 1, as most of it is ones and zeros.
    with (
        atomic_write(path, "folder") as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name, array in zip(ENTRIES, (values, affine, text), strict=True):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def whole_probabilities(path: Path) -> bool:
    """Whether a file that `write_probabilities` made is there and every byte of it as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in ENTRIES} <= set(archive.namelist()) and archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError):
        return False
