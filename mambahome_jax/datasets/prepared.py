"""A folder that preprocess.py wrote: images/, labels/, store/ and dataset.json."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset, PatientSource, Split, label_names
from mambahome_jax.datasets.files import fault_of_name, listed, listing
from mambahome_jax.datasets.structures import table_of_values
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import suffix_of
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation, ct_from_json, ct_to_json
from mambahome_jax.support.files import read_json, write_json
from mambahome_jax.support.paths import as_on_disk, local_path, one_form

NAME = "prepared"
COVERS: tuple[str, ...] = ("images_labels", "decathlon", "nnunet_raw")
LOOKS_FOR = "dataset.json with store/ (a folder that preprocess.py wrote)"
VERSION = 1
DESCRIPTION = "dataset.json"

# Folders of the cases' files, and the keys of dataset.json that name them.
_PARTS = {"images": "image", "labels": "label"}
_KEYS = ("id", "image", "label", "split", "modality", "shape", "spacing", "source")


@dataclass(frozen=True)
class PreparedCase:
    """One entry of "cases" in dataset.json.

    image, label: paths, relative to the folder where the file lies in it. shape: (D, H, W) voxels and spacing: (3,) mm
    after resampling. source: the image file that the user gave, with its folder's name. patient: written only where it
    is not the id.
    labelled: the values that this case's dataset labels at all, written only where that is not the whole table.
    remarks: what was found and dealt with, such as masks that overlap. in_split: False, and written only then, where
    the dataset has a split and names this case in none of its lists.
    """

    id: str
    image: str
    label: str | None
    split: Split | None
    modality: Modality
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    source: str
    patient: str = ""
    labelled: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()
    in_split: bool = True

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)


@dataclass(frozen=True)
class Prepared:
    """A preprocessed dataset.

    spacing: (3,) mm that was asked for, None where every scan kept its own; 0 or below keeps an axis. orientation: of
    the array axes, such as "RAS". labels: value -> name, without the background. patients: who says of which
    patient a case is, None in folders of earlier versions.
    values: value of `labels` -> value that the dataset's label maps store and infer writes, written only where the two
    differ.
    """

    root: Path
    name: str
    spacing: tuple[float, float, float] | None
    orientation: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    cases: tuple[PreparedCase, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())
    ct_normalisation: CtNormalisation = PUBLISHED_WINDOW
    patients: PatientSource | None = None
    values: Mapping[int, int] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """Folder of the patch store."""
        return self.root / "store"

    def image_path(self, case: PreparedCase) -> Path:
        """File of the case's image."""
        return as_on_disk(self.root / case.image)

    def label_path(self, case: PreparedCase) -> Path | None:
        """File of the case's label map, None where it has none."""
        return None if case.label is None else as_on_disk(self.root / case.label)


def detect(folder: Path) -> bool:
    """Whether preprocess.py wrote this folder."""
    return (folder / DESCRIPTION).is_file() and (folder / "store").is_dir()


def load(folder: Path) -> Dataset:
    """The folder as a Dataset, to preprocess it once more."""
    prepared = read_prepared(folder)
    cases = tuple(
        Case(
            case.id,
            prepared.image_path(case),
            prepared.label_path(case),
            case.split,
            case.modality,
            case.patient,
            labelled=case.labelled,
            in_split=case.in_split,
        )
        for case in prepared.cases
    )
    return Dataset(
        prepared.name,
        prepared.channels,
        dict(prepared.labels),
        cases,
        prepared.skipped,
        notes=_of_no_case(prepared),
        patients=prepared.patients,
        values=dict(prepared.values),
    )


def _of_no_case(prepared: Prepared) -> tuple[str, ...]:
    """A note that names the scans which lie in the folder and are of no case; empty without any."""
    known = {one_form(path) for case in prepared.cases for path in (case.image, case.label) if path is not None}
    there = [f"{part}/{name}" for part in _PARTS for name in listing(prepared.root / part)[1] if suffix_of(name)]
    others = [path for path in there if one_form(path) not in known]
    return (f"of no case in {DESCRIPTION}, and left out: {listed(others)}",) if others else ()


def read_prepared(folder: Path) -> Prepared:
    """Read folder/dataset.json.

    Raises DatasetError: missing, damaged, of another version, with keys missing, or of a run that was stopped.
    """
    folder = local_path(folder)
    file = folder / DESCRIPTION
    content = read_json(file)
    if "unfinished" in content:
        raise DatasetError("preprocessing did not reach its end", file=file, action="Run preprocess.py again.")
    if content.get("version") != VERSION:
        found, action = f"version {content.get('version')!r}", "Run preprocess.py again."
        raise DatasetError(found, file=file, expected=f"version {VERSION} of {LOOKS_FOR}", action=action)
    try:
        spacing = content["spacing"]
        labels = label_names(content["labels"], file)
        return Prepared(
            root=folder,
            name=str(content["name"]),
            spacing=None if spacing is None else _three(spacing, float),
            orientation=str(content.get("orientation", "RAS")),
            channels=tuple(content["channels"]),
            labels=labels,
            cases=tuple(_case(entry) for entry in content["cases"]),
            skipped=tuple((entry["id"], entry["reason"]) for entry in content["skipped"]),
            ct_normalisation=ct_from_json(content.get("ct_scale")),
            patients=_patient_source(content.get("patients")),
            values=table_of_values(content.get("values"), file, labels),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        found = f"damaged ({type(error).__name__}: {error})"
        raise DatasetError(found, file=file, expected=LOOKS_FOR, action="Run preprocess.py again.") from error


def write_prepared(prepared: Prepared) -> None:
    """Write root/dataset.json, whole or not at all. Raises OutputError."""
    content = {
        "version": VERSION,
        "name": prepared.name,
        "spacing": prepared.spacing,
        "orientation": prepared.orientation,
        "channels": prepared.channels,
        "labels": {str(value): name for value, name in sorted(prepared.labels.items())},
        "cases": [_entry(case) for case in prepared.cases],
        "skipped": [{"id": case, "reason": reason} for case, reason in prepared.skipped],
    }
    if prepared.values:
        content["values"] = {str(value): stored for value, stored in sorted(prepared.values.items())}
    if (ct := ct_to_json(prepared.ct_normalisation)) is not None:
        content["ct_scale"] = ct
    if prepared.patients is not None:
        content["patients"] = prepared.patients
    write_json(prepared.root / DESCRIPTION, content)


def begin_prepared(root: Path, cases: Sequence[str]) -> None:
    """Write a root/dataset.json that no reader takes, until `write_prepared` replaces it at the end of the run.

    cases: ids of all that the folder may hold files of meanwhile. Raises OutputError.
    """
    write_json(root / DESCRIPTION, {"version": VERSION, "unfinished": list(cases)})


def cases_around(folder: Path) -> Prepared | None:
    """The preprocessed dataset whose images/ or labels/ a folder is, as links lead; None for any other folder.

    Raises DatasetError: see `read_prepared`.
    """
    place = Path(os.path.realpath(folder))
    return read_prepared(place.parent) if place.name in _PARTS and detect(place.parent) else None


def unlisted_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: why it is none} of the files that are of no case, where the folder is part of a preprocessed one.

    names: of files in `folder`. Raises DatasetError: see `read_prepared`.
    """
    prepared = cases_around(folder)
    if prepared is None:
        return {}
    key = _PARTS[Path(os.path.realpath(folder)).name]
    known = {one_form(Path(path).name) for path in (getattr(case, key) for case in prepared.cases) if path is not None}
    reason = f"of no case in {prepared.root / DESCRIPTION}, so it is left out. Move it elsewhere"
    return {name: f"{folder / name}: {reason}" for name in names if one_form(name) not in known}


def absent_images(folder: Path) -> dict[str, str]:
    """{case: reason} of the cases whose image should be in a folder, the images/ of a preprocessed one, and is not.

    Raises DatasetError: see `read_prepared`.
    """
    prepared = cases_around(folder)
    if prepared is None or Path(os.path.realpath(folder)).name != "images":
        return {}
    present = {one_form(name) for name in listing(folder)[1]}
    files = {case.id: Path(case.image) for case in prepared.cases if not Path(case.image).is_absolute()}
    reason = f"not found, which {DESCRIPTION} lists. Run preprocess again"
    return {
        case: f"{folder / file.name}: {reason}" for case, file in files.items() if one_form(file.name) not in present
    }


def split_cases(prepared: Prepared, seed: int = 0, hold_out: int = 5) -> tuple[list[str], list[str]]:
    """Ids to train on and ids to validate on.

    Held out are the cases marked "val"; without any, every `hold_out`-th patient in an order drawn from the seed, none
    for 0. Cases with split "test", without a label, or in no list of the dataset's split are in neither list; a single
    patient is trained on, not held out.
    """
    usable = [case for case in prepared.cases if case.label is not None and case.split != "test" and case.in_split]
    held_out = {case.id for case in usable if case.split == "val"}
    if not held_out and hold_out:
        patients = sorted({case.patient for case in usable if case.split != "val"})
        order = np.random.default_rng(seed).permutation(len(patients))
        chosen = {patients[i] for i in order[::hold_out]} if len(patients) > 1 else set()
        held_out = {case.id for case in usable if case.patient in chosen}
    return [case.id for case in usable if case.id not in held_out], [case.id for case in usable if case.id in held_out]


def _entry(case: PreparedCase) -> dict[str, Any]:
    entry = asdict(case)
    if case.patient == case.id:
        del entry["patient"]
    if case.labelled is None:
        del entry["labelled"]
    if not case.remarks:
        del entry["remarks"]
    if case.in_split:
        del entry["in_split"]
    return entry


def _case(entry: dict[str, Any]) -> PreparedCase:
    values = {key: entry[key] for key in _KEYS}
    if not isinstance(entry["id"], str):
        raise TypeError(f"case {entry['id']!r}")
    fault = fault_of_name(entry["id"])
    if fault:
        raise ValueError(f"case {entry['id']!r}: {fault}")
    values |= {"shape": _three(entry["shape"], int), "spacing": _three(entry["spacing"], float)}
    if entry["split"] not in (None, *get_args(Split)):
        raise ValueError(f"case {entry['id']!r}: split {entry['split']!r}, none of train, val, test, null")
    labelled = entry.get("labelled")
    return PreparedCase(
        **values,
        patient=entry.get("patient", ""),
        labelled=None if labelled is None else tuple(int(value) for value in labelled),
        remarks=tuple(entry.get("remarks", ())),
        in_split=entry.get("in_split", True) is not False,
    )


def _patient_source(value: Any) -> PatientSource | None:
    if value not in (None, *get_args(PatientSource)):
        raise ValueError(f"patients {value!r}")
    return value


def _three(values: Any, kind: type) -> Any:
    a, b, c = (kind(value) for value in values)
    return (a, b, c)
