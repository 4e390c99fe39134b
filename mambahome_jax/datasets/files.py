"""Names in folders, fast enough for tens of thousands of cases: one os.scandir a folder, no scan is opened."""

import codecs
import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_series import files_below, files_in, has_series, is_scan
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, scan_stem, suffix_of
from mambahome_jax.support.files import hidden
from mambahome_jax.support.paths import fault_of_letters, one_form

# Bytes of a case's name: a file's has 255, of which suffixes and what marks a file as unfinished take some.
LONGEST = 200
# A folder with more subfolders than this has one a case, so a layout with few folders need not be looked for below it.
FEW = 32
_ONE_KIND = re.compile(r"(images|labels)(tr|va|ts)?", re.IGNORECASE)


def listing(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Visible subfolders and visible files of a folder, {name: path} each, sorted; empty where it is no folder.

    Letters of names are composed, as macOS and others store them differently; where both forms lie side by side, the
    second keeps its own. Paths are those on the disk.
    Dot files and __MACOSX are left out: macOS puts ._<name> and that folder into archives.
    Raises DatasetError: the folder cannot be read.
    """
    folders: dict[str, Path] = {}
    files: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                kind = _kind(entry)
                if kind is not None:
                    (folders if kind == "folder" else files)[entry.name] = folder / entry.name
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=folder) from error
    return _composed(folders), _composed(files)


def _composed(paths: dict[str, Path]) -> dict[str, Path]:
    """Paths by name, composed where that name is free, sorted."""
    names = {name: name if name.isascii() else one_form(name) for name in paths}
    return dict(sorted((name if new != name and new in paths else new, paths[name]) for name, new in names.items()))


def _kind(entry: os.DirEntry) -> str | None:
    """ "folder" or "file"; a link that leads nowhere is a file, which is then missing by name, not unseen."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)) else None  # noqa: PTH110
    except OSError:
        return "file"


def scan_files(folder: Path) -> dict[str, Path]:
    """Visible scan files of a folder by name without suffix, sorted; of one name in several formats the first of
    SCAN_SUFFIXES."""
    return scans_of(listing(folder)[1])


def scans_of(files: dict[str, Path]) -> dict[str, Path]:
    """The scan files among {name: path}, by name without suffix, sorted."""
    found: dict[str, Path] = {}
    ranks: dict[str, int] = {}
    for name, path in files.items():
        if suffix := suffix_of(name):
            stem, rank = name.removesuffix(suffix), SCAN_SUFFIXES.index(suffix.lower())
            if rank < ranks.get(stem, len(SCAN_SUFFIXES)):
                found[stem], ranks[stem] = path, rank
    return dict(sorted(found.items()))


def scans_in(folder: Path) -> dict[str, Path]:
    """`scan_files`, and subfolders of DICOM slices by their names, sorted."""
    slices = {name: path for name, path in listing(folder)[0].items() if is_scan(path)}
    return dict(sorted((slices | scan_files(folder)).items()))


def parts(path: Path) -> list[Path]:
    """The files that a scan consists of, sorted: those of a folder of slices, or of the folders below where it has
    none, without what is no scan by its name; a .mhd with its voxels, which lie beside it. Raises DatasetError: a
    folder that cannot be read."""
    if path.is_dir():
        return files_in(path) if has_series(path) else files_below(path)
    voxels = [path.with_suffix(suffix) for suffix in (".raw", ".zraw")] if path.suffix.lower() == ".mhd" else []
    return [path, *(file for file in voxels if file.is_file())]


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


def twins_note(used: Iterable[Path]) -> tuple[str, ...]:
    """A note that names the files which lie beside a used one of the same name in another format; empty without."""
    by_folder: dict[str, set[str]] = {}
    for path in used:
        folder, name = os.path.split(path)
        by_folder.setdefault(folder, set()).add(name)
    pairs = []
    for folder, names in by_folder.items():
        with contextlib.suppress(OSError):
            unused = set(os.listdir(folder or ".")) - names  # noqa: PTH208
            stems = {scan_stem(Path(name)): name for name in names} if unused else {}
            for other in unused:
                suffix = suffix_of(other)
                twin = stems.get(scan_stem(Path(other))) if suffix and not hidden(other) else None
                if twin:
                    pairs.append(f"{os.path.join(folder, twin)} is used, {other} is not")  # noqa: PTH118
    pairs.sort()
    count = f"{len(pairs)} files are there" if len(pairs) != 1 else "a file is there"
    return (f"{count} in two formats: {listed(pairs)}",) if pairs else ()


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
    if fault := fault_of_letters(name):
        return fault
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


def of_one_kind(name: str) -> bool:
    """Whether a folder of that name holds images alone, or label maps alone, whatever its files are called."""
    return _ONE_KIND.fullmatch(name) is not None


def plain(folder: Path) -> bool:
    """Whether images/ of a folder holds scans and labels/ scan files: the plain layout, whatever these are called."""
    folders = {name.lower(): path for name, path in listing(folder)[0].items()}
    if not ("images" in folders and "labels" in folders and scan_files(folders["labels"])):
        return False
    images = folders["images"]
    return bool(scan_files(images)) or any(map(is_scan, listing(images)[0].values()))


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and that there are more."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# nnU-Net's <case>_<channel>. Four digits may also be the number of the case itself, as in scan_0001.
CHANNEL = re.compile(r"(.+)_(\d{4})")


def by_channel(names: Collection[str]) -> dict[str, dict[int, str]]:
    """The names of each beginning by the number that ends them, {case: {0: <case>_0000}}; empty where one has none."""
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        match = CHANNEL.fullmatch(name)
        if match is None:
            return {}
        groups[match[1]][int(match[2])] = name
    return dict(groups)


def channels_of(names: Collection[str]) -> dict[str, list[str]]:
    """The names of each case in order of channel, {case: [<case>_0000, ...]}; empty where the endings are no channels.

    They are where every name has one and every case the same ones, from 0000 on. A single case of several files is
    taken for cases that are numbered themselves: scan_0000, scan_0001, ...
    """
    groups = by_channel(names)
    count = max(map(len, groups.values()), default=0)
    if count > 1 and len(groups) == 1:
        return {}
    complete = all(sorted(files) == list(range(count)) for files in groups.values())
    return {case: [files[number] for number in range(count)] for case, files in groups.items()} if complete else {}


def counterparts(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Name -> its name among `others`: the same, or one that differs in the ending _0000 alone.

    The ending counts as that of a channel only where no other name has the same beginning and another number.
    """
    pairs = {name: name for name in names if name in set(others)}
    left, right = (_first_channels(side, set(pairs)) for side in (names, others))
    for case in left.keys() & right.keys():
        if left[case] != right[case]:
            pairs[left[case]] = right[case]
    return {name: pairs[name] for name in names if name in pairs}


def common_name(name: str, other: str) -> str:
    """What two names of one case are called together: the one without the number of a channel."""
    return min(name, other, key=len)


def _first_channels(names: Collection[str], paired: set[str]) -> dict[str, str]:
    """Names by themselves, and those that end in _0000 without that where this means one name only."""
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := CHANNEL.fullmatch(name):
            numbered[match[1]].append(name)
    single = {case: files[0] for case, files in numbered.items() if files == [f"{case}_0000"] and case not in names}
    return {case: name for case, name in single.items() if name not in paired} | {
        name: name for name in names if name not in paired and name not in single.values()
    }
