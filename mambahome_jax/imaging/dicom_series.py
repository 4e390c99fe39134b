"""Which DICOM series a folder holds, by the first elements of its files."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_elements import identify
from mambahome_jax.imaging.formats import content_of, kind_in, kind_of
from mambahome_jax.support.files import hidden

# Levels below a folder in which the slices of a scan are looked for, as in <patient>/<study>/<series>/.
DEEPEST = 8
# Classes of objects that lie beside scans and hold no slices: DICOMDIR; raw data, segmentations, registrations, tables
# of values and surfaces; presentation states, reports and key images; structure sets, plans and doses of radiotherapy;
# what Siemens (CSA non-image) and Philips put into exports for their own programs.
_BESIDE = re.compile(
    r"1\.2\.840\.10008\.(1\.3\.10$|5\.1\.4\.1\.1\.(66|67|68|11|88|481|104|9)(\.|$))"
    r"|1\.3\.12\.2\.1107\.5\.9\.1$|1\.3\.46\.670589\.11\.0\.0\.12(\.|$)"
)


@dataclass(frozen=True)
class Series:
    """Files of one series in order of name. uid, number: SeriesInstanceUID and SeriesNumber, empty where not given."""

    uid: str
    number: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Contents:
    """What files are. beside: DICOM objects that hold no slices. unreadable: files, and why. others: not DICOM."""

    series: tuple[Series, ...]
    beside: tuple[Path, ...] = ()
    unreadable: tuple[tuple[Path, str], ...] = ()
    others: tuple[Path, ...] = ()


def holds_slices(folder: Path) -> bool:
    """Whether a folder has a DICOM file in it, by its name or its content."""
    return any(map(_is_dicom, files_in(folder)))


def has_series(folder: Path) -> bool:
    """Whether a folder holds slices itself, so that `contents_of` does not look below it."""
    return any(sort_out([path]).series for path in files_in(folder))


def is_scan(folder: Path) -> bool:
    """Whether a folder holds DICOM slices, itself or, where no scan file lies among them, in the folders below it."""
    return holds_slices(folder) or any(map(_is_dicom, files_below(folder)))


def contents_of(folder: Path) -> Contents:
    """What the files of a folder are, or, where it holds no slices, those of the folders below it. Raises DatasetError:
    a folder cannot be read."""
    contents = sort_out(files_in(folder))
    return contents if contents.series else sort_out(files_below(folder))


def sort_out(paths: Iterable[Path]) -> Contents:
    """Sort files by their series; only the first elements of each are read.

    A file that is DICOM by its name alone, or does not name its series, belongs to the only one that there is, else to
    one without a UID.
    """
    series: dict[str, list[Path]] = {}
    numbers: dict[str, str] = {}
    beside, unreadable, others = [], [], []
    for path in paths:
        try:
            identity = identify(path)
        except OSError as error:
            unreadable.append((path, f"{path}: cannot be read: {error.strerror or error}"))
            continue
        if identity is None and kind_of(path) != "slice":
            others.append(path)
        elif identity is not None and _BESIDE.match(identity.sop_class):
            beside.append(path)
        else:
            uid = "" if identity is None else identity.series
            series.setdefault(uid, []).append(path)
            numbers.setdefault(uid, "" if identity is None else identity.number)
    if "" in series and len(series) == 2:
        (uid,) = series.keys() - {""}
        series = {uid: sorted(series[uid] + series[""])}
    found = (Series(uid, numbers[uid], tuple(files)) for uid, files in series.items())
    return Contents(tuple(found), tuple(beside), tuple(unreadable), tuple(others))


def files_below(folder: Path) -> list[Path]:
    """Files of all folders below one that could be DICOM slices, sorted; none where a scan file lies among them.

    Raises DatasetError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=error.filename) from error

    found = []
    for home, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        deep = len(Path(home).relative_to(folder).parts) >= DEEPEST
        folders[:] = [] if deep else [name for name in folders if not hidden(name)]
        if any(kind_of(Path(name)) == "scan" and not hidden(name) for name in names):
            return []
        found += [path for name in names if not hidden(name) and _may_be_slice(path := Path(home, name))]
    return sorted(found)


def files_in(folder: Path) -> list[Path]:
    """Visible files that could be DICOM slices, sorted. Raises DatasetError: the folder cannot be read."""
    try:
        return sorted(
            path for path in folder.iterdir() if not hidden(path.name) and _may_be_slice(path) and path.is_file()
        )
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=folder) from error


def _may_be_slice(path: Path) -> bool:
    return kind_in(path) in ("slice", "unknown")


def _is_dicom(path: Path) -> bool:
    return kind_of(path) == "slice" or content_of(path) == "DICOM"
