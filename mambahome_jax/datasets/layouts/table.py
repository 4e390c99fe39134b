"""A CSV file of paths, for data in any other form: columns id, image, label, split, modality, patient."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset, Split, dataset_of, modality_of, optional_description
from mambahome_jax.datasets.files import listed, listing, read_table
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import is_scan
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, alternatives, kind_of, reason_of, scan_stem, suffix_of
from mambahome_jax.support.paths import one_form, own_name, path_in

NAME = "csv"
LOOKS_FOR = (
    "a CSV file (itself, or a folder with cases.csv or dataset.csv) with the column image and any of id, label, split, "
    "modality, patient; paths relative to the file"
)
COVERS: tuple[str, ...] = ("images_labels", "published")
FILES = ("cases.csv", "dataset.csv")

_COLUMNS = ("id", "image", "label", "split", "modality", "patient")
_CHOICES = {"split": get_args(Split), "modality": get_args(Modality)}


def detect(path: Path) -> bool:
    """Whether the path is a CSV file, or a folder with cases.csv or dataset.csv."""
    return path.suffix.lower() == ".csv" if path.is_file() else any(name in listing(path)[1] for name in FILES)


def load(path: Path) -> Dataset:
    """One case a row. Several channels: their files in "image", separated by semicolons.

    A row that cannot be used (missing file, unknown split, an id twice) is skipped, and says why. Names of labels and
    channels: an optional dataset.json beside it.
    Raises DatasetError: no such file, not readable, no column "image", no usable row.
    """
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    labels, channels = optional_description(file.parent)
    table = read_table(file, LOOKS_FOR)
    if "image" not in table.columns:
        raise DatasetError(f"columns {table.head!r}", file=file, expected='a first line that names a column "image"')
    cases: dict[str, Case] = {}
    skipped: list[tuple[str, str]] = []
    for number, row in table.rows:
        try:
            case = _case(row, file, number, modality_of(channels))
            if case.id in cases:
                raise DatasetError(f"the id {case.id} a second time", file=f"{file}, line {number}")
            cases[case.id] = case
        except DatasetError as error:
            skipped.append((row.get("id") or f"line {number}", str(error)))
    unread = [name for name in table.columns if name not in _COLUMNS]
    return dataset_of(
        *(cases.values(), skipped, file, LOOKS_FOR, "no usable row"),
        name=file.stem if path.is_file() else own_name(path),
        channels=channels,
        labels=labels,
        notes=[f"columns of {file.name} that are not read: {listed(unread)}"] if unread else [],
        patients="given" if any(row.get("patient") for _, row in table.rows) else None,
    )


def _case(row: Mapping[str, str], file: Path, number: int, default: Modality | None) -> Case:
    """Raises DatasetError: what is wrong with the row."""
    where = f"{file}, line {number}"
    images = [_located(file.parent, part.strip()) for part in row["image"].split(";") if part.strip()]
    label = _located(file.parent, row["label"]) if row.get("label") else None
    if not images:
        raise DatasetError("no image", file=where, expected="a path")
    for path in [*images, *([label] if label else [])]:
        if path != label and _is(path, Path.is_dir) and is_scan(path):
            continue
        if not suffix_of(path.name) and (path.suffix or _is(path, Path.exists)):
            expected = f"{alternatives(SCAN_SUFFIXES)}; of an image also a folder of DICOM slices"
            action = reason_of(path) if kind_of(path) == "foreign" else None
            raise DatasetError(f"{path} is no scan by its name", file=where, expected=expected, action=action)
        if not _is(path):
            raise DatasetError(f"{path} not found", file=where, expected="a path relative to the CSV file")
    chosen = {column: row.get(column, "").lower() or None for column in _CHOICES}
    for column, word in chosen.items():
        if word not in (None, *_CHOICES[column]):
            raise DatasetError(f"{column} {word!r}", file=where, expected=f"{', '.join(_CHOICES[column])} or nothing")
    name = one_form(row.get("id") or scan_stem(images[0]))
    if name[0] == "." or set(name) & set('/\\:*?"<>|'):
        raise DatasetError(f"id {name!r}", file=where, expected="a name that a file can have, not beginning with a dot")
    return Case(
        id=name,
        image=images[0],
        label=label,
        split=chosen["split"],  # type: ignore[arg-type]
        modality=chosen["modality"] or default,  # type: ignore[arg-type]
        patient=one_form(row.get("patient", "")),
        images=tuple(images) if len(images) > 1 else (),
    )


def _located(folder: Path, text: str) -> Path:
    """The file that a path in the table means, which may be written as on Windows."""
    path = path_in(folder, text)
    return path if "\\" not in text or _is(path, Path.exists) else path_in(folder, text.replace("\\", "/"))


def _is(path: Path, kind: Callable[[Path], bool] = Path.is_file) -> bool:
    try:
        return kind(path)
    except OSError:
        # A name that is longer than any file's.
        return False
