"""Structures by their names, values and sides: which are one organ, chosen, merged, or traded places by a mirror."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from mambahome_jax.config import AnatomicalAxis
from mambahome_jax.datasets.base import Case, Dataset, numbered
from mambahome_jax.datasets.files import listed
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.support.console import counted
from mambahome_jax.support.paths import one_form

# Spellings of one organ, after sides and separators were made alike. Only what is the same region: "intestine" may hold
# more than "small_bowel", and "prostate_uterus" is another structure than "prostate".
_SYNONYMS = {
    "gall_bladder": "gallbladder",
    "postcava": "inferior_vena_cava",
    "ivc": "inferior_vena_cava",
    "bladder": "urinary_bladder",
    "arota": "aorta",
    "oesophagus": "esophagus",
    "suprarenal_gland": "adrenal_gland",
    "pancreatic_parenchyma": "pancreas_parenchyma",
}
# Layouts in which anybody's data may lie: a patient "01" of one folder is not that of another. Two folders of one
# published dataset are parts or versions of it, and a patient may have scans in both.
_ANYBODYS = frozenset({"prepared", "nnunet_raw", "decathlon", "csv", "images_labels", "published", ""})
_NAME_THEM = 'Name them in a dataset.json in its folder: {"labels": {"1": "liver"}}.'
_SIDES = {"left": "left", "l": "left", "right": "right", "r": "right"}
_MOST_LISTED = 20

AXES: tuple[str, ...] = get_args(AnatomicalAxis)
_OPPOSITES = {"LR": {"left": "right", "l": "r", "lt": "rt", "lh": "rh"}, "AP": {}, "IS": {}}
# Anterior and posterior tell two structures apart by their place here; elsewhere (hippocampus) by their form too.
_LEAFLET_OPPOSITES = {"anterior": "posterior"}

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


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\W_]+", name.lower()) if word)


def words_of(name: str) -> tuple[str, ...]:
    """The words of a structure's name in lower case: ("kidney", "left") of kidney_left, Kidney-Left and KidneyLeft."""
    return _words(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))


def structure_key(name: str) -> str:
    """One spelling of a structure's name: "Left kidney", kidney_l and left-kidney are all kidney_left.

    Equal keys mean the same organ on the same side.
    """
    words = _words(one_form(name))
    stem = "_".join(word for word in words if word not in _SIDES)
    return "_".join([_SYNONYMS.get(stem, stem), *(_SIDES[word] for word in words if word in _SIDES)])


# Numbers of structures, 1, 2, 3, ..., beside the values that label maps store, such as 255 of a mask.


def numbering(values: Iterable[int]) -> dict[int, int]:
    """Number -> stored value of structures, in the order of the stored `values`; empty where all keep their value."""
    stored = sorted({*values} - {0})
    return {} if stored == list(range(1, len(stored) + 1)) else dict(enumerate(stored, start=1))


def table_of_values(table: object, file: Path, labels: Iterable[int] = ()) -> dict[int, int]:
    """The entry "values" of a dataset.json, {"1": 255}, as number -> stored value; empty without one.

    labels: numbers that it must have. Raises DatasetError: another form, or one that lacks such a number.
    """
    expected = ""
    values: dict[int, int] = {}
    try:
        entries = {} if table is None else table.items()  # type: ignore[attr-defined]
        values = {int(number): int(stored) for number, stored in dict(entries).items()}
    except (AttributeError, TypeError, ValueError):
        expected = '"values": {"1": 255, ...}, a stored value from 1 to 65535 for each label'
    if len({*values.values()}) < len(values) or not all(0 < stored < 1 << 16 for stored in values.values()):
        expected = "distinct values from 1 to 65535"
    elif values and not {*labels} <= {*values}:
        expected = 'a stored value for each of "labels"'
    if expected:
        raise DatasetError(f'"values" is {table!r}', file=file, expected=expected)
    return values


def describe_numbering(values: Mapping[int, int]) -> str:
    """One line about number -> stored value."""
    more = f" and so on, {len(values)} in all" if len(values) > _MOST_LISTED else ""
    numbers, stored = (", ".join(map(str, list(part)[:_MOST_LISTED])) for part in (values.keys(), values.values()))
    if len(values) == 1:
        return f"stored label value {stored} is structure {numbers}; infer writes {stored}"
    return f"stored label values {stored}{more} are structures {numbers}{more}; infer writes the stored values"


def match_structures(
    theirs: Mapping[int, str],
    ours: Mapping[int, str],
    their_values: Mapping[int, int] | None = None,
    our_values: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Value of one table -> value of another for each structure that is in both, by `structure_key` of their names.

    theirs, ours: value -> name. their_values, our_values: value -> stored value where the two differ; where one of two
    structures is only called by its stored value, label_255, the stored value tells.
    """
    keys = {structure_key(name): value for value, name in ours.items()}
    matched = {value: keys[structure_key(name)] for value, name in theirs.items() if structure_key(name) in keys}
    rest = {(our_values or {}).get(value, value): value for value in ours if value not in matched.values()}
    for value, name in theirs.items():
        stored = (their_values or {}).get(value, value)
        if value not in matched and stored in rest and f"label_{stored}" in (name, ours[rest[stored]]):
            matched[value] = rest[stored]
    return {value: matched[value] for value in theirs if value in matched}


# Datasets with other structures.


def consecutive(dataset: Dataset) -> Dataset:
    """The dataset with its label values made 1, 2, 3, ... in their order; itself where they are that, or not named."""
    if not dataset.labels or list(dataset.labels) == list(range(1, len(dataset.labels) + 1)):
        return dataset
    values = {old: new for new, old in enumerate(dataset.labels, start=1)}
    relabelled = _relabel(dataset, values, numbered(*dataset.labels.values()))
    if any(case.masks or case.values is not None for case in dataset.cases):
        # The files of these hold other values than the table.
        return relabelled
    return replace(relabelled, values={new: dataset.values.get(old, old) for old, new in values.items()})


def select_structures(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The dataset with the structures of these names only, as 1, 2, 3, ... in this order; the others are background.

    Names are compared by `structure_key`. Raises DatasetError: a name that the dataset does not have, or no names.
    """
    chosen = [_value_of(name, dataset) for name in names]
    return merge_structures(dataset, {dataset.labels[value]: [value] for value in chosen})


def merge_structures(dataset: Dataset, table: Mapping[str, Sequence[int | str]]) -> Dataset:
    """The dataset with new structures 1, 2, 3, ..., each made of values or names of the old; the rest is background.

    A new structure counts as labelled in a case where any of its parts does. Labels without names need to be told what
    is background, by a structure of that name. Raises DatasetError: a part that is absent, or in two structures.
    """
    names = [name for name in table if name != "background"]
    values = dict.fromkeys(dataset.labels, 0)
    for name, parts in table.items():
        new = names.index(name) + 1 if name in names else 0
        for part in parts:
            value = _value_of(part, dataset)
            if values.get(value, 0) not in (0, new):
                problem = f"{dataset.labels.get(value, value)} is in {name} and in another structure"
                raise DatasetError(problem, file="label map", expected="each part in one structure")
            values[value] = new
    return _relabel(dataset, values, numbered(*names))


def read_structure_table(file: Path) -> dict[str, list[int | str]]:
    """Read the TOML of --label_map, such as `pancreas = [4, 5]` or `kidneys = ["kidney_left", "kidney_right"]`.

    Raises DatasetError: no such file, not TOML, an entry of another form, no entry.
    """
    expected = "lines such as: pancreas = [4, 5]"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=file, expected=expected) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot be read ({error})", file=file, expected=expected) from error
    table = {name: parts if isinstance(parts, list) else [parts] for name, parts in content.items()}
    for name, parts in table.items():
        if not parts or not all(isinstance(part, int | str) and not isinstance(part, bool) for part in parts):
            raise DatasetError(f"{name} = {parts!r}", file=file, expected=expected)
    if not table:
        raise DatasetError("no structure", file=file, expected=expected)
    return table


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Several datasets as one, with one label table: structures of one `structure_key` are one label.

    Ids and patients get the name of their dataset in front; patients of several folders of one published dataset that
    of its layout, so that they stay together. A case that only one such folder lacks a file for is not skipped. Every
    case says which of the joint values its dataset labels, so that the loss can leave others out.
    Raises DatasetError: another number of channels, a dataset whose labels have no names.
    """
    first = datasets[0]
    for dataset in datasets:
        if not dataset.labels:
            raise DatasetError("labels without names cannot be joined", file=dataset.name, action=_NAME_THEM)
        if len(dataset.channels) != len(first.channels):
            expected = f"{counted(len(first.channels), 'channel')} as in {first.name}"
            raise DatasetError(counted(len(dataset.channels), "channel"), file=dataset.name, expected=expected)
    labels = numbered(*dict.fromkeys(structure_key(name) for dataset in datasets for name in dataset.labels.values()))
    value_of = {key: value for value, key in labels.items()}
    names = _distinct_names(datasets)
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    for dataset, prefix in zip(datasets, names, strict=True):
        parts = [other for other in datasets if other.layout == dataset.layout not in _ANYBODYS]
        elsewhere = {case.id for part in parts if part is not dataset for case in part.cases}
        skipped += [(f"{prefix}_{case}", reason) for case, reason in dataset.skipped if case not in elsewhere]
        family = dataset.layout if len(parts) > 1 else prefix
        values = {old: value_of[structure_key(name)] for old, name in dataset.labels.items()}
        for case in _relabel(dataset, values, labels).cases:
            labelled = tuple(sorted(set(values.values()))) if case.labelled is None else case.labelled
            patient = f"{family}_{case.patient}"
            cases.append(replace(case, id=f"{prefix}_{case.id}", patient=patient, labelled=labelled))
    same = all(dataset.channels == first.channels for dataset in datasets)
    return Dataset(
        name="+".join(names),
        channels=first.channels if same else ("image",) * len(first.channels),
        labels=labels,
        cases=tuple(cases),
        skipped=tuple(skipped),
        notes=tuple(f"{n}: {note}" for d, n in zip(datasets, names, strict=True) for note in d.notes),
        hint=" ".join(dict.fromkeys(dataset.hint for dataset in datasets if dataset.hint)),
        layout="+".join(dataset.layout for dataset in datasets),
        patients="given" if all(dataset.patients == "given" for dataset in datasets) else "names",
    )


def _relabel(dataset: Dataset, values: Mapping[int, int], labels: Mapping[int, str]) -> Dataset:
    """Replace every value of the table by another (0: background), on top of what the cases replace already."""
    cases = []
    for case in dataset.cases:
        before = {value: value for value in values} if case.values is None else case.values
        # Parts of one structure that a joint table merges may be labelled in one dataset each, hence any, not all.
        labelled = None if case.labelled is None else sorted({values.get(value, 0) for value in case.labelled} - {0})
        changed = replace(
            case,
            values={stored: values.get(value, 0) for stored, value in before.items()},
            labelled=None if labelled is None else tuple(labelled),
        )
        cases.append(changed if case.has_label else case)
    return replace(dataset, labels=labels, cases=tuple(cases), values={})


def _value_of(part: int | str, dataset: Dataset) -> int:
    """The label value that a value or a name means. Raises DatasetError: none of the dataset's."""
    if isinstance(part, int):
        if part in dataset.labels or not dataset.labels:
            return part
    else:
        exact = [value for value, name in dataset.labels.items() if name == part]
        alike = [value for value, name in dataset.labels.items() if structure_key(name) == structure_key(part)]
        if exact or len(alike) == 1:
            return (exact or alike)[0]
    if not dataset.labels:
        raise DatasetError(f"no structure {part!r}: labels without names", file=dataset.name, action=_NAME_THEM)
    known = ", ".join(f"{value} {name}" for value, name in dataset.labels.items())
    raise DatasetError(f"no structure {part!r}", file=dataset.name, expected=f"one of: {known}")


def _distinct_names(datasets: Iterable[Dataset]) -> list[str]:
    """Names of the datasets as parts of file names, with a number where one comes again."""
    names: list[str] = []
    for dataset in datasets:
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", dataset.name).strip("._") or "dataset"
        number = sum(name == plain or name.startswith(f"{plain}_") for name in names)
        names.append(f"{plain}_{number + 1}" if plain in names else plain)
    return names


# Mirrored volumes: left and right organs trade places, and MVSeg's two leaflets. A left kidney in a mirrored scan is a
# right kidney. A left ventricle is not a right one: it is known by its form.


def axis_along(name: str, orientation: str) -> int:
    """Array axis that runs along an anatomical one ("LR", "AP" or "IS"), for an orientation such as "RAS"."""
    return next(axis for axis, letter in enumerate(orientation.upper()) if letter in name)


def swap_table(pairs: Iterable[tuple[int, int]], size: int) -> np.ndarray:
    """(size,) int32: the label value, below `size`, that each becomes where those of a pair trade places."""
    table = np.arange(size, dtype=np.int32)
    for one, other in pairs:
        table[[one, other]] = other, one
    return table


def mirror_pairs(labels: Mapping[int, str], axis: str) -> tuple[tuple[int, int], ...]:
    """The pairs of `sides`. Raises ConfigError where a structure of one side has no counterpart in the table."""
    pairs, alone = sides(labels, axis)
    if alone:
        raise ConfigError(
            f"--mirror {axis}: {', '.join(alone)} would become a structure that the labels do not have. "
            f"Leave {axis} out of --mirror"
        )
    return pairs


def sides(labels: Mapping[int, str], axis: str) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Pairs of label values of opposite sides along "LR", "AP" or "IS", and names of structures without a counterpart.

    Names are pairs where they differ in one word alone: left and right (also l and r, lt and rt, lh and rh) along LR,
    anterior and posterior of leaflets along AP.
    """
    by_words = {words_of(name): value for value, name in labels.items()}
    pairs, alone = [], []
    for value, name in labels.items():
        words = words_of(name)
        leaflet = axis == "AP" and any(word.startswith("leaflet") for word in words)
        opposites = _OPPOSITES[axis] | (_LEAFLET_OPPOSITES if leaflet else {})
        opposites |= {b: a for a, b in opposites.items()}
        if opposites.keys().isdisjoint(words):
            continue
        other = by_words.get(tuple(opposites.get(word, word) for word in words))
        if other is None:
            alone.append(name)
        elif value < other:
            pairs.append((value, other))
    return tuple(pairs), tuple(alone)


def shape_of(positions: np.ndarray, voxels: int, spacing: Sequence[float]) -> np.ndarray:
    """Measure a structure, (8,) of `_MEASURES`, from positions (n, 3) of voxels, all or an even sample of `voxels`."""
    size = np.asarray(spacing, float)
    volume = voxels * float(size.prod())
    covariance = np.cov(positions * size, rowvar=False) + np.diag(size**2 / 12)
    deviations = np.sqrt(np.diag(covariance))
    tilts = (covariance / np.outer(deviations, deviations))[[0, 0, 1], [1, 2, 2]]
    # Of an ellipsoid of these moments; a crescent fills less of it, and a cube 0.9.
    ellipsoid = 4 / 3 * math.pi * 5**1.5 * math.sqrt(max(np.linalg.det(covariance), 1e-12))
    return np.array([math.log(volume), *np.log(deviations), *tilts, math.log(volume / ellipsoid)])


def told_by_form(name: str) -> bool:
    """Whether a name with a side, as "left ventricle", is of a structure that is known by its form."""
    words = " ".join(words_of(name))
    return _BY_FORM.search(words) is not None and _ALIKE.search(words) is None


def differences(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
    """(8,) of `_MEASURES`: `one`, mirrored along an axis of the array, minus `other`."""
    mirrored = one.copy()
    # The tilts between the axes 0 and 1, 0 and 2, 1 and 2, of which two have to do with this one.
    mirrored[[4, 5, 6]] *= np.where([axis in pair for pair in ((0, 1), (0, 2), (1, 2))], -1, 1)
    return mirrored - other


def swap_reason(names: tuple[str, str], shapes: Sequence[tuple[np.ndarray, np.ndarray]], axis: int) -> tuple[bool, str]:
    """Whether the labels of two structures trade places where a volume is mirrored along an axis of the array, and why.

    names: of the two, which differ in the side; they decide where fewer than FEWEST_CASES cases have both. Else the
    label maps do: the `shapes` of one, mirrored, are those of the other within the spread of the cases.
    """
    by_form = any(map(told_by_form, names))
    if len(shapes) < FEWEST_CASES:
        return not by_form, f"by their names, as {len(shapes)} cases have both"
    rows = np.array([differences(one, other, axis) for one, other in shapes])
    middle = np.median(rows, axis=0)
    limit = _STRICT_TOLERANCE if by_form else np.maximum(_TOLERANCE, rows.std(axis=0, ddof=1))
    excess = np.abs(middle) / limit
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return True, f"mirror images of each other in {len(shapes)} cases"
    tilt = _MEASURES[worst] == "tilt"
    share = f"{abs(middle[worst]):.2f}" if tilt else f"{abs(math.expm1(middle[worst])):.0%}"
    return False, f"not mirror images in {len(shapes)} cases: {_MEASURES[worst]} differs by {share}"


def choose_swaps(
    labels: Mapping[int, str],
    pairs: Sequence[tuple[int, int]],
    shapes: Mapping[tuple[int, int], Sequence[tuple[np.ndarray, np.ndarray]]],
    axis: int,
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """The pairs whose labels trade places in a mirrored volume; a line that names them, and one on each other pair.

    pairs: of values whose names differ in the side. shapes, axis: see `swap_reason`.
    """
    swapped: dict[tuple[int, int], str] = {}
    lines = []
    for pair in pairs:
        names = (labels[pair[0]], labels[pair[1]])
        swap, reason = swap_reason(names, shapes.get(pair, ()), axis)
        if swap:
            swapped[pair] = f"{' and '.join(names)} ({reason})"
        else:
            kept = "keep their labels, as form and not side tells them apart"
            lines.append(f"In mirrored scans {' and '.join(names)} {kept} ({reason})")
    if swapped:
        lines.insert(0, f"In mirrored scans labels trade places: {listed(swapped.values())}")
    return tuple(swapped), tuple(lines)
