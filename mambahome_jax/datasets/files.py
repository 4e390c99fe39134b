"""Names in folders, fast enough for tens of thousands of cases: one os.scandir a folder, no scan is opened."""

import codecs
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.files import NIFTI_SUFFIXES, suffix_of

# Bytes of a case's name: a file's has 255, of which suffixes and what marks a file as unfinished take some.
LONGEST = 200
# A folder with more subfolders than this has one a case, so a layout with few folders need not be looked for below it.
FEW = 32


def listing(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Visible subfolders and visible files of a folder, {name: path} each, sorted; empty where it is no folder.

    Names that begin with . or _ are left out: macOS puts ._<name> and __MACOSX beside the files of an archive.
    Raises DatasetError: the folder cannot be read.
    """
    folders: dict[str, Path] = {}
    files: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] in "._":
                    continue
                kind = _kind(entry)
                if kind is not None:
                    (folders if kind == "folder" else files)[entry.name] = folder / entry.name
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=folder) from error
    return dict(sorted(folders.items())), dict(sorted(files.items()))


def _kind(entry: os.DirEntry) -> str | None:
    """ "folder" or "file"; a link that leads nowhere is a file, which is then missing by name, not unseen."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)) else None  # noqa: PTH110
    except OSError:
        return "file"


def nifti_files(folder: Path) -> dict[str, Path]:
    """Visible NIfTI files of a folder by name without suffix, sorted; .nii.gz before a .nii of the same name."""
    return nifti_of(listing(folder)[1])


def nifti_of(files: dict[str, Path]) -> dict[str, Path]:
    """The NIfTI files among {name: path}, by name without suffix, sorted."""
    found: dict[str, Path] = {}
    for name in sorted(files, key=str.lower):
        if suffix := suffix_of(name, NIFTI_SUFFIXES):
            # Sorted, a.nii comes before a.nii.gz, which replaces it.
            found[name.removesuffix(suffix)] = files[name]
    return dict(sorted(found.items()))


def read_table(file: Path) -> list[str]:
    """Lines of a text file as spreadsheets and editors write it: UTF-8 or UTF-16 with or without its mark, else Latin.

    Raises OSError: the file cannot be read.
    """
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace").splitlines()
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        # What a spreadsheet in Western Europe saves; where it is something else, names in it are not found.
        return content.decode("cp1252", errors="replace").splitlines()


def nifti_stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(suffix_of(path.name, NIFTI_SUFFIXES))


def twins_note(used: Iterable[Path]) -> tuple[str, ...]:
    """A note that names the files which lie beside a used one of the same name as .nii and .nii.gz; empty without."""
    by_folder: dict[str, set[str]] = {}
    for path in used:
        folder, name = os.path.split(path)
        by_folder.setdefault(folder, set()).add(name)
    pairs = []
    for folder, names in by_folder.items():
        with contextlib.suppress(OSError):
            unused = set(os.listdir(folder or ".")) - names  # noqa: PTH208
            for name in names if unused else ():
                other = name[:-3] if name.lower().endswith(".gz") else f"{name}.gz"
                if other in unused and name[0] not in "._":
                    pairs.append(f"{os.path.join(folder, name)} is used, {other} is not")  # noqa: PTH118
    pairs.sort()
    count = f"{len(pairs)} files are there" if len(pairs) != 1 else "a file is there"
    return (f"{count} as .nii and as .nii.gz: {listed(pairs)}",) if pairs else ()


def outside_of(home: Path, paths: Iterable[Path]) -> list[str]:
    """Those of `paths` that lie outside of a folder once links are followed, in their order."""
    root = os.path.realpath(home)
    beneath: dict[str, bool] = {}
    found = []
    for path in map(str, paths):
        # A link by itself, else with its folder: following every part of every path takes longer than listing them.
        place = path if os.path.islink(path) else os.path.dirname(path)  # noqa: PTH114, PTH120
        if place not in beneath:
            beneath[place] = Path(os.path.realpath(place)).is_relative_to(root)
        if not beneath[place]:
            found.append(path)
    return found


def fault_of_name(name: str) -> str:
    """Why a case of that name cannot have files of its own in an output folder; empty where it can."""
    if not name or name in (".", "..") or set(name) & set("/\\"):
        return "a name that leads out of the folder; expected a file name"
    if not name.isprintable():
        return "a name with line breaks or other control characters; rename the file"
    size = len(os.fsencode(name))
    return f"a name of {size} bytes; expected at most {LONGEST}, as endings are added to it" if size > LONGEST else ""


def walk(folder: Path, depth: int, most: int | None = FEW) -> Iterator[tuple[Path, dict[str, Path], dict[str, Path]]]:
    """(folder, subfolders, files) of a folder and of those below it, down to `depth` levels, in order of name.

    most: subfolders of a folder that has more of them than this are not entered; None enters all.
    """
    folders, files = listing(folder)
    yield folder, folders, files
    if depth > 0 and (most is None or len(folders) <= most):
        for below in folders.values():
            yield from walk(below, depth - 1, most)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and that there are more."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
