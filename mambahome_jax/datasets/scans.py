"""Every scan in a folder and below it, and whatever else there could be one, with the reason why it is not read."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mambahome_jax.datasets.files import LONGEST, listed, listing
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_series import DEEPEST, Series, sort_out
from mambahome_jax.imaging.formats import content_of, foreign_stem, kind_in, reason_of, without_second_halves
from mambahome_jax.support.files import scan_stem
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
