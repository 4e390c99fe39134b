"""Names in folders, fast enough for tens of thousands of cases: one os.scandir a folder, no scan is opened."""

import codecs
import contextlib
import csv
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import files_below, files_in, has_series, is_scan
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, scan_stem, suffix_of
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import hidden, not_read
from mambahome_jax.support.paths import fault_of_letters, one_form

# Bytes of a case's name: a file's has 255, and suffixes and the mark of an unfinished file take some of them.
LONGEST = 200
# A folder with more subfolders has one a case, so no layout with few folders lies below it.
FEW = 32
_ONE_KIND = re.compile(r"(images|labels)(tr|va|ts)?", re.IGNORECASE)
# nnU-Net's <case>_<channel>. Four digits may also number the case itself, as in scan_0001.
CHANNEL = re.compile(r"(.+)_(\d{4})")


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Join the first few names, and say that there are more."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def listing(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """List the visible subfolders and files of a folder, {name: path} each, sorted; empty where it is no folder.

    Names are composed, as macOS and others store letters differently; paths are those on the disk. Raises DatasetError.
    """
    folders: dict[str, Path] = {}
    files: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                try:
                    # A link that leads nowhere is a file, which is then missing by name, not unseen.
                    if entry.is_dir():
                        folders[entry.name] = folder / entry.name
                    elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)):  # noqa: PTH110
                        files[entry.name] = folder / entry.name
                except OSError:
                    files[entry.name] = folder / entry.name
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except OSError as error:
        raise not_read(folder, error) from error
    return _composed(folders), _composed(files)


def _composed(paths: dict[str, Path]) -> dict[str, Path]:
    """Compose each name where no other has that form already, and sort."""
    names = {name: name if name.isascii() else one_form(name) for name in paths}
    return dict(sorted((name if new != name and new in paths else new, paths[name]) for name, new in names.items()))


def walk(folder: Path, depth: int) -> Iterator[tuple[Path, dict[str, Path], dict[str, Path]]]:
    """Yield (folder, subfolders, files) down to `depth` levels, but not below folders of more than FEW subfolders."""
    folders, files = listing(folder)
    yield folder, folders, files
    if depth > 0 and len(folders) <= FEW:
        for below in folders.values():
            yield from walk(below, depth - 1)


def case_folders(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the folders that are called so, in the folder and in its few subfolders."""
    for _, folders, _ in walk(folder, 1):
        yield from ((name, path) for name, path in folders.items() if pattern.fullmatch(name))


def scans_of(files: dict[str, Path]) -> dict[str, Path]:
    """Select the scan files of {name: path} by stem, sorted; of one stem the first format of SCAN_SUFFIXES."""
    suffixes = {name: suffix_of(name) for name in files}
    scans = sorted((name for name in files if suffixes[name]), key=lambda n: SCAN_SUFFIXES.index(suffixes[n].lower()))
    by_stem: dict[str, Path] = {}
    for name in scans:
        by_stem.setdefault(name.removesuffix(suffixes[name]), files[name])
    return dict(sorted(by_stem.items()))


def scan_files(folder: Path) -> dict[str, Path]:
    """List the visible scan files of a folder by stem, as `scans_of`."""
    return scans_of(listing(folder)[1])


def parts(path: Path) -> list[Path]:
    """List the files of a scan: slices in or below a folder, or a file and, of a .mhd, its voxels beside it."""
    if path.is_dir():
        return files_in(path) if has_series(path) else files_below(path)
    voxels = [path.with_suffix(suffix) for suffix in (".raw", ".zraw")] if path.suffix.lower() == ".mhd" else []
    return [path, *(file for file in voxels if file.is_file())]


def paired(files: dict[str, Path], image: str, label: str) -> dict[str, tuple[Path | None, Path | None]]:
    """Pair files called <case><image> and <case><label>, {case: (image, label)}, sorted; None where one is absent."""
    cases = {stem.removesuffix(end) for stem in files for end in (image, label) if stem.endswith(end)}
    return {case: (files.get(case + image), files.get(case + label)) for case in sorted(cases)}


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


class Table(NamedTuple):
    """A CSV file. head: its first line. columns: names in lower case. rows: (line, {column: text}), none empty."""

    head: str
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]


def read_table(file: Path, expected: str) -> Table:
    """Read a table as spreadsheets and editors write it, separated by commas, semicolons or tabs.

    Raises DatasetError: missing, unreadable or damaged; `expected` says what the file should be.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=file, expected=expected) from error
    except OSError as error:
        raise not_read(file, error) from error
    lines = _decoded(content).splitlines()
    head = lines[0] if lines else ""
    # A semicolon may separate channels within a field, so it counts only where the names of the columns use it.
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    rows = []
    try:
        reader.fieldnames = columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
        for row in reader:
            texts = {name: (text or "").strip() for name, text in row.items() if isinstance(text, str | None) and name}
            if any(texts.values()):
                rows.append((reader.line_num, texts))
    except csv.Error as error:
        # A quotation mark that nothing closes makes one field of all that follows.
        raise DatasetError(f"damaged near line {reader.line_num} ({error})", file=file, expected=expected) from error
    return Table(head, columns, rows)


def _decoded(content: bytes) -> str:
    """Decode UTF-8 or UTF-16 with or without its mark, else what a spreadsheet in Western Europe saves."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def by_folder(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Names of files by their folders. Strings, as the parents of 100,000 paths take seconds."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, name = os.path.split(path)
        names[folder or "."].add(name)
    return names


def twins_note(used: Iterable[Path]) -> tuple[str, ...]:
    """A note that names the files which lie beside a used one of the same name in another format; empty without."""
    pairs = []
    for folder, names in by_folder(used).items():
        with contextlib.suppress(OSError):
            unused = set(os.listdir(folder)) - names  # noqa: PTH208
            stems = {scan_stem(Path(name)): name for name in names} if unused else {}
            for other in unused:
                twin = stems.get(scan_stem(Path(other))) if suffix_of(other) and not hidden(other) else None
                if twin:
                    pairs.append(f"{os.path.join(folder, twin)} is used, {other} is not")  # noqa: PTH118
    count = f"{len(pairs)} files are there" if len(pairs) != 1 else "a file is there"
    return (f"{count} in two formats: {listed(sorted(pairs))}",) if pairs else ()


def dot_files_note(used: Iterable[Path]) -> tuple[str, ...]:
    """A note that names the dot files beside used ones that are scans by name, as macOS makes them; empty without."""
    paths = []
    for folder in by_folder(used):
        with contextlib.suppress(OSError):
            names = os.listdir(folder)  # noqa: PTH208
            paths += [os.path.join(folder, name) for name in names if name.startswith(".") and suffix_of(name)]  # noqa: PTH118
    return (f"{counted(len(paths), 'dot file', 'are')} left out: {listed(sorted(paths))}",) if paths else ()


def outside_of(home: Path, paths: Iterable[Path]) -> list[str]:
    """Those of `paths` that lie outside of a folder once links are followed, in their order."""
    root = os.path.realpath(home)
    within: dict[str, bool] = {}
    outside = []
    for path in map(str, paths):
        # A link by itself, else with its folder: following every part of every path takes longer than listing them.
        place = path if os.path.islink(path) else os.path.dirname(path)  # noqa: PTH114, PTH120
        if place not in within:
            within[place] = Path(os.path.realpath(place)).is_relative_to(root)
        if not within[place]:
            outside.append(path)
    return outside


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


def printable(name: str) -> str:
    """The name, with escapes for what a file cannot be called."""
    return repr(name)[1:-1] if fault_of_name(name) else name


def by_channel(names: Collection[str]) -> dict[str, dict[int, str]]:
    """Group names <case>_<channel> as {case: {0: <case>_0000}}; empty where one has no such number."""
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        match = CHANNEL.fullmatch(name)
        if match is None:
            return {}
        groups[match[1]][int(match[2])] = name
    return dict(groups)


def channels_of(names: Collection[str]) -> dict[str, list[str]]:
    """The names of each case in order of channel, {case: [<case>_0000, ...]}; empty where the endings are no channels.

    They are where every name has one and every case the same ones, from 0000 on. Several files of a single case are
    taken for cases that are numbered themselves: scan_0000, scan_0001, ...
    """
    groups = by_channel(names)
    count = max(map(len, groups.values()), default=0)
    if (count > 1 and len(groups) == 1) or any(sorted(files) != list(range(count)) for files in groups.values()):
        return {}
    return {case: [files[number] for number in range(count)] for case, files in groups.items()}


def counterparts(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Match each name with one of `others`: the same, or one that differs in the ending _0000 alone.

    The ending counts as that of a channel only where no other name has the same beginning and another number.
    """
    pairs = {name: name for name in names if name in set(others)}
    left, right = (_first_channels(side, pairs.keys()) for side in (names, others))
    pairs |= {left[case]: right[case] for case in left.keys() & right.keys() if left[case] != right[case]}
    return {name: pairs[name] for name in names if name in pairs}


def _first_channels(names: Collection[str], paired: Collection[str]) -> dict[str, str]:
    """Names that are not paired yet by what they may be called: themselves, or their beginning before a lone _0000."""
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := CHANNEL.fullmatch(name):
            numbered[match[1]].append(name)
    single = {case: files[0] for case, files in numbered.items() if files == [f"{case}_0000"] and case not in names}
    return {case: name for case, name in single.items() if name not in paired} | {
        name: name for name in names if name not in paired and name not in single.values()
    }


def common_name(name: str, other: str) -> str:
    """What two names of one case are called together: the one without the number of a channel."""
    return min(name, other, key=len)
