"""What the values of two folders of label maps mean, so that structures are compared with what they are."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambahome_jax.datasets.base import label_names
from mambahome_jax.datasets.structures import match_structures, table_of_values
from mambahome_jax.errors import DatasetError
from mambahome_jax.evaluation.evaluate import Pair
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.imaging.volume import count_values, read_labels
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import one_form

RUN, DATASET = "run.json", "dataset.json"


@dataclass(frozen=True)
class LabelTable:
    """Names of the structures in a folder of label maps.

    names: value in the label maps -> name. values: number -> stored value of the dataset, empty where the two are the
    same. numbered: whether the label maps hold the numbers, as those of a preprocessed folder do, or the stored values.
    """

    names: Mapping[int, str]
    file: Path
    values: Mapping[int, int]
    numbered: bool

    @property
    def stored(self) -> dict[int, int]:
        """Value in the label maps -> stored value, where the two differ."""
        return dict(self.values) if self.numbered else {}

    def as_held(self, files: Iterable[Path]) -> "LabelTable":
        """The table of label maps that hold either: whichever the first file that tells holds, else as it is."""
        if not self.values:
            return self
        numbers, stored = {*self.values}, {*self.values.values()}
        for file in files:
            try:
                # Whatever the header says of lengths: only the values count here.
                held = count_values(read_labels(file, spacing_scale=1.0).array).keys()
            except DatasetError:
                # Reported when the pair's turn comes.
                continue
            if held & (stored ^ numbers):
                return self._rekeyed(not held & (stored - numbers))
        return self

    def _rekeyed(self, numbered: bool) -> "LabelTable":
        if numbered == self.numbered:
            return self
        keys = {value: number for number, value in self.values.items()} if numbered else self.values
        names = {keys.get(value, value): name for value, name in self.names.items()}
        return dataclasses.replace(self, names=names, numbered=numbered)


def named_pairs(
    pairs: Sequence[Pair], predictions: Path, references: Path, given: Path | None = None
) -> tuple[list[Pair], dict[int, str], dict[int, int] | None, Path | None]:
    """Pairs with names, with what the references' values stand for, and with the structures to judge.

    given: file of --labels. Returns also the names, value of the predictions -> name; the predictions' value for each
    of the references', None where they are the same; and the file that names the structures, None without one.
    Raises DatasetError: see `find_names` and `reconcile_names`.
    """
    names, source = find_names(predictions, references, given)
    files = [pair.prediction for pair in pairs], [pair.reference for pair in pairs]
    if given is None:
        names, values = reconcile_names(predictions, references, names, *files)
    else:
        names, values = _given_names(LabelTable(names, given, *_values_in(given)), predictions, references, *files)
    labelled = labelled_values(references)
    named = [
        dataclasses.replace(
            pair,
            names=names,
            reference_values=values,
            labelled=judged_values(labelled.get(scan_stem(pair.reference)), values),
        )
        for pair in pairs
    ]
    return named, names, values, source


def find_names(predictions: Path, references: Path, given: Path | None = None) -> tuple[dict[int, str], Path | None]:
    """Names of the structures, {value: name}, and the file that they come from.

    given: dataset.json or run.json; without it they are looked for in and beside both folders; empty where there is
    none. Raises DatasetError: `given` cannot be read or has no table of labels.
    """
    if given is not None:
        return label_names(read_json(given).get("labels"), given), given
    for folder in (references, predictions):
        for table in _tables(folder):
            return dict(table.names), table.file
    return {}, None


def reconcile_names(
    predictions: Path,
    references: Path,
    names: dict[int, str],
    predicted: Sequence[Path] = (),
    referred: Sequence[Path] = (),
) -> tuple[dict[int, str], dict[int, int] | None]:
    """Names to judge by, and the predictions' value for each of the references' where the two sides name others.

    `names` and None where only one side names its values, or both name them alike by `structure_key`. Where the dataset
    of one side was numbered, label maps may hold numbers or stored values: `predicted` and `referred`, the files of
    both sides, tell.
    Raises DatasetError: both sides have names, but no structure in common.
    """
    ours, theirs = _both_sides(predictions, references, predicted, referred)
    if ours is None or theirs is None:
        return names, None
    if ours.values or theirs.values:
        names = dict(theirs.names)
    values = match_structures(theirs.names, ours.names, theirs.stored, ours.stored)
    if len(values) == len(theirs.names) and all(old == new for old, new in values.items()):
        return names, None
    if not values:
        found, expected = (", ".join(f"{v} {n}" for v, n in side.names.items()) for side in (theirs, ours))
        action = "Compare with the label maps that preprocess wrote, or say by --labels what the values mean."
        raise DatasetError(f"structures {found}", file=references, expected=f"some of: {expected}", action=action)
    return dict(ours.names), values


def labelled_values(references: Path) -> dict[str, tuple[int, ...]]:
    """Which values are labelled at all, of the cases of a preprocessed folder of which not all are."""
    file = references.parent / DATASET
    cases = read_json(file).get("cases") if file.is_file() else None
    entries = cases if isinstance(cases, list) else []
    return {
        one_form(str(entry.get("id"))): tuple(value for value in entry["labelled"] if isinstance(value, int))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("labelled"), list)
    }


def judged_values(labelled: tuple[int, ...] | None, values: Mapping[int, int] | None) -> tuple[int, ...] | None:
    """What a case labels, by values of the references, by those of the predictions."""
    if labelled is None or values is None:
        return labelled
    return tuple(values[value] for value in labelled if value in values)


def _both_sides(
    predictions: Path, references: Path, predicted: Sequence[Path], referred: Sequence[Path]
) -> tuple[LabelTable | None, LabelTable | None]:
    """Tables of predictions and references; of a side without one that of the other, where its dataset was numbered."""
    ours, theirs = (next(_tables(folder), None) for folder in (predictions, references))
    # What infer wrote beside its results is true of them; other label maps may lie in or beside a preprocessed folder.
    if ours is not None and ours.file.name != RUN:
        ours = ours.as_held(predicted)
    if theirs is not None and theirs.file.name != RUN:
        theirs = theirs.as_held(referred)
    if ours is None and theirs is not None and theirs.values:
        ours = theirs.as_held(predicted)
    if theirs is None and ours is not None and ours.values:
        theirs = ours.as_held(referred)
    return ours, theirs


def _given_names(
    given: LabelTable, predictions: Path, references: Path, predicted: Sequence[Path], referred: Sequence[Path]
) -> tuple[dict[int, str], dict[int, int] | None]:
    """As `reconcile_names`, where --labels names the structures: by numbers or by stored values."""
    ours, theirs = _both_sides(predictions, references, predicted, referred)
    values = next((dict(table.values) for table in (given, ours, theirs) if table is not None and table.values), None)
    if values is None:
        return dict(given.names), None
    known = dataclasses.replace(given, values=values)
    if not given.values:
        known = dataclasses.replace(
            known, numbered={*given.names} <= {*values} and not {*given.names} <= {*values.values()}
        )
    ours, theirs = ours or known.as_held(predicted), theirs or known.as_held(referred)
    names = dict(known._rekeyed(ours.numbered).names)
    if ours.numbered == theirs.numbered:
        return names, None
    return names, {old: new for new, old in values.items()} if ours.numbered else values


def _tables(folder: Path) -> Iterator[LabelTable]:
    """Tables of names in and beside a folder."""
    for home in (folder, folder.parent):
        for file in (home / DATASET, home / RUN):
            if file.is_file():
                table = read_json(file).get("labels")
                names = label_names(table, file) if table else {}
                if names:
                    yield LabelTable(names, file, *_values_in(file))


def _values_in(file: Path) -> tuple[dict[int, int], bool]:
    """The table of stored values in a file, and whether the labels that it names are numbers."""
    content: dict[str, Any] = read_json(file)
    values = table_of_values(content.get("values"), file)
    return values, bool(values) and file.name != RUN
