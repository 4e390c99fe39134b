"""Every scan in a folder and below it; whatever else could be one has a reason why it is not read, or is of no case."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import LONGEST, by_folder, listed, listing, of_one_kind
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import DEEPEST, Series, is_scan, sort_out
from mambahome_jax.imaging.formats import (
    SCAN_SUFFIXES,
    content_of,
    foreign_stem,
    kind_in,
    reason_of,
    scan_stem,
    without_second_halves,
)
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import hidden
from mambahome_jax.support.paths import own_name

_LABELS = re.compile(r"(labels?|masks?|segs?|segmentations?)(tr|va|ts)?", re.IGNORECASE)
_DRAWN = re.compile(r"(?:(.*)[ ._-])?(?:labels?|masks?|segs?|segmentations?)", re.IGNORECASE)
# What is met in folders and is no scan.
_NO_SCANS = {
    "dicom": "DICOM files that hold no slices (reports, segmentations, plans and the like)",
    "labels": "folders of label maps by their names, which are no scans to segment",
    "drawn": "label maps by their names, no scans to segment (to train on them, list image and label of each case in a "
    "CSV file)",
    "outputs": "folders of results or of preprocessed cases",
}
Parts = tuple[str, ...]
Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """A scan and its name, unique among those of the search.

    path: a file, or a folder of DICOM slices. series: SeriesInstanceUID of slices. one_of_several: whether the folder
    holds slices of other series too, so that the series has to be named to the reader. depth: levels below the folder.
    """

    name: str
    path: Path
    series: str = ""
    one_of_several: bool = False
    depth: int = 0


@dataclass(frozen=True)
class Search:
    """What a folder holds.

    failures: (name, reason) of what could be a scan and is not read. notes: what is no scan.
    alike: scans that are failures because their names would be one, by that name.
    """

    scans: tuple[Candidate, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    alike: Mapping[str, Sequence[Candidate]] = field(default_factory=dict)


def of_labels(name: str) -> bool:
    """Whether a folder says by its name that it holds no scans but what was drawn on them."""
    return _LABELS.fullmatch(name) is not None


def is_output(folder: Path) -> bool:
    """Whether a folder holds results of an earlier run, or preprocessed cases."""
    try:
        return _of_a_run(*listing(folder))
    except DatasetError:
        # Said by what looks into it.
        return False


def _of_a_run(folders: Collection[str], files: Collection[str]) -> bool:
    return "run.json" in files or ("dataset.json" in files and "store" in folders)


class _Files(NamedTuple):
    """Paths sorted by what they are. failures: what could be a scan and is not read, and why. beside: DICOM objects."""

    scans: list[Path]
    series: tuple[Series, ...]
    beside: tuple[Path, ...]
    failures: list[tuple[Path, str]]
    folders: list[Path]


def _sort(paths: Iterable[Path]) -> _Files:
    """Sort paths by their names; what these do not tell is opened."""
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_kind[kind_in(path)].append(path)
    unknown = by_kind["slice"] + by_kind["unknown"]
    folders = {path for path in unknown if path.is_dir()}
    contents = sort_out(sorted(path for path in unknown if path not in folders and path.is_file()))
    failures = [(path, reason_of(path)) for path in without_second_halves(by_kind["foreign"])]
    failures += contents.unreadable
    failures += [(path, reason_of(path, content)) for path in contents.others if (content := content_of(path))]
    return _Files(by_kind["scan"], contents.series, contents.non_images, failures, sorted(folders))


def search(folder: Path, leave: Collection[Path] = (), deepest: int = DEEPEST) -> Search:
    """Look through a folder and those below it; only files whose names say nothing, and DICOM slices, are opened.

    Scans are named after their file, those of subfolders <folder>_<file>; slices after the folders alone, with the
    number or the end of the UID of the series where a folder holds several, never by what DICOM says of a patient.
    leave: folders not to enter. deepest: levels to go down.
    """
    met: dict[str, list[Any]] = defaultdict(list)
    for kind, entry in _walk(folder, (), frozenset(), {os.path.realpath(path) for path in leave}, deepest):
        met[kind].append(entry)
    scans, alike = _named(met["scan"])
    collisions = []
    for name, candidates in alike.items():
        several = " and ".join(candidate.path.name for candidate in candidates)
        collisions.append((name, f"the results of {several} would have one name, {name}. Rename one of them"))
    notes = (
        f"passed over, {len(met[kind])} {what}: {listed(met[kind])}" for kind, what in _NO_SCANS.items() if met[kind]
    )
    return Search(scans, (*met["failure"], *collisions), tuple(notes), alike)


def _walk(
    folder: Path, parts: Parts, above: frozenset[tuple[int, int]], leave: Collection[str], deepest: int
) -> Iterator[tuple[str, Any]]:
    """Yield ("scan", (parts of its name, Candidate)), ("failure", (name, reason)) or a key of _NO_SCANS with a path.

    parts: of names of scans there. above: folders that a link may lead back to. leave: real paths.
    """
    try:
        folders, files = listing(folder)
        status = folder.stat()
    except (DatasetError, OSError) as error:
        reason = str(error) if isinstance(error, DatasetError) else f"{folder}: cannot be read: {error.strerror}"
        yield "failure", ("_".join(parts) or own_name(folder), reason)
        return
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    if parts and _of_a_run(folders, files):
        yield "outputs", "/".join(parts)
        return
    kinds = _sort(files.values())
    stems = [scan_stem(path) for path in kinds.scans]
    for path in kinds.scans:
        if _drawn_on(scan_stem(path), stems):
            yield "drawn", "/".join((*parts, path.name))
            continue
        words = (*parts, scan_stem(path))
        yield "scan", (words, Candidate(_joined(words, "_"), path, depth=len(parts)))
    for path, reason in kinds.failures:
        yield "failure", ("_".join((*parts, foreign_stem(path))), reason)
    for path in kinds.beside:
        yield "dicom", "/".join((*parts, path.name))
    for one, tail in zip(kinds.series, _tails(kinds.series), strict=True):
        words = (*(parts or (own_name(folder),)), *((tail,) if tail else ()))
        yield "scan", (words, Candidate(_joined(words, "_"), folder, one.uid, len(kinds.series) > 1, len(parts)))
    for name, path in folders.items():
        below = (*parts, name)
        if of_labels(name):
            yield "labels", "/".join(below)
        elif os.path.realpath(path) not in leave and len(parts) < deepest:
            yield from _walk(path, below, above | {place}, leave, deepest)
        elif os.path.realpath(path) not in leave and deepest:
            reason = f"{path}: more than {deepest} folders down, so it is not looked into. Name it itself"
            yield "failure", ("_".join(below), reason)


def _drawn_on(stem: str, stems: Iterable[str]) -> bool:
    """Whether a file says by its name that it was drawn on another one of its folder, as p1_seg or seg on p1."""
    match = _DRAWN.fullmatch(stem)
    return match is not None and any(
        other.startswith(match[1] or "") and not _DRAWN.fullmatch(other) for other in stems
    )


def _tails(series: Sequence[Series]) -> list[str]:
    """What tells series of one folder apart, each in a name of its own; empty where there is one."""
    if len(series) < 2:
        return [""] * len(series)
    numbers = [one.number for one in series]
    if all(numbers) and len(set(numbers)) == len(numbers):
        return numbers
    words = [one.uid.split(".") if one.uid else ["unnamed"] for one in series]
    ends = ([".".join(part[-count:]) for part in words] for count in range(1, max(map(len, words)) + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def _named(scans: Sequence[tuple[Parts, Candidate]]) -> tuple[tuple[Candidate, ...], dict[str, list[Candidate]]]:
    """The scans with their names, and those left out whose names would be one, by that name."""
    by_name: dict[str, list[tuple[Parts, Candidate]]] = defaultdict(list)
    for parts, candidate in scans:
        by_name[candidate.name].append((parts, candidate))
    named: list[Candidate] = []
    left_out: dict[str, list[Candidate]] = {}
    for name, group in by_name.items():
        # a_b/c and a/b_c are told apart by a longer mark between folders.
        longer: dict[str, list[Candidate]] = defaultdict(list)
        for parts, candidate in group:
            longer[name if len(group) == 1 else _joined(parts, "__")].append(candidate)
        for other, alike in longer.items():
            if len(alike) == 1 and (other == name or other not in by_name):
                named.append(replace(alike[0], name=other))
            else:
                left_out[other] = alike
    return tuple(named), left_out


def _joined(parts: Parts, mark: str) -> str:
    """One name of several parts; a long one keeps its beginning and a digest of it all."""
    name = mark.join(parts)
    if len(parts) == 1 or len(os.fsencode(name)) <= LONGEST:
        return name
    digest = hashlib.sha256(os.fsencode("/".join(parts))).hexdigest()[:8]
    return os.fsencode(name)[: LONGEST - 9].decode("utf-8", "ignore") + f"_{digest}"


def unseen(
    root: Path, cases: Collection[Case], known: Collection[str], expected: str, *, unlisted: bool = True
) -> tuple[Failures, list[str]]:
    """(name, reason) of what should be a case, and paths of what lies beside cases that have all that they need.

    Looks beside the files of the cases, with one listing a folder; only files whose names say nothing are opened. In a
    folder of many images whatever could be another one should be a case; where each case has a folder, every folder.
    known: ids that are accounted for. expected: of the layout, for people. unlisted: False where the layout itself says
    which readable files it leaves out.
    """
    used = by_folder(path for case in cases for path in (*case.image_files, *case.label_files))
    images = Counter(folder for case in cases for folder in by_folder(case.image_files))
    leftovers = _Leftovers(used, expected, known if unlisted else None)
    for folder in used:
        home = Path(folder)
        if folder in images:
            leftovers.beside_images(home, images[folder] > 1 or of_one_kind(home.name))
        else:
            leftovers.beside_labels(home)
    leftovers.around(root, known)
    return leftovers.skipped, leftovers.noted


def misplaced(path: Path, expected: str) -> tuple[str, str]:
    """(name, reason) of a scan that lies beside the folders of a dataset."""
    name = foreign_stem(path) if kind_in(path) == "foreign" else scan_stem(path)
    return name, f"{path}: of no case, as it lies beside their folders; expected {expected}"


@dataclass
class _Leftovers:
    """used: files of cases by folder. known: ids that the layout skips, None where it says so of all files itself."""

    used: Mapping[str, set[str]]
    expected: str
    known: Collection[str] | None
    skipped: Failures = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.above: set[str] = set()
        for folder in self.used:
            while folder not in self.above:
                self.above.add(folder)
                folder = os.path.dirname(folder)  # noqa: PTH120

    def unused(self, folder: Path) -> list[Path]:
        """Visible files and folders that are of no case."""
        try:
            names = set(os.listdir(folder)) - self.used.get(str(folder), set())  # noqa: PTH208
        except OSError:
            # Said by what reads the folder.
            return []
        paths = (folder / name for name in sorted(names) if not hidden(name))
        return [path for path in paths if str(path) not in self.above]

    def beside_images(self, home: Path, many: bool) -> None:
        """Look for scans of no case beside images. many: whether each file should be of a case."""
        files = _sort(self.unused(home))
        for path in files.scans:
            stem = scan_stem(path)
            # Another form of a case's file is noted elsewhere.
            of_known = self.known is None or any(stem == one or stem.startswith(f"{one}_") for one in self.known)
            if of_known or self._form_of_used(path, stem):
                continue
            if many:
                self.skipped.append((stem, f"{path}: of no case by its name; expected {self.expected}"))
            else:
                self.noted.append(str(path))
        self._note(files.failures)
        if slices := [path for one in files.series for path in one.paths]:
            reason = (
                f"{home}: {counted(len(slices), 'DICOM slice', 'lie')} among other files, {slices[0].name} the first"
            )
            self.skipped.append((home.name, f"{reason}. Move those of each scan to a folder of its own"))
        for path in files.folders:
            if not of_labels(path.name):
                self._folder(path, many)

    def beside_labels(self, home: Path) -> None:
        """Look for label maps of no case, other formats and DICOM; what else lies there is of no scan."""
        files = _sort(self.unused(home))
        self._note(files.failures)
        slices = [*files.beside, *(path for one in files.series for path in one.paths)]
        for folder in files.folders if of_one_kind(home.name) else ():
            if is_scan(folder):
                slices.append(folder)
            elif scans := search(folder).scans:
                names = listed((one.path.name for one in scans), 3)
                self.skipped.append((folder.name, f"{folder}: label maps of no case ({names}). Move them to {home}"))
        reason = "DICOM, which is not read as a label map. Convert it to a file, for example .nii.gz"
        self.skipped += [(path.stem, f"{path}: {reason}") for path in slices]

    def around(self, root: Path, known: Collection[str]) -> None:
        """Look for parts of the dataset and other folders without a file of a case, and scans beside its folders."""
        paths = self.unused(root) if root.is_dir() else []
        parts = [path for path in paths if of_one_kind(path.name) and path.is_dir()]
        for path in parts:
            if path.name.lower().startswith("images"):
                self.beside_images(path, True)
            else:
                self.beside_labels(path)
        for path in paths:
            name = path.name
            # Cases of a folder of several are called <folder>_<rest>.
            if any(one == name or one.startswith(f"{name}_") for one in known):
                if name in known and path.is_dir():
                    self.skipped += [(f"{name}_{other}", reason) for other, reason in search(path).failures]
            elif str(root) not in self.used and path.is_file() and kind_in(path) in ("scan", "foreign"):
                self.skipped.append(misplaced(path, self.expected))
            elif path.is_dir() and not of_labels(name) and not of_one_kind(name):
                self._folder(path)

    def _note(self, failures: Iterable[tuple[Path, str]]) -> None:
        """Note files that are not read; another form of a case's file only lies beside it."""
        for path, reason in failures:
            name = foreign_stem(path)
            if self._form_of_used(path, name):
                self.noted.append(str(path))
            else:
                self.skipped.append((name, reason))

    def _folder(self, path: Path, case: bool = True) -> None:
        """Look through a folder. case: False within that of a case, which may hold other scans of its patient."""
        if is_output(path):
            return
        contents = search(path)
        if not case:
            self.noted += [f"{path}/"] if contents.scans or contents.failures else []
            return
        if contents.scans:
            names = listed((one.path.name for one in contents.scans), 3)
            self.skipped.append((path.name, f"{path}: scans of no case ({names}); expected {self.expected}"))
        self.skipped += [(f"{path.name}_{name}", reason) for name, reason in contents.failures]

    def _form_of_used(self, path: Path, stem: str) -> bool:
        used = self.used.get(str(path.parent), set())
        return any(stem + ending in used for ending in (*SCAN_SUFFIXES, ""))
