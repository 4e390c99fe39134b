"""A folder that preprocess.py wrote: images/, labels/, store/ and dataset.json."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mambahome_jax.config import Modality, Resampling
from mambahome_jax.datasets.base import Case, Dataset, PatientSource, Split, label_names
from mambahome_jax.datasets.files import fault_of_name, listed, listing
from mambahome_jax.datasets.structures import table_of_values
from mambahome_jax.errors import DatasetError
from mambahome_jax.forms import entries
from mambahome_jax.imaging.formats import suffix_of
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation, ct_from_json, ct_to_json
from mambahome_jax.support.files import read_json, write_json
from mambahome_jax.support.paths import as_on_disk, local_path, one_form

NAME = "prepared"
LOOKS_FOR = "dataset.json with store/ (a folder that preprocess.py wrote)"
COVERS: tuple[str, ...] = ("images_labels", "decathlon", "nnunet_raw")
VERSION = 1
DESCRIPTION = "dataset.json"

# Folders of the cases' files, and the keys of dataset.json that name them.
_PARTS = {"images": "image", "labels": "label"}
_REQUIRED = ("id", "image", "label", "split", "modality", "shape", "spacing", "source")


@dataclass(frozen=True)
class PreparedCase:
    """One entry of "cases" in dataset.json; fields with a default are written only where they differ from it.

    image, label: paths, relative to the folder where the file lies in it. shape: (D, H, W) voxels and spacing: (3,) mm
    after resampling. source: the image file that the user gave, with its folder's name. remarks: what was dealt with,
    such as masks that overlap. patient, labelled, in_split, fold: see `Case`.
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
    fold: int | None = None

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)


@dataclass(frozen=True)
class Prepared:
    """A preprocessed dataset.

    spacing: (3,) mm that was asked for, None where every scan kept its own; 0 or below keeps an axis. orientation: of
    the array axes, such as "RAS". patients: None in folders of earlier versions. labels, values: see `Dataset`; infer
    writes the stored values. resampling: of the images.
    """

    root: Path
    name: str
    spacing: tuple[float, float, float] | None
    orientation: str
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    cases: tuple[PreparedCase, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    ct_normalisation: CtNormalisation = PUBLISHED_WINDOW
    patients: PatientSource | None = None
    values: Mapping[int, int] = field(default_factory=dict)
    resampling: Resampling = "linear"

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
    cases = [
        Case(
            *(case.id, prepared.image_path(case), prepared.label_path(case), case.split, case.modality, case.patient),
            labelled=case.labelled,
            in_split=case.in_split,
            fold=case.fold,
        )
        for case in prepared.cases
    ]
    known = {one_form(path) for case in prepared.cases for path in (case.image, case.label) if path is not None}
    scans = [f"{part}/{name}" for part in _PARTS for name in listing(prepared.root / part)[1] if suffix_of(name)]
    others = [path for path in scans if one_form(path) not in known]
    notes = (f"of no case in {DESCRIPTION}, and left out: {listed(others)}",) if others else ()
    fields = (prepared.name, prepared.channels, dict(prepared.labels), tuple(cases), prepared.skipped, notes)
    return Dataset(*fields, patients=prepared.patients, values=dict(prepared.values))


def read_prepared(folder: Path) -> Prepared:
    """Read folder/dataset.json.

    Raises DatasetError: missing, damaged, of another version, with keys missing, or of a run that was stopped.
    """
    folder = local_path(folder)
    file = folder / DESCRIPTION
    action = "Run preprocess.py again."
    content = read_json(file)
    if "unfinished" in content:
        raise DatasetError("preprocessing did not reach its end", file=file, action=action)
    if content.get("version") != VERSION:
        expected = f"version {VERSION} of {LOOKS_FOR}"
        raise DatasetError(f"version {content.get('version')!r}", file=file, expected=expected, action=action)
    try:
        labels = label_names(content["labels"], file)
        return Prepared(
            root=folder,
            name=str(content["name"]),
            spacing=None if content["spacing"] is None else entries(float, 3)(content["spacing"]),
            orientation=str(content.get("orientation", "RAS")),
            channels=tuple(content["channels"]),
            labels=labels,
            cases=tuple(map(_read_case, content["cases"])),
            skipped=tuple((entry["id"], entry["reason"]) for entry in content["skipped"]),
            ct_normalisation=ct_from_json(content.get("ct_scale")),
            patients=_one_of(get_args(PatientSource), content.get("patients"), "patients"),
            values=table_of_values(content.get("values"), file, labels),
            resampling=_one_of(get_args(Resampling), content.get("resampling"), "resampling") or "linear",
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"damaged ({type(error).__name__}: {error})"
        raise DatasetError(problem, file=file, expected=LOOKS_FOR, action=action) from error


def _read_case(entry: dict[str, Any]) -> PreparedCase:
    """A case of its entry. Raises KeyError, TypeError, ValueError or OverflowError: damaged."""
    name, labelled = entry["id"], entry.get("labelled")
    if not isinstance(name, str):
        raise TypeError(f"case {name!r}")
    if fault := fault_of_name(name):
        raise ValueError(f"case {name!r}: {fault}")
    _one_of(get_args(Split), entry["split"], f"case {name!r}: split")
    return PreparedCase(
        **{key: entry[key] for key in _REQUIRED}
        | {"shape": entries(int, 3)(entry["shape"]), "spacing": entries(float, 3)(entry["spacing"])},
        patient=entry.get("patient", ""),
        labelled=None if labelled is None else tuple(map(int, labelled)),
        remarks=tuple(entry.get("remarks", ())),
        in_split=entry.get("in_split", True) is not False,
        fold=None if entry.get("fold") is None else int(entry["fold"]),
    )


def _one_of(words: Sequence[str], value: Any, name: str) -> Any:
    if value not in (None, *words):
        raise ValueError(f"{name} {value!r}, none of {', '.join(words)}, null")
    return value


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
    optional = {
        "values": {str(value): stored for value, stored in sorted(prepared.values.items())},
        "ct_scale": ct_to_json(prepared.ct_normalisation),
        "patients": prepared.patients,
        "resampling": prepared.resampling if prepared.resampling != "linear" else None,
    }
    write_json(prepared.root / DESCRIPTION, content | {key: value for key, value in optional.items() if value})


def _entry(case: PreparedCase) -> dict[str, Any]:
    default = {"patient": case.id, "labelled": None, "remarks": (), "in_split": True, "fold": None}
    return {key: value for key, value in asdict(case).items() if key in _REQUIRED or value != default[key]}


def begin_prepared(root: Path, cases: Sequence[str]) -> None:
    """Write a root/dataset.json that no reader takes, until `write_prepared` replaces it at the end of the run.

    cases: ids of all that the folder may hold files of meanwhile. Raises OutputError.
    """
    write_json(root / DESCRIPTION, {"version": VERSION, "unfinished": list(cases)})


def _files_of_part(folder: Path) -> tuple[str, dict[str, Path]] | None:
    """dataset.json, and {case: file}, where a folder is images/ or labels/ of a preprocessed dataset, as links lead."""
    place = Path(os.path.realpath(folder))
    if place.name not in _PARTS or not detect(place.parent):
        return None
    prepared = read_prepared(place.parent)
    paths = {case.id: getattr(case, _PARTS[place.name]) for case in prepared.cases}
    return str(prepared.root / DESCRIPTION), {case: Path(path) for case, path in paths.items() if path is not None}


def unlisted_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: why it is none} of the files `names` of no case, where the folder is part of a preprocessed dataset."""
    part = _files_of_part(folder)
    if part is None:
        return {}
    description, files = part
    known = {one_form(path.name) for path in files.values()}
    reason = f"of no case in {description}, so it is left out. Move it elsewhere"
    return {name: f"{folder / name}: {reason}" for name in names if one_form(name) not in known}


def absent_images(folder: Path) -> dict[str, str]:
    """{case: reason} of the cases whose image should be in a folder, the images/ of a preprocessed one, and is not."""
    part = _files_of_part(folder)
    if part is None or Path(os.path.realpath(folder)).name != "images":
        return {}
    present = {one_form(name) for name in listing(folder)[1]}
    reason = f"not found, which {DESCRIPTION} lists. Run preprocess again"
    files = {case: file.name for case, file in part[1].items() if not file.is_absolute()}
    return {case: f"{folder / name}: {reason}" for case, name in files.items() if one_form(name) not in present}


def usable_cases(prepared: Prepared) -> list[PreparedCase]:
    """The cases that a training may use: with a label, not to test on, and in a list of the dataset's split."""
    return [case for case in prepared.cases if case.label is not None and case.split != "test" and case.in_split]


def split_cases(prepared: Prepared, seed: int = 0, hold_out: int = 5) -> tuple[list[str], list[str]]:
    """Choose ids to train on and ids to validate on.

    Held out are the cases marked "val"; without any, every `hold_out`-th patient in an order drawn from the seed, none
    for 0. Cases with split "test", without a label, or in no list of the dataset's split are in neither list; a single
    patient is trained on, not held out.
    """
    usable = usable_cases(prepared)
    held_out = {case.id for case in usable if case.split == "val"}
    if not held_out and hold_out:
        patients = sorted({case.patient for case in usable})
        order = np.random.default_rng(seed).permutation(len(patients))
        chosen = {patients[i] for i in order[::hold_out]} if len(patients) > 1 else set()
        held_out = {case.id for case in usable if case.patient in chosen}
    return [case.id for case in usable if case.id not in held_out], [case.id for case in usable if case.id in held_out]
