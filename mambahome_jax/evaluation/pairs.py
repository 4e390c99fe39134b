"""Which label maps are compared, and what their values mean, so that structures are compared with what they are."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mambahome_jax.config import Surface
from mambahome_jax.datasets.base import Split, region_names
from mambahome_jax.datasets.files import common_name, counterparts, fault_of_name, listing, scan_files
from mambahome_jax.datasets.label_map import count_values
from mambahome_jax.datasets.prepared import unlisted_files
from mambahome_jax.datasets.scans import of_labels, search
from mambahome_jax.datasets.structures import match_structures, table_of_values
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import files_in, sort_out
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, alternatives, scan_stem
from mambahome_jax.imaging.geometry import SCORE_VOXELS, on_grid_of
from mambahome_jax.imaging.volume import Volume, read_grid, read_labels, replace_values
from mambahome_jax.support.files import earlier_json, read_json, record_of
from mambahome_jax.support.paths import one_form

RUN, DATASET = "run.json", "dataset.json"
_DICOM = "DICOM, which is not compared. Convert it, or segment with --output_format nii.gz"


@dataclass(frozen=True)
class Pair:
    """A label map to judge and its reference, both files; names: label value -> structure, judged in any case.

    surface: what distances are taken of, see `metrics`.
    reference_values: what to replace the reference's values by (others become background), None for nothing.
    labelled: values that the reference labels wherever they occur, None for all; the others are not judged.
    spacing_scale: as `read_volume` takes it, for both files.
    regions: value -> the label values in the structure, where it holds more than its own.
    ignored: value of the reference file at voxels without any label, which are not judged; None for no such value.
    """

    case: str
    prediction: Path
    reference: Path
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    tolerance_mm: float = 1.0
    surface: Surface = "voxels"
    reference_values: Mapping[int, int] | None = None
    labelled: tuple[int, ...] | None = None
    spacing_scale: float | None = None
    regions: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ignored: int | None = None


def read_pair(pair: Pair) -> tuple[Volume, Volume]:
    """Read prediction and reference: (D0, D1, D2) label values of the prediction's table, on the reference's grid.

    Raises DatasetError: a file cannot be read, is no label map, or the two are not on the same grid.
    """
    files, scale = (pair.prediction, pair.reference), pair.spacing_scale
    action = f"Bring it to the grid of {pair.reference} first."
    # The headers first: a grid that does not fit is found without reading voxels.
    for read in (read_grid, read_labels):
        prediction, reference = (read(file, spacing_scale=scale) for file in files)
        prediction = on_grid_of(reference, prediction, pair.prediction, action, voxels=SCORE_VOXELS, name="reference")
    unlabelled = None if pair.ignored is None else reference.array == pair.ignored
    if pair.reference_values is not None:
        reference = replace(reference, array=replace_values(reference.array, pair.reference_values))
    if unlabelled is not None:
        prediction, reference = (
            replace(volume, array=np.where(unlabelled, 0, volume.array)) for volume in (prediction, reference)
        )
    return prediction, reference


def find_pairs(predictions: Path, references: Path) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Pair the same case of two folders (or two files); also (case, reason) of what has no counterpart.

    Names are equal, or differ in nnU-Net's number of a channel (`counterparts`), which is no part of the case.
    Raises DatasetError: a folder is missing or without label maps, or no name is in both.
    """
    if predictions.is_file() and references.is_file():
        if not scan_stem(predictions).isprintable():
            raise DatasetError(fault_of_name(scan_stem(predictions)), file=repr(str(predictions)))
        return [Pair(scan_stem(predictions), predictions, references)], []
    ours, unlisted = _label_maps(predictions)
    theirs, of_no_case = _label_maps(references)
    unlisted |= of_no_case
    both = counterparts(ours, theirs)
    # A table of lines, in UTF-8, cannot have them.
    unfit = [(_shown(case), fault_of_name(case)) for case in both if not case.isprintable()]
    pairs = [
        Pair(common_name(case, other), ours[case], theirs[other]) for case, other in both.items() if case.isprintable()
    ]
    if not pairs and unfit:
        raise DatasetError(f"{unfit[0][0]}: {unfit[0][1]}", file=predictions)
    if not pairs:
        example = f"{next(iter(ours.values())).name} in the one, {next(iter(theirs.values())).name} in the other"
        raise DatasetError("no file name is in both folders", file=predictions, expected="equal names", action=example)
    alone = [(_shown(case), f"no prediction in {predictions}") for case in theirs.keys() - both.values()]
    alone += [(_shown(case), f"no reference in {references}") for case in ours.keys() - both.keys()]
    alone = [(case, unlisted.pop(case, reason)) for case, reason in unfit + alone]
    return pairs, sorted(alone + list(unlisted.items()))


def _label_maps(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """{case: file} of a folder, and {case: reason} of what else there could be one: what a preprocessed folder does not
    name in its dataset.json, other formats, DICOM, label maps in folders below.

    Raises DatasetError: no such folder, no label map.
    """
    if not folder.is_dir():
        raise DatasetError("no such folder", file=folder)
    files = scan_files(folder)
    reasons = unlisted_files(folder, [path.name for path in files.values()])
    listed = {case: path for case, path in files.items() if path.name not in reasons}
    missed = _not_compared(folder)
    if not listed:
        below = [f"Name its folder {name}." for name in listing(folder)[0] if of_labels(name)]
        action = next(iter((*reasons.values(), *below, *missed.values())), None)
        found = f"no {alternatives(SCAN_SUFFIXES)} file"
        raise DatasetError(found, file=folder, expected="label maps", action=action)
    return listed, missed | {_shown(case): reasons[path.name] for case, path in files.items() if path.name in reasons}


def _not_compared(folder: Path) -> dict[str, str]:
    """{case: reason} of what could be a label map, but is no scan file of the folder itself."""
    found = search(folder)
    # Of two forms of one file here the first is compared, and a note says so.
    reasons = {_shown(name): reason for name, reason in found.failures if name not in found.alike}
    for one in (*found.scans, *(one for alike in found.alike.values() for one in alike)):
        if one.path.is_dir():
            reasons[_shown(one.name)] = f"{one.path}: {_DICOM}"
        elif one.depth:
            reason = "in a folder below; only files of the folder itself are compared. Name that folder, or move it"
            reasons[_shown(one.name)] = f"{one.path}: {reason}"
    return reasons | {_shown(path.stem): f"{path}: {_DICOM}" for path in sort_out(files_in(folder)).non_images}


def _shown(case: str) -> str:
    return case if case.isprintable() else repr(case)[1:-1]


@dataclass(frozen=True)
class LabelTable:
    """Names of the structures in a folder of label maps.

    names: value in the label maps -> name. values: number -> stored value of the dataset, empty where the two are the
    same. numbered: whether the label maps hold the numbers, as those of a preprocessed folder do, or the stored values.
    regions: of `region_names`.
    """

    names: Mapping[int, str]
    file: Path
    values: Mapping[int, int]
    numbered: bool
    regions: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, names: Mapping[int, str], file: Path, regions: Mapping[int, tuple[int, ...]] | None = None
    ) -> "LabelTable":
        """Make a table of names with the stored values that their file tells of."""
        values = table_of_values(read_json(file).get("values"), file)
        return cls(names, file, values, bool(values) and file.name != RUN, regions or {})

    @property
    def stored(self) -> dict[int, int]:
        """Value in the label maps -> stored value, where the two differ."""
        return dict(self.values) if self.numbered else {}

    def as_held(self, files: Iterable[Path]) -> "LabelTable":
        """Return the table as the first of the files that tells holds it, by number or stored value; else as it is."""
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
                return self.rekeyed(not held & (stored - numbers))
        return self

    def rekeyed(self, numbered: bool) -> "LabelTable":
        if numbered == self.numbered:
            return self
        keys = {value: number for number, value in self.values.items()} if numbered else self.values
        names = {keys.get(value, value): name for value, name in self.names.items()}
        return replace(self, names=names, numbered=numbered)


def named_pairs(
    pairs: Sequence[Pair], predictions: Path, references: Path, given: Path | None = None
) -> tuple[list[Pair], dict[int, str], dict[int, int] | None, Path | None]:
    """Give pairs names, the meaning of the references' values, and the structures to judge.

    given: file of --labels. Returns also the names, value of the predictions -> name; the predictions' value for each
    of the references', None where they are the same; and the file that names the structures, None without one.
    Raises DatasetError: see `find_names` and `reconcile_names`.
    """
    names, source = find_names(predictions, references, given)
    files = [pair.prediction for pair in pairs], [pair.reference for pair in pairs]
    if given is None:
        names, values = reconcile_names(predictions, references, names, *files)
    else:
        names, values = _given_names(LabelTable.of(names, given), predictions, references, *files)
    regions, compared = _regions(predictions, references, given, values)
    judged = judged_pairs(pairs, references, compared)
    ignored = _ignored(references)
    return [replace(pair, names=names, regions=regions, ignored=ignored) for pair in judged], names, values, source


def _ignored(references: Path) -> int | None:
    """The value of nnU-Net's label "ignore", where the dataset.json in or beside the references has one."""
    file = next((home / DATASET for home in (references, references.parent) if (home / DATASET).is_file()), None)
    table = read_json(file).get("labels") if file else None
    value = table.get("ignore") if isinstance(table, Mapping) else None
    return int(str(value)) if str(value).isdecimal() else None


def _regions(
    predictions: Path, references: Path, given: Path | None, values: Mapping[int, int] | None
) -> tuple[Mapping[int, tuple[int, ...]], Mapping[int, int] | None]:
    """Find which label values each region holds, and complete `values` by those that only regions name."""
    if given is not None:
        return region_names(read_json(given), given)[1], values
    theirs, ours = (next(_tables(folder), None) for folder in (references, predictions))
    if theirs is None or not theirs.regions:
        return {} if ours is None else ours.regions, values
    if values is None:
        return theirs.regions, None
    values = dict(values)
    free = count(max(*values.values(), *chain(*theirs.regions.values())) + 1)
    for value in sorted({*chain(*theirs.regions.values())} - {*values}):
        values[value] = next(free) if value in values.values() else value
    return {values[k]: tuple(values[v] for v in held) for k, held in theirs.regions.items() if k in values}, values


def judged_pairs(pairs: Iterable[Pair], references: Path, values: Mapping[int, int] | None) -> list[Pair]:
    """Give pairs the predictions' `values` for the references', and what each case labels where not all do."""
    file = references.parent / DATASET
    cases = read_json(file).get("cases") if file.is_file() else None
    labelled = {
        one_form(str(entry.get("id"))): tuple(value for value in entry["labelled"] if isinstance(value, int))
        for entry in (cases if isinstance(cases, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("labelled"), list)
    }
    if values is not None:
        labelled = {
            case: tuple(values[value] for value in known if value in values) for case, known in labelled.items()
        }
    return [replace(pair, reference_values=values, labelled=labelled.get(scan_stem(pair.reference))) for pair in pairs]


def splits_of(predictions: Path, pairs: Iterable[Pair]) -> dict[str, Split]:
    """The part that each case had in the training of the network that predicted it, where run.json beside it says so.

    A label map is known by its content, whatever its name; one that was changed since by its name.
    """
    report = _report_of(predictions)
    by_content: dict[str, Any] = {}
    by_name: dict[str, Any] = {}
    # Results of those that a later run left out may still be there.
    for entry in (entry for key in ("left_out", "cases") for entry in _objects(report.get(key))):
        split, record = entry.get("split", ""), entry.get("made_from")
        if split not in get_args(Split):
            continue
        by_name[one_form(str(entry.get("output")))] = split
        if isinstance(record, Mapping) and isinstance(record.get("result"), Mapping):
            by_content[str(record["result"].get("content"))] = split
    splits = {}
    for pair in pairs if by_name else ():
        try:
            content = record_of([pair.prediction])["content"]
        except DatasetError:
            # Said when the pair's turn comes.
            continue
        if split := by_content.get(content, by_name.get(one_form(pair.prediction.name))):
            splits[pair.case] = split
    return splits


def left_out_of(predictions: Path) -> set[str]:
    """The cases that infer left out, by run.json beside its results."""
    return {str(entry.get("id")) for entry in _objects(_report_of(predictions).get("left_out"))}


def _report_of(predictions: Path) -> dict[str, Any]:
    return earlier_json((predictions if predictions.is_dir() else predictions.parent) / RUN)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def find_names(predictions: Path, references: Path, given: Path | None = None) -> tuple[dict[int, str], Path | None]:
    """Find the names of the structures, {value: name}, and the file that they come from.

    given: dataset.json or run.json; without it they are looked for in and beside both folders; empty where there is
    none. Raises DatasetError: `given` cannot be read or has no table of labels.
    """
    if given is not None:
        return region_names(read_json(given), given)[0], given
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
    """Return the names to judge by, and the predictions' value for each of the references' where they name others.

    `names` and None where only one side names its values, or both name them alike by `structure_key`. Where the dataset
    of one side was numbered, label maps may hold numbers or stored values: `predicted` and `referred`, the files of
    both sides, tell. Raises DatasetError: both sides have names, but no structure in common.
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


def _given_names(
    given: LabelTable, predictions: Path, references: Path, predicted: Sequence[Path], referred: Sequence[Path]
) -> tuple[dict[int, str], dict[int, int] | None]:
    """As `reconcile_names`, where --labels names the structures: by numbers or by stored values."""
    ours, theirs = _both_sides(predictions, references, predicted, referred)
    values = next((dict(table.values) for table in (given, ours, theirs) if table is not None and table.values), None)
    if values is None:
        return dict(given.names), None
    numbered = given.numbered
    if not given.values:
        numbered = {*given.names} <= {*values} and not {*given.names} <= {*values.values()}
    known = replace(given, values=values, numbered=numbered)
    ours, theirs = ours or known.as_held(predicted), theirs or known.as_held(referred)
    names = dict(known.rekeyed(ours.numbered).names)
    if ours.numbered == theirs.numbered:
        return names, None
    return names, {old: new for new, old in values.items()} if ours.numbered else values


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


def _tables(folder: Path) -> Iterator[LabelTable]:
    """Tables of names in and beside a folder."""
    for home in (folder, folder.parent):
        for file in (home / DATASET, home / RUN):
            if file.is_file():
                content = read_json(file)
                names, regions = region_names(content, file) if content.get("labels") else ({}, {})
                if names:
                    yield LabelTable.of(names, file, regions)
