"""Names of structures: which of them are meant, which are one organ in two datasets."""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.errors import DatasetError
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


def structure_key(name: str) -> str:
    """One spelling of a structure's name: "Left kidney", kidney_l and left-kidney are all kidney_left.

    Equal keys mean the same organ on the same side.
    """
    words = _words(one_form(name))
    sides = [_SIDES[word] for word in words if word in _SIDES]
    stem = "_".join(word for word in words if word not in _SIDES)
    return "_".join([_SYNONYMS.get(stem, stem), *sides])


def consecutive(dataset: Dataset) -> Dataset:
    """The dataset with its label values made 1, 2, 3, ... in their order; itself where they are that, or not named."""
    if not dataset.labels or list(dataset.labels) == list(range(1, len(dataset.labels) + 1)):
        return dataset
    values = {old: new for new, old in enumerate(dataset.labels, start=1)}
    found = _relabel(dataset, values, {new: dataset.labels[old] for old, new in values.items()})
    if any(case.masks or case.values is not None for case in dataset.cases):
        # Of these the table's values are in no file.
        return found
    return dataclasses.replace(found, values={new: dataset.values.get(old, old) for old, new in values.items()})


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


def select_structures(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The dataset with the structures of these names only, as 1, 2, 3, ... in this order; the others are background.

    Names are compared by `structure_key`. Raises DatasetError: a name that the dataset does not have, or no names.
    """
    found = [_value_of(name, dataset) for name in dict.fromkeys(names)]
    values = dict.fromkeys(dataset.labels, 0) | {value: new for new, value in enumerate(found, start=1)}
    return _relabel(dataset, values, {values[value]: dataset.labels[value] for value in found})


def merge_structures(dataset: Dataset, table: Mapping[str, Sequence[int | str]]) -> Dataset:
    """The dataset with new structures 1, 2, 3, ..., each made of values or names of the old; the rest is background.

    A new structure counts as labelled in a case where any of its parts does. What a structure named background lists
    is background too, which only labels without names need to be told.
    Raises DatasetError: a part that the dataset does not have, or that is in two structures.
    """
    names = [name for name in table if name != "background"]
    values = dict.fromkeys(dataset.labels, 0)
    for name, parts in table.items():
        new = names.index(name) + 1 if name in names else 0
        for part in parts:
            value = _value_of(part, dataset)
            if values.get(value, 0) not in (0, new):
                found = f"{dataset.labels.get(value, value)} is in {name} and in another structure"
                raise DatasetError(found, file="label map", expected="each part in one structure")
            values[value] = new
    return _relabel(dataset, values, dict(enumerate(names, start=1)))


def read_label_map(file: Path) -> dict[str, list[int | str]]:
    """Table of a TOML file with lines such as `pancreas = [4, 5]` or `kidneys = ["kidney_left", "kidney_right"]`.

    Raises DatasetError: no such file, not TOML, an entry of another form, no entry.
    """
    expected = "lines such as: pancreas = [4, 5]"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=file, expected=expected) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot be read ({error})", file=file, expected=expected) from error
    table: dict[str, list[int | str]] = {}
    for name, parts in content.items():
        parts = parts if isinstance(parts, list) else [parts]
        if not parts or not all(isinstance(part, int | str) and not isinstance(part, bool) for part in parts):
            raise DatasetError(f"{name} = {parts!r}", file=file, expected=expected)
        table[name] = parts
    if not table:
        raise DatasetError("no structure", file=file, expected=expected)
    return table


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Several datasets as one, with one label table: structures of one `structure_key` are one label.

    Ids and patients get the name of their dataset in front; patients of several folders of one published dataset that
    of its layout, so that they stay together. A case that only one such folder lacks a file for is not skipped. Every
    case says which of the joint values its dataset labels, so that a structure that it never labelled can be left out
    of the loss.
    Raises DatasetError: another number of channels, a dataset whose labels have no names.
    """
    names = _distinct_names(datasets)
    for dataset in datasets:
        if not dataset.labels:
            raise DatasetError("labels without names cannot be joined", file=dataset.name, action=_NAME_THEM)
        if len(dataset.channels) != len(datasets[0].channels):
            found, expected = (f"{len(d.channels)} channels" for d in (dataset, datasets[0]))
            raise DatasetError(found, file=dataset.name, expected=f"{expected} as in {datasets[0].name}")
    keys = dict.fromkeys(structure_key(name) for dataset in datasets for name in dataset.labels.values())
    labels = dict(enumerate(keys, start=1))
    value_of = {key: value for value, key in labels.items()}
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
            cases.append(
                dataclasses.replace(
                    case, id=f"{prefix}_{case.id}", patient=f"{family}_{case.patient}", labelled=labelled
                )
            )
    channels = {dataset.channels for dataset in datasets}
    return Dataset(
        name="+".join(names),
        channels=datasets[0].channels if len(channels) == 1 else ("image",) * len(datasets[0].channels),
        labels=labels,
        cases=tuple(cases),
        skipped=tuple(skipped),
        notes=tuple(f"{n}: {note}" for d, n in zip(datasets, names, strict=True) for note in d.notes),
        hint=" ".join(dict.fromkeys(dataset.hint for dataset in datasets if dataset.hint)),
        layout="+".join(dataset.layout for dataset in datasets),
        patients="given" if all(dataset.patients == "given" for dataset in datasets) else "names",
    )


def _relabel(dataset: Dataset, values: Mapping[int, int], labels: Mapping[int, str]) -> Dataset:
    """Every value of the table replaced by another (0: background), on top of what the cases replace already."""
    cases = tuple(_relabel_case(case, values) for case in dataset.cases)
    return dataclasses.replace(dataset, labels=labels, cases=cases, values={})


def _relabel_case(case: Case, values: Mapping[int, int]) -> Case:
    if not case.has_label:
        return case
    before = {value: value for value in values} if case.values is None else case.values
    # Parts of one structure that a joint table merges may be labelled in one dataset each, hence any, not all.
    labelled = None if case.labelled is None else sorted({values.get(value, 0) for value in case.labelled} - {0})
    return dataclasses.replace(
        case,
        values={stored: values.get(value, 0) for stored, value in before.items()},
        labelled=None if labelled is None else tuple(labelled),
    )


def _value_of(part: int | str, dataset: Dataset) -> int:
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
    """Names of the datasets as parts of file names, a number behind those that come again."""
    names: list[str] = []
    for dataset in datasets:
        plain = re.sub(r"[^A-Za-z0-9.-]+", "_", dataset.name).strip("._") or "dataset"
        number = sum(name == plain or name.startswith(f"{plain}_") for name in names)
        names.append(f"{plain}_{number + 1}" if plain in names else plain)
    return names


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]
