"""Every scan in a folder and below it, and whatever else there could be one, with the reason why it is not read."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import LONGEST, listed, listing, of_one_kind
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_series import DEEPEST, Series, is_scan, sort_out
from mambahome_jax.imaging.formats import (
    SCAN_SUFFIXES,
    content_of,
    foreign_stem,
    kind_in,
    reason_of,
    scan_stem,
    without_second_halves,
)
from mambahome_jax.support.files import hidden
from mambahome_jax.support.paths import own_name

_LABELS = re.compile(r"(labels?|masks?|segs?|segmentations?)(tr|va|ts)?", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A scan and its name, unique among those of its folder.

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
    """What a folder holds. failures: (name, reason) of what could be a scan and is not read. notes: what is no scan.
    alike: scans that are failures because their names would be one, by that name."""

    scans: tuple[Found, ...]
    failures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    alike: Mapping[str, Sequence[Found]] = field(default_factory=dict)


def search(folder: Path, leave: Collection[Path] = (), deepest: int = DEEPEST) -> Search:
    """Look through a folder and those below it; only files whose names say nothing, and DICOM slices, are opened.

    Scans are named after their file, those of subfolders <folder>_<file>; slices after the folders alone, with the
    number of the series, or the end of its UID, where a folder holds several. What DICOM says of a patient is in no
    name. leave: folders not to enter. deepest: levels to go down.
    """
    walk = _Walk({os.path.realpath(path) for path in leave}, deepest)
    walk.enter(folder, (), frozenset())
    scans, alike = _named(walk.scans)
    collisions = ((name, _one_name(name, found)) for name, found in alike.items())
    return Search(scans, (*walk.failures, *collisions), tuple(walk.notes()), alike)


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


Parts = tuple[str, ...]


@dataclass
class _Walk:
    """leave: real paths of folders not to enter. scans: with the parts of their names, which may be of several yet."""

    leave: Collection[str]
    deepest: int
    scans: list[tuple[Parts, Found]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def enter(self, folder: Path, parts: Parts, above: frozenset[tuple[int, int]]) -> None:
        """parts: of names of scans there. above: folders on the way, which a link may lead back to."""
        try:
            folders, files = listing(folder)
            status = folder.stat()
        except (DatasetError, OSError) as error:
            reason = str(error) if isinstance(error, DatasetError) else f"{folder}: cannot be read: {error.strerror}"
            self.failures.append(("_".join(parts) or own_name(folder), reason))
            return
        place = (status.st_dev, status.st_ino)
        if place in above:
            return
        if parts and _of_a_run(folders, files):
            self.outputs.append("/".join(parts))
            return
        self._files(folder, parts, files.values())
        for name, path in folders.items():
            if of_labels(name):
                self.labels.append("/".join((*parts, name)))
            elif os.path.realpath(path) in self.leave:
                continue
            elif len(parts) >= self.deepest:
                if self.deepest:
                    reason = f"{path}: more than {self.deepest} folders down, so it is not looked into. Name it itself"
                    self.failures.append(("_".join((*parts, name)), reason))
            else:
                self.enter(path, (*parts, name), above | {place})

    def _files(self, folder: Path, parts: Parts, files: Iterable[Path]) -> None:
        foreign, candidates = [], []
        for path in files:
            kind = kind_in(path)
            if kind == "scan":
                stem = scan_stem(path)
                self.scans.append(((*parts, stem), Found(_joined((*parts, stem), "_"), path, depth=len(parts))))
            elif kind == "foreign":
                foreign.append(path)
            elif kind != "other":
                candidates.append(path)
        contents = sort_out(candidates)
        self.failures += [(path.name, reason) for path, reason in contents.unreadable]
        reasons = [(path, reason_of(path)) for path in without_second_halves(foreign)]
        reasons += [(path, reason_of(path, content)) for path in contents.others if (content := content_of(path))]
        self.failures += [("_".join((*parts, foreign_stem(path))), reason) for path, reason in reasons]
        self.beside += ["/".join((*parts, path.name)) for path in contents.beside]
        tails = _tails(contents.series)
        for one, tail in zip(contents.series, tails, strict=True):
            words = (*(parts or (own_name(folder),)), *((tail,) if tail else ()))
            self.scans.append((words, Found(_joined(words, "_"), folder, one.uid, len(tails) > 1, len(parts))))

    def notes(self) -> list[str]:
        """What was met and is no scan."""
        found = (
            (self.beside, "DICOM files that hold no slices (reports, segmentations, plans and the like)"),
            (self.labels, "folders of label maps by their names, which are no scans to segment"),
            (self.outputs, "folders of results or of preprocessed cases"),
        )
        return [f"passed over, {len(paths)} {what}: {listed(paths)}" for paths, what in found if paths]


def _tails(series: Sequence[Series]) -> list[str]:
    """What tells series of one folder apart, each in a name of its own; empty where there is one."""
    if len(series) < 2:
        return [""] * len(series)
    numbers = [one.number for one in series]
    if all(numbers) and len(set(numbers)) == len(numbers):
        return numbers
    words = [one.uid.split(".") if one.uid else ["unnamed"] for one in series]
    for count in range(1, max(map(len, words)) + 1):
        ends = [".".join(part[-count:]) for part in words]
        if len(set(ends)) == len(ends):
            return ends
    raise AssertionError("two series of one UID")


def _one_name(name: str, alike: Iterable[Found]) -> str:
    several = " and ".join(found.path.name for found in alike)
    return f"the results of {several} would have one name, {name}. Rename one of them"


def _named(scans: Sequence[tuple[Parts, Found]]) -> tuple[tuple[Found, ...], dict[str, list[Found]]]:
    """The scans with their names, and those left out whose names would be one, by that name."""
    by_name: dict[str, list[tuple[Parts, Found]]] = defaultdict(list)
    for parts, found in scans:
        by_name[found.name].append((parts, found))
    named: list[Found] = []
    left_out: dict[str, list[Found]] = {}
    for name, group in by_name.items():
        if len(group) == 1:
            named.append(group[0][1])
            continue
        # a_b/c and a/b_c: told apart by a longer mark between folders.
        longer: dict[str, list[Found]] = defaultdict(list)
        for parts, found in group:
            longer[_joined(parts, "__")].append(found)
        for other, alike in longer.items():
            if len(alike) == 1 and (other == name or other not in by_name):
                named.append(replace(alike[0], name=other))
            else:
                left_out[other] = alike
    return tuple(named), left_out


def _joined(parts: Parts, mark: str) -> str:
    """One name of several parts; a long one keeps its beginning and a digest of it all."""
    if len(parts) == 1:
        return parts[0]
    name = mark.join(parts)
    if len(os.fsencode(name)) <= LONGEST:
        return name
    digest = hashlib.sha256(os.fsencode("/".join(parts))).hexdigest()[:8]
    return os.fsencode(name)[: LONGEST - 9].decode("utf-8", "ignore") + f"_{digest}"


def unseen(
    root: Path, cases: Collection[Case], known: Collection[str], expected: str, *, unlisted: bool = True
) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, reason) of what should be a case, and paths of what lies beside cases that have all that they need.

    Looks beside the files of the cases, with one listing a folder; only files whose names say nothing are opened. In a
    folder of many images whatever could be another one should be a case; where each case has a folder, every folder.
    known: ids that are accounted for. expected: of the layout, for people. unlisted: False where the layout itself says
    which readable files it leaves out.
    """
    used: dict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for case in cases:
        images.update({_add(path, used) for path in case.image_files})
        for path in case.label_files:
            _add(path, used)
    look = _Look(used, expected)
    for folder in used:
        home = Path(folder)
        if folder in images:
            look.beside_images(home, images[folder] > 1 or of_one_kind(home.name), known if unlisted else None)
        else:
            look.beside_labels(home)
    look.unused_parts(root, known if unlisted else None)
    look.around(root, known)
    return look.skipped, look.beside


def misplaced(path: Path, expected: str) -> tuple[str, str]:
    """(name, reason) of a scan that lies beside the folders of a dataset."""
    name = foreign_stem(path) if kind_in(path) == "foreign" else scan_stem(path)
    return name, f"{path}: of no case, as it lies beside their folders; expected {expected}"


def _add(path: Path, used: dict[str, set[str]]) -> str:
    """Add a file to those of its folder; returns the folder. Strings, as paths of 100,000 files take seconds."""
    folder, name = os.path.split(path)
    folder = folder or "."
    used[folder].add(name)
    return folder


@dataclass
class _Look:
    """used: names of the files of cases by folder. skipped, beside: what `unseen` gives."""

    used: Mapping[str, set[str]]
    expected: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.above: set[str] = set()
        for folder in self.used:
            while folder not in self.above:
                self.above.add(folder)
                folder = os.path.dirname(folder)  # noqa: PTH120

    def unused(self, folder: Path) -> list[Path]:
        """Visible files and folders that are of no case."""
        home = str(folder)
        try:
            names = set(os.listdir(home)) - self.used.get(home, set())  # noqa: PTH208
        except OSError:
            # Said by what reads the folder.
            return []
        paths = (folder / name for name in sorted(names) if not hidden(name))
        return [path for path in paths if str(path) not in self.above]

    def beside_images(self, home: Path, many: bool, known: Collection[str] | None) -> None:
        """known: ids that the layout skips; None where it names all readable files that it leaves out."""
        foreign, others = [], []
        for path in self.unused(home):
            kind = kind_in(path)
            if kind == "foreign":
                foreign.append(path)
            elif kind == "scan":
                stem = scan_stem(path)
                # Another form of a case's file is noted elsewhere.
                if known is None or self._form_of_used(path, stem) or _of_any(stem, known):
                    continue
                if many:
                    self.skipped.append((stem, f"{path}: of no case by its name; expected {self.expected}"))
                else:
                    self.beside.append(str(path))
            elif kind != "other":
                others.append(path)
        self.foreign(foreign)
        folders = [path for path in others if path.is_dir()]
        self._unnamed(home, [path for path in others if path not in folders and path.is_file()])
        for path in folders:
            if not of_labels(path.name):
                self._folder(path, many)

    def beside_labels(self, home: Path) -> None:
        """Other formats and DICOM beside label maps; what else lies there is of no scan."""
        paths = {path: kind_in(path) for path in self.unused(home)}
        self.foreign(path for path, kind in paths.items() if kind == "foreign")
        others = [path for path, kind in paths.items() if kind in ("slice", "unknown")]
        contents = sort_out(path for path in others if path.is_file())
        slices = [*contents.beside, *(path for one in contents.series for path in one.paths)]
        for folder in others if of_one_kind(home.name) else ():
            if folder.is_dir() and is_scan(folder):
                slices.append(folder)
            elif folder.is_dir() and (found := search(folder).scans):
                names = listed((one.path.name for one in found), 3)
                self.skipped.append((folder.name, f"{folder}: label maps of no case ({names}). Move them to {home}"))
        reason = "DICOM, which is not read as a label map. Convert it to a file, for example .nii.gz"
        self.skipped += [(path.stem, f"{path}: {reason}") for path in slices]

    def unused_parts(self, root: Path, known: Collection[str] | None) -> None:
        """Folders of images alone in which no file is of a case."""
        for path in self.unused(root) if root.is_dir() else ():
            if path.is_dir() and of_one_kind(path.name):
                if path.name.lower().startswith("images"):
                    self.beside_images(path, True, known)
                else:
                    self.beside_labels(path)

    def foreign(self, paths: Iterable[Path]) -> None:
        """Files of formats that are not read."""
        for path in without_second_halves(list(paths)):
            if self._form_of_used(path, foreign_stem(path)):
                self.beside.append(str(path))
            else:
                self.skipped.append((foreign_stem(path), reason_of(path)))

    def around(self, root: Path, known: Collection[str]) -> None:
        """Folders of the dataset that hold no file of a case, and scans beside its folders."""
        for path in self.unused(root) if root.is_dir() else ():
            name = path.name
            # Cases of a folder of several are called <folder>_<rest>.
            if any(one == name or one.startswith(f"{name}_") for one in known):
                if path.is_dir() and name in known:
                    self.skipped += [(f"{name}_{other}", reason) for other, reason in search(path).failures]
            elif str(root) not in self.used and path.is_file() and kind_in(path) in ("scan", "foreign"):
                self.skipped.append(misplaced(path, self.expected))
            elif path.is_dir() and not of_labels(name) and not of_one_kind(name):
                self._folder(path)

    def _folder(self, path: Path, case: bool = True) -> None:
        """case: False within the folder of a case, which may hold other scans of its patient."""
        if is_output(path):
            return
        found = search(path)
        if not case:
            self.beside += [f"{path}/"] if found.scans or found.failures else []
            return
        if found.scans:
            names = listed((one.path.name for one in found.scans), 3)
            self.skipped.append((path.name, f"{path}: scans of no case ({names}); expected {self.expected}"))
        self.skipped += [(f"{path.name}_{name}", reason) for name, reason in found.failures]

    def _unnamed(self, home: Path, paths: list[Path]) -> None:
        """Files whose names do not tell what they are."""
        contents = sort_out(paths)
        slices = [path for one in contents.series for path in one.paths]
        if slices:
            reason = f"{home}: {len(slices)} DICOM slices lie among other files, {slices[0].name} the first"
            self.skipped.append((home.name, f"{reason}. Move those of each scan to a folder of its own"))
        self.skipped += [(path.name, reason) for path, reason in contents.unreadable]
        for path in contents.others:
            if content := content_of(path):
                self.skipped.append((path.name, reason_of(path, content)))

    def _form_of_used(self, path: Path, stem: str) -> bool:
        used = self.used.get(str(path.parent), set())
        return any(stem + ending in used for ending in (*SCAN_SUFFIXES, ""))


def _of_any(stem: str, ids: Collection[str]) -> bool:
    """Whether a file belongs to one of the cases by its name."""
    return any(stem == one or stem.startswith(f"{one}_") for one in ids)
