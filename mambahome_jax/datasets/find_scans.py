"""Which files `infer` is to segment, and what the dataset around them says of each."""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Split
from mambahome_jax.datasets.files import (
    CHANNEL,
    channels_of,
    dot_files_note,
    fault_of_name,
    listed,
    listing,
    of_one_kind,
    printable,
    twins_note,
)
from mambahome_jax.datasets.prepared import absent_images, detect, unlisted_files
from mambahome_jax.datasets.registry import LISTED, load_dataset
from mambahome_jax.datasets.scans import Candidate, Failures, Search, is_output, search
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, kind_of, no_scan, scan_stem, suffix_of
from mambahome_jax.support.console import counted
from mambahome_jax.support.paths import own_name

# Folders that hold the scans when the folder itself holds none: of the Decathlon, of preprocess.py.
SCAN_FOLDERS = ("imagesTs", "images")
DATASET_FOLDERS = (*SCAN_FOLDERS, "imagesTr", "imagesVa")
# Names, also of folders on the way, that a dataset gives to label maps.
_LABEL = re.compile(r"(?<![a-z])(labels?|segs?|segmentations?|masks?|gt|dseg)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """A scan to segment and the name of its result.

    path: a file, or a folder of DICOM slices. modality: None where it is that of the model. channels: a file each, in
    order; `path` is then the first. series: SeriesInstanceUID of its slices where other series lie in their folder.
    other_name: name of its result in earlier versions, which kept the number of <case>_0000; empty where no other.
    split: as the dataset marks it.
    """

    case: str
    path: Path
    modality: Modality | None = None
    channels: tuple[Path, ...] = ()
    other_name: str = ""
    series: tuple[str, ...] = ()
    split: Split | None = None


@dataclass(frozen=True)
class ScanFolder:
    """The scans of a file or folder. failures: {"id", "reason"} of what could be a scan and is none to segment, or of
    results that would collide. notes: what else was passed over."""

    folder: Path
    scans: list[Scan]
    failures: list[dict[str, str]]
    notes: tuple[str, ...] = ()


def find_scans(data_path: Path, series: Collection[str] = (), leave: Collection[Path] = ()) -> ScanFolder:
    """Find the scans of a file, or of a folder and all below it, named as `datasets.scans.search` does.

    Of a folder without scan files of its own the first of SCAN_FOLDERS that holds scans is taken; else the scans
    that a dataset names are called by their cases there. series: UIDs of the DICOM series to take; none takes all.
    leave: folders not to enter.
    Raises DatasetError: nothing there, no scan nor anything that could be one, none of the series.
    """
    if data_path.is_file():
        if kind_of(data_path) != "scan":
            raise no_scan(data_path)
        return ScanFolder(data_path, [Scan(scan_stem(data_path), data_path)], [])
    if not data_path.is_dir():
        raise DatasetError("no such file or folder", file=data_path, action="Check --data_path.")
    root, content, around = _root(data_path, leave)
    scans, failures, passed = _scans_of(root, content)
    taken = {path for scan in scans for path in (scan.path, *scan.channels)}
    # Of two forms of a file the dataset has chosen one.
    chosen_of = {name for name, alike in content.alike.items() if any(one.path in taken for one in alike)}
    failures += [(name, reason) for name, reason in content.failures if name not in chosen_of]
    failures += around.failures
    twins = twins_note(one.path for name in chosen_of for one in content.alike[name] if one.path in taken)
    chosen = [scan for scan in scans if not series or not scan.series or set(scan.series) & set(series)]
    uids = {uid for scan in scans for uid in scan.series}
    missing = [uid for uid in series if uid not in uids]
    if missing and not chosen:
        expected = f"one of {', '.join(sorted(uids))}" if uids else "DICOM slices"
        raise DatasetError(f"no series {listed(missing)}", file=data_path, expected=expected, action="Check --series.")
    failures += [(uid, f"{data_path}: no series of this UID. Check --series") for uid in missing]
    notes = (*content.notes, *around.notes, *passed, *twins, *dot_files_note(taken))
    if left := len(scans) - len(chosen):
        notes += (f"{left} other series left out by --series",)
    if not chosen and not failures:
        kinds = f"{', '.join(SCAN_SUFFIXES)} or DICOM"
        expected = f"scans there, or in its {' or '.join(SCAN_FOLDERS)}, or a folder of DICOM slices a case"
        also = f" ({'; '.join(notes)})" if notes else ""
        raise DatasetError(f"no {kinds} file{also}", file=data_path, expected=expected, action="Check --data_path.")
    several = {one.path for one in content.scans if one.one_of_several}
    chosen = [scan if scan.path in several else replace(scan, series=()) for scan in chosen]
    return ScanFolder(root, chosen, _entries(failures), notes)


def _entries(failures: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"id": printable(name), "reason": reason} for name, reason in failures]


def _root(data_path: Path, leave: Collection[Path]) -> tuple[Path, Search, Search]:
    """The folder whose scans are meant, what it holds, and what lies around it."""
    if detect(data_path):
        # Arrays that preprocess wrote are no scans.
        leave = (*leave, data_path / "store")
    folders, files = listing(data_path)
    if not any(map(suffix_of, files)):
        for name in SCAN_FOLDERS:
            content = search(data_path / name, leave) if name in folders else Search()
            if content.scans:
                return data_path / name, content, _surroundings(data_path, name, folders, leave)
    return data_path, search(data_path, leave), Search()


def _surroundings(home: Path, taken: str, folders: Mapping[str, Path], leave: Collection[Path]) -> Search:
    """What lies beside the scans: failures where it could be others, and a note on other parts of the dataset."""
    left = {os.path.realpath(path) for path in leave}
    contents = {home: search(home, leave, deepest=0)}
    for name, path in folders.items():
        if name != taken and not of_one_kind(name) and os.path.realpath(path) not in left and not is_output(path):
            contents[path] = search(path, leave)
    reason = f"beside {taken}/, whose scans are taken. Name that folder, or move them"
    failures = [
        (own_name(path), f"{path}: {counted(len(one.scans), 'scan')} {reason}")
        for path, one in contents.items()
        if one.scans
    ]
    failures += [failure for one in contents.values() for failure in one.failures]
    parts = [name for name in folders if name in DATASET_FOLDERS and name != taken]
    notes = (f"the scans of {listed(parts)} are not taken; name the folder itself to segment them",) if parts else ()
    return Search((), tuple(failures), notes)


def _scans_of(root: Path, content: Search) -> tuple[list[Scan], Failures, list[str]]:
    """The scans of a folder, those of a dataset by its cases; failures: names that no file can have; notes."""
    direct = [one.path.name for one in content.scans if one.depth == 0 and not one.series]
    # Of a folder that preprocess wrote only what its dataset.json names.
    unlisted = unlisted_files(root, direct)
    failures = [(scan_stem(Path(name)), reason) for name, reason in unlisted.items()]
    failures += absent_images(root).items()
    part = root.name in DATASET_FOLDERS
    # Beside scan files of the folder itself a dataset only says which of the files below are label maps.
    below = bool(direct) and any(one.depth for one in content.scans)
    dataset = None
    if part or not direct or below:
        # Scans to segment need not lie in a dataset.
        with contextlib.suppress(DatasetError):
            dataset = load_dataset(root.parent if part else root)
    cases = () if dataset is None else dataset.cases
    modalities = {case.image: case.modality for case in cases}
    if len({*modalities.values()} - {None}) < 2:
        # Of one modality the model knows better: it may be trained on another.
        modalities = {}
    splits = {case.image: case.split for case in cases}
    of_cases = _series_of_cases(root, content.scans, cases)
    homes = {home for home, _ in of_cases.values()}
    named = [case for case in cases if case.image not in homes] if not part else []
    drawn = {path for case in named for path in case.label_files} if below else set()
    named = [] if below else named
    scans = [Scan(case.id, case.image, modalities.get(case.image), case.images, split=case.split) for case in named]
    used = {path for case in named for path in (*case.image_files, *case.label_files)}
    names = {scan.case for scan in scans}
    labels = []
    for one in content.scans:
        home, name = of_cases.get(one, (one.path, one.name))
        if one.path in used or not used.isdisjoint(one.path.parents) or (one.depth == 0 and one.path.name in unlisted):
            continue
        of_no_case = bool(cases) and not part and one not in of_cases and not (below and one.depth == 0)
        label = dataset is not None and (dataset.layout in LISTED or _LABEL.search(name))
        if one.path in drawn or (of_no_case and label):
            labels.append(name)
        elif fault := fault_of_name(name):
            failures.append((name, f"{str(one.path)!r}: {fault}"))
        elif name in names:
            reason = f"the results of two scans would have one name, {name}: {one.path} is left out. Rename it"
            failures.append((name, reason))
        else:
            names.add(name)
            series = (one.series,) if one.series else ()
            scans.append(Scan(name, one.path, modalities.get(home), series=series, split=splits.get(home)))
    return (
        scans,
        failures,
        [f"passed over, as the dataset does not list them as scans: {listed(labels)}"] * bool(labels),
    )


def _series_of_cases(
    root: Path, found: Iterable[Candidate], cases: Iterable[Case]
) -> dict[Candidate, tuple[Path, str]]:
    """Series in or below a folder that is the image of a case, with that folder, and the case as name of their results.

    Of several series, what tells them apart stands behind it.
    """
    slices = [one for one in found if not suffix_of(one.path.name)]
    names = {case.image: case.id for case in cases if not case.images} if slices else {}
    groups: dict[Path, list[Candidate]] = defaultdict(list)
    for one in slices:
        if home := next((path for path in (one.path, *one.path.parents) if path in names), None):
            groups[home].append(one)
    result = {}
    for home, series in groups.items():
        beginning = "_".join(home.relative_to(root).parts) + "_"
        for one in series:
            tail = f"_{one.name.removeprefix(beginning)}" if len(series) > 1 else ""
            result[one] = home, names[home] + tail
    return result


def join_channels(data_path: Path, scans: list[Scan], channels: int) -> tuple[list[Scan], list[dict[str, str]]]:
    """Scans as a model of so many channels takes them, and failures: those that lack a channel or have too many.

    <case>_0000, <case>_0001, ... become the scan <case>; a single file brings the others beside it along. Scans of
    other names must hold all channels themselves. A model of one channel takes each file by itself; where all files of
    the folder are called <case>_0000, a case each, the scans are called <case>.
    """
    siblings = listing(data_path.parent)[1].values() if data_path.is_file() else ()
    files_beside = [Scan(scan_stem(path), path) for path in siblings if suffix_of(path.name)]
    if channels < 2:
        # The ending _0000 is the number of the only channel where all files say so.
        names = channels_of([scan.case for scan in files_beside or scans])
        single = {files[0]: case for case, files in names.items() if len(files) == 1}
        return [replace(s, case=single[s.case], other_name=s.case) if s.case in single else s for s in scans], []
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    joined = []
    wanted = CHANNEL.fullmatch(scans[0].case) if files_beside else None
    # The named file last, as of two forms of it that one counts.
    for scan in [*files_beside, *scans] if wanted else scans:
        match = None if scan.channels else CHANNEL.fullmatch(scan.case)
        if match and (wanted is None or match[1] == wanted[1]):
            groups[match[1]][int(match[2])] = scan.path
        elif wanted is None:
            joined.append(scan)
    marks = {scan.path: (scan.modality, scan.split) for scan in scans}
    taken = {scan.case for scan in joined}
    failures = []
    for case, files in groups.items():
        missing = [f"{case}_{number:04}" for number in range(channels) if number not in files]
        beyond = [files[number].name for number in sorted(files) if number >= channels]
        expected = f"expected {channels} channels, as the model takes"
        if missing:
            failures.append((case, f"{listed(missing)} not found; {expected}, a file each"))
        elif beyond:
            failures.append((case, f"also {listed(beyond)}; {expected}. Move them elsewhere"))
        elif case in taken:
            reason = f"a scan {case} lies beside its channels {case}_0000, .... Rename or move one of them"
            failures.append((case, reason))
        else:
            paths = tuple(files[number] for number in range(channels))
            modality, split = marks.get(paths[0], (None, None))
            joined.append(Scan(case, paths[0], modality, paths, split=split))
    return sorted(joined, key=lambda scan: scan.case), _entries(failures)
