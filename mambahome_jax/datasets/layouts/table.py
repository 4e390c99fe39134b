"""A CSV file of paths, for data in any other form: columns id, image, label, split, modality, patient."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import (
    Case,
    Dataset,
    PatientSource,
    Split,
    modality_of,
    optional_description,
    unlabelled_note,
)
from mambahome_jax.datasets.files import listed, listing, read_table
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_series import is_scan
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
_SPLITS: dict[str, Split | None] = {"": None, "train": "train", "val": "val", "test": "test"}
_MODALITIES: dict[str, Modality | None] = {"": None, "ct": "ct", "mr": "mr", "us": "us"}


def detect(path: Path) -> bool:
    """Whether the path is a CSV file, or a folder with cases.csv or dataset.csv."""
    return path.suffix.lower() == ".csv" if path.is_file() else any(name in listing(path)[1] for name in FILES)


def load(path: Path) -> Dataset:
    """One case a row. Several channels: their files in "image", separated by semicolons.

    A row that cannot be used (missing file, unknown split, an id twice) is skipped, and says why. Names
    of labels and channels: an optional dataset.json beside it.
    Raises DatasetError: no such file, not readable, no column "image", no usable row.
    """
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    labels, channels = optional_description(file.parent)
    cases: dict[str, Case] = {}
    skipped: list[tuple[str, str]] = []
    rows = _rows(file)
    for number, row in rows:
        try:
            case = _case(row, file, number, modality_of(channels))
            if case.id in cases:
                raise DatasetError(f"the id {case.id} a second time", file=f"{file}, line {number}")
        except DatasetError as error:
            skipped.append((row.get("id") or f"line {number}", str(error)))
        else:
            cases[case.id] = case
    if not cases:
        reason = f" ({skipped[0][1]})" if skipped else ""
        raise DatasetError(f"no usable row{reason}", file=file, expected=LOOKS_FOR)
    notes = unlabelled_note(cases.values())
    unread = [name for name in rows[0][1] if name not in _COLUMNS]
    notes += (f"columns of {file.name} that are not read: {listed(unread)}",) if unread else ()
    count = max(len(case.image_files) for case in cases.values())
    channels = channels or (("image",) if count == 1 else tuple(f"channel_{n}" for n in range(count)))
    name = file.stem if path.is_file() else own_name(path)
    source: PatientSource | None = "given" if any(row.get("patient") for _, row in rows) else None
    return Dataset(name, channels, labels, tuple(cases.values()), tuple(skipped), notes, patients=source)


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of each row; separated by commas, semicolons or tabs."""
    try:
        lines = read_table(file)
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=file, expected=LOOKS_FOR) from error
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=file) from error
    head = lines[0] if lines else ""
    # A semicolon may separate channels within a field, so it counts only where the names of the columns use it.
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    rows = []
    try:
        columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
        if "image" not in columns:
            raise DatasetError(f"columns {head!r}", file=file, expected='a first line that names a column "image"')
        reader.fieldnames = columns
        for row in reader:
            texts = {name: (text or "").strip() for name, text in row.items() if isinstance(text, str | None) and name}
            if any(texts.values()):
                rows.append((reader.line_num, texts))
    except csv.Error as error:
        # A quotation mark that nothing closes makes one field of all that follows.
        found = f"damaged near line {reader.line_num} ({error})"
        raise DatasetError(found, file=file, expected="a CSV file") from error
    return rows


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
    split, modality = row.get("split", "").lower(), row.get("modality", "").lower()
    if split not in _SPLITS:
        raise DatasetError(f"split {split!r}", file=where, expected="train, val, test or nothing")
    if modality not in _MODALITIES:
        raise DatasetError(f"modality {modality!r}", file=where, expected="ct, mr, us or nothing")
    name = one_form(row.get("id") or scan_stem(images[0]))
    if name[0] == "." or set(name) & set('/\\:*?"<>|'):
        raise DatasetError(f"id {name!r}", file=where, expected="a name that a file can have, not beginning with a dot")
    several = tuple(images) if len(images) > 1 else ()
    chosen = _MODALITIES[modality] or default
    return Case(name, images[0], label, _SPLITS[split], chosen, one_form(row.get("patient", "")), images=several)


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
