"""What a dataset is once its layout no longer matters: cases with their files, names of the labels and channels."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mambahome_jax.config import Modality
from mambahome_jax.datasets.files import listed
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import own_name

Split = Literal["train", "val", "test"]
# Who says of which patient a case is: the layout or a table, or the names of the cases.
PatientSource = Literal["given", "names"]

# What tables, folders and split files call the three parts.
SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "va"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
_MODALITY_WORDS: dict[Modality, frozenset[str]] = {
    "ct": frozenset({"ct", "cbct"}),
    "mr": frozenset({"mr", "mri", "t1", "t1w", "t1gd", "t1ce", "t1c", "t2", "t2w", "flair", "adc", "dwi", "pd"}),
    "us": frozenset({"us", "ultrasound"}),
}


@dataclass(frozen=True)
class Case:
    """One scan, with its label map where there is one.

    id: unique in its dataset, usable as a file name. patient: whose scan it is, by default nobody else's.
    split, modality: None where the dataset does not say. in_split: False where a split names the case in no list. fold:
    of the dataset's own cross-validation, the one that holds the case out.
    images: a file for each channel, in order; `image` is then the first. series: DICOM series to read of a folder.
    masks: (value, file) of binary masks instead of `label`, each laid over the ones before.
    values: stored label value -> value to use, 0 for background; None where they are used as they are.
    labelled: the values (after `values`) that are labelled in this case wherever they occur; None for all of the table.
    may_be_empty: False where a label map without any structure means that nobody labelled the scan.
    spacing_scale: see `read_volume`, for all files of the case.
    """

    id: str
    image: Path
    label: Path | None = None
    split: Split | None = None
    modality: Modality | None = None
    patient: str = ""
    images: tuple[Path, ...] = ()
    masks: tuple[tuple[int, Path], ...] = ()
    values: Mapping[int, int] | None = None
    labelled: tuple[int, ...] | None = None
    may_be_empty: bool = True
    spacing_scale: float | None = None
    series: tuple[str, ...] = ()
    in_split: bool = True
    fold: int | None = None

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def has_label(self) -> bool:
        """Whether there is a label map, or masks to make one from."""
        return self.label is not None or bool(self.masks)

    @property
    def image_files(self) -> tuple[Path, ...]:
        """All files of the image, a channel each where there are several."""
        return self.images or (self.image,)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All files of the label."""
        return tuple(path for _, path in self.masks) if self.label is None else (self.label,)


@dataclass(frozen=True)
class Dataset:
    """The cases that a folder holds.

    channels: one name each; more than one means 4D images whose last axis is the channel, or a file a channel.
    labels: value -> name without the background 0, after `Case.values`; empty where the dataset does not name them.
    values: value of `labels` -> value that the label maps store, where the two differ throughout; empty elsewhere.
    skipped: (case id, reason) of what cannot be used. notes: what the user should know but need not fix.
    hint: what to do where a label map holds a value that the table does not. layout: NAME of the module that read it.
    patients: who says of which patient a case is; None where each case counts as a patient of its own.
    """

    name: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    cases: tuple[Case, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    hint: str = ""
    layout: str = ""
    patients: PatientSource | None = None
    values: Mapping[int, int] = field(default_factory=dict)


def numbered(*names: str) -> dict[int, str]:
    """A label table of names in the order of their values 1, 2, 3, ..."""
    return dict(enumerate(names, start=1))


def case_of_masks(
    case: str, image: Path, modality: Modality, labels: Mapping[int, str], masks: Mapping[str, Path], **fields: Any
) -> Case:
    """A case whose structures have a mask each, laid over each other in the order of the table.

    masks: by name of structure. A structure of the table without a mask is not labelled in the case.
    """
    known = tuple((value, masks[name]) for value, name in labels.items() if name in masks)
    labelled = tuple(value for value, _ in known) if 0 < len(known) < len(labels) else None
    fields |= {"modality": modality, "masks": known, "labelled": labelled, "may_be_empty": False}
    return Case(case, image, **fields)


def dataset_of(
    cases: Iterable[Case],
    skipped: Iterable[tuple[str, str]],
    folder: Path,
    expected: str,
    absent: str = "no scan",
    **fields: Any,
) -> Dataset:
    """The dataset that a layout found in a folder, with a note on cases that lack a label and are none to test on.

    expected: LOOKS_FOR of the layout. fields: of `Dataset`; by default the folder's name and channels without names.
    Raises DatasetError: no case; says what is `absent`, and why the first was skipped.
    """
    cases, skipped = tuple(cases), tuple(skipped)
    if not cases:
        reason = f" ({skipped[0][1]})" if skipped else ""
        raise DatasetError(f"{absent}{reason}", file=folder, expected=expected)
    count = max(len(case.image_files) for case in cases)
    fields = {"name": own_name(folder)} | fields
    if not fields.get("channels"):
        fields["channels"] = ("image",) if count == 1 else tuple(f"channel_{number}" for number in range(count))
    names = [case.id for case in cases if not case.has_label and case.split != "test"]
    note = (f"{len(names)} images have no label and are kept as unlabelled: {listed(names)}",) if names else ()
    return Dataset(cases=cases, skipped=skipped, notes=(*note, *fields.pop("notes", ())), **fields)


def label_names(table: object, file: Path) -> dict[int, str]:
    """Label table of a dataset.json, {"1": name} or {name: 1}, as {value: name} in order of value, without background.

    Raises DatasetError: another form, a value that is no whole number from 0 to 65535, one value with two names.
    """
    expected = '"labels": {"1": "liver", ...} with values from 0 to 65535'
    if not isinstance(table, dict):
        raise DatasetError('no table "labels"', file=file, expected=expected)
    names: dict[int, str] = {}
    for key, content in table.items():
        value, name = (key, content) if _is_integer(key) else (content, key)
        if not _is_integer(value) or not isinstance(name, str) or not 0 <= int(value) <= 65535:
            action = "Leave other values out of the table and number them by preprocess.py --label_map FILE."
            raise DatasetError(f"label entry {key!r}: {content!r}", file=file, expected=expected, action=action)
        if names.setdefault(int(value), name) != name:
            raise DatasetError(f"label {value} is named {names[int(value)]!r} and {name!r}", file=file)
    names.pop(0, None)
    return dict(sorted(names.items()))


def region_names(content: Mapping[str, Any], file: Path) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    """Names of a dataset.json or run.json as `label_names`, and the label values in each structure that is a region.

    Regions are nnU-Net's, which overlap: {"whole": [1, 2], "core": [2]} with the value that each writes in
    "regions_class_order"; run.json has them as "regions", {"1": [1, 2], "2": [2]}. Empty where there are none.
    Raises DatasetError: another form.
    """
    table = content.get("labels")
    if not isinstance(table, Mapping) or not any(isinstance(value, list) for value in table.values()):
        stored = content.get("regions")
        entries = list(stored.items()) if isinstance(stored, Mapping) else []
        if isinstance(table, Mapping):  # voxels of nnU-Net's "ignore" have no label: it is no structure
            table = {name: value for name, value in table.items() if name != "ignore"}
        # Without values for keys it is of another program's meaning.
        names, held = label_names(table, file), entries if all(_is_integer(key) for key, _ in entries) else []
    else:
        structures = {name: value for name, value in table.items() if name not in ("ignore", "background")}
        order = content.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(structures):
            found = f'{len(structures)} regions with "regions_class_order" {order!r}'
            raise DatasetError(found, file=file, expected="one value a region")
        names = label_names(dict(zip(structures, order, strict=True)), file)
        held = list(zip(order, structures.values(), strict=True))
    regions = {}
    for key, entry in held:
        values = entry if isinstance(entry, list) else [entry]
        if not _is_integer(key) or not values or not all(_is_integer(value) for value in values):
            raise DatasetError(f"region {key!r}: {entry!r}", file=file, expected="a list of label values")
        regions[int(key)] = tuple(int(value) for value in values)
    return names, regions


def channel_names(content: Mapping[str, Any], key: str, file: Path) -> tuple[str, ...]:
    """Channel table of a dataset.json, {"0": "CT", ...}, as names in order. Raises DatasetError: another form."""
    table = content.get(key)
    if not isinstance(table, dict) or not table or sorted(table) != sorted(map(str, range(len(table)))):
        raise DatasetError(f'"{key}" is {table!r}', file=file, expected=f'"{key}": {{"0": "CT"}}, one entry a channel')
    return tuple(str(table[str(number)]) for number in range(len(table)))


def optional_description(folder: Path) -> tuple[dict[int, str], tuple[str, ...]]:
    """Read "labels" and "channels" (a list of names) of folder/dataset.json; empty where the file or the key is absent.

    Raises DatasetError: a damaged file or table.
    """
    file = folder / "dataset.json"
    content = read_json(file) if file.exists() else {}
    labels = label_names(content["labels"], file) if "labels" in content else {}
    channels = content.get("channels", [])
    if not isinstance(channels, list) or not all(isinstance(name, str) for name in channels):
        expected = 'a list of names such as ["T1w", "FLAIR"]'
        raise DatasetError(f'"channels" is {channels!r}', file=file, expected=expected)
    return labels, tuple(channels)


def modality_of(names: Iterable[str]) -> Modality | None:
    """Modality that channel names such as "CT", "MRI" or "T1w" stand for; None where they do not tell or disagree."""
    words = {word for name in names for word in re.split(r"[^a-z0-9]+", name.lower())}
    modalities = [modality for modality, known in _MODALITY_WORDS.items() if known & words]
    return modalities[0] if len(modalities) == 1 else None


def _is_integer(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?\d+", value) is not None
    return isinstance(value, int) and not isinstance(value, bool)
