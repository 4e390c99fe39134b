"""Which files `infer` is to segment, and what the dataset around them says of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.case_names import CHANNEL, channels_of
from mambahome_jax.datasets.files import fault_of_name, listed, listing
from mambahome_jax.datasets.prepared import unlisted_files
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_series import holds_slices
from mambahome_jax.imaging.files import SCAN_SUFFIXES, alternatives, scan_stem, suffix_of
from mambahome_jax.paths import own_name

# Folders that hold the scans when the folder itself holds none: of the Decathlon, of preprocess.py.
SCAN_FOLDERS = ("imagesTs", "images")
DATASET_FOLDERS = (*SCAN_FOLDERS, "imagesTr", "imagesVa")


@dataclass(frozen=True)
class Scan:
    """A scan to segment and the name of its result.

    path: a file, or a folder of DICOM slices. modality: None where it is that of the model. channels: all files in
    order, where each channel has its own; `path` is then the first. other_name: what its result was called by versions
    that took the channel's number in <case>_0000 for a part of the case's name; empty where that is no other.
    """

    case: str
    path: Path
    modality: Modality | None = None
    channels: tuple[Path, ...] = ()
    other_name: str = ""


def find_scans(data_path: Path) -> tuple[Path, list[Scan], list[dict[str, str]]]:
    """The file or folder with the scans, the scans by name, and failures: those whose results would collide.

    Subfolders of DICOM slices beside scan files are scans too; slices that lie among them are a failure. A folder
    without scan files in it or in one of SCAN_FOLDERS is a scan itself where it holds DICOM slices; else each
    of its subfolders that does is one; else it is read as a dataset, so that scans in a folder a case are found too.
    Raises DatasetError: nothing there, or no visible scan.
    """
    if data_path.is_file():
        if not suffix_of(data_path.name):
            found, action = "not a scan by its name", "For DICOM, name the folder of the slices."
            raise DatasetError(found, file=data_path, expected=alternatives(SCAN_SUFFIXES), action=action)
        return data_path, [Scan(scan_stem(data_path), data_path)], []
    if not data_path.is_dir():
        raise DatasetError("no such file or folder", file=data_path, action="Check --data_path.")
    for folder in (data_path, *(data_path / name for name in SCAN_FOLDERS)):
        files: dict[str, list[Path]] = {}
        here = [path for path in listing(folder)[1].values() if suffix_of(path.name)]
        # Of a folder that preprocess wrote only what its dataset.json names.
        others = unlisted_files(folder, [path.name for path in here])
        for path in here:
            if path.name not in others:
                files.setdefault(scan_stem(path), []).append(path)
        if files:
            modalities = _modalities(folder)
            scans: list[Scan] = []
            failures = [{"id": scan_stem(Path(name)), "reason": reason} for name, reason in others.items()]
            for scan in _series(folder):
                files.setdefault(scan.case, []).append(scan.path)
            if holds_slices(folder):
                reason = (
                    f"{folder}: DICOM slices lie among other scans. Move those of each series to a folder of its own"
                )
                failures.append({"id": own_name(folder), "reason": reason})
            for case, paths in files.items():
                if fault_of_name(case):
                    failures.append({"id": repr(case)[1:-1], "reason": f"{str(paths[0])!r}: {fault_of_name(case)}"})
                elif len(paths) == 1:
                    scans.append(Scan(case, paths[0], modalities.get(paths[0])))
                else:
                    several = " and ".join(path.name for path in paths)
                    reason = f"the results of {several} would have one name, {case}. Rename one of them"
                    failures.append({"id": case, "reason": reason})
            return folder, scans, failures
    scans = _dicom(data_path) or _dataset(data_path)
    if scans:
        return data_path, scans, []
    kinds = f"{', '.join(SCAN_SUFFIXES)} or DICOM"
    expected = f"scans there, or in its {' or '.join(SCAN_FOLDERS)}, or a folder of DICOM slices a case"
    raise DatasetError(f"no {kinds} file", file=data_path, expected=expected, action="Check --data_path.")


def join_channels(data_path: Path, scans: list[Scan], channels: int) -> tuple[list[Scan], list[dict[str, str]]]:
    """Scans as a model of so many channels takes them, and failures: those that lack a channel or have too many.

    <case>_0000, <case>_0001, ... become the scan <case>; a single file brings the others beside it along. Scans of
    other names must hold all channels themselves. A model of one channel takes each file by itself; where all files of
    the folder are called <case>_0000, a case each, the scans are called <case>.
    """
    if channels < 2:
        return _without_channel(data_path, scans), []
    groups: dict[str, dict[int, Path]] = {}
    joined = []
    for scan in _with_siblings(scans) if data_path.is_file() else scans:
        found = None if scan.channels else CHANNEL.fullmatch(scan.case)
        if found:
            groups.setdefault(found[1], {})[int(found[2])] = scan.path
        else:
            joined.append(scan)
    failures = []
    modalities = {scan.path: scan.modality for scan in scans}
    taken = {scan.case for scan in joined}
    for case, files in groups.items():
        reason = _no_channels(case, files, channels, case in taken)
        if reason:
            failures.append({"id": case, "reason": reason})
        else:
            paths = tuple(files[number] for number in range(channels))
            joined.append(Scan(case, paths[0], modalities.get(paths[0]), paths))
    return sorted(joined, key=lambda scan: scan.case), failures


def _without_channel(data_path: Path, scans: list[Scan]) -> list[Scan]:
    """The scans named without the ending _0000 where it is the number of the only channel, by all files beside them."""
    beside = listing(data_path.parent)[1].values() if data_path.is_file() else ()
    names = [scan_stem(path) for path in beside if suffix_of(path.name)] or [scan.case for scan in scans]
    case_of = {files[0]: case for case, files in channels_of(names).items() if len(files) == 1}
    return [
        replace(scan, case=case_of[scan.case], other_name=scan.case) if scan.case in case_of else scan for scan in scans
    ]


def _no_channels(case: str, files: dict[int, Path], channels: int, taken: bool) -> str:
    """Why files of a case by number of channel are no scan of so many; empty where they are one."""
    missing = [f"{case}_{number:04}" for number in range(channels) if number not in files]
    beyond = [files[number].name for number in sorted(files) if number >= channels]
    if missing:
        return f"{listed(missing)} not found; expected {channels} channels, as the model takes, a file each"
    if beyond:
        return f"also {listed(beyond)}; expected {channels} channels, as the model takes. Move them elsewhere"
    return f"a scan {case} lies beside its channels {case}_0000, .... Rename or move one of them" if taken else ""


def _with_siblings(scans: list[Scan]) -> list[Scan]:
    """A single scan file, last, as of two forms of it the named one counts, after those of the same case beside it."""
    found = CHANNEL.fullmatch(scans[0].case)
    if not found:
        return scans
    beside = [path for path in listing(scans[0].path.parent)[1].values() if suffix_of(path.name)]
    name = re.compile(rf"{re.escape(found[1])}_\d{{4}}")
    return [*(Scan(scan_stem(path), path) for path in beside if name.fullmatch(scan_stem(path))), *scans]


def _dicom(folder: Path) -> list[Scan]:
    """The folder as one scan, or its subfolders as one each, where they hold DICOM slices."""
    if holds_slices(folder):
        return [Scan(own_name(folder), folder)]
    return _series(folder)


def _series(folder: Path) -> list[Scan]:
    return [Scan(name, path) for name, path in listing(folder)[0].items() if holds_slices(path)]


def _dataset(folder: Path) -> list[Scan]:
    cases = _cases(folder)
    own = _by_path(cases)
    return [Scan(case.id, case.image, own.get(case.image), case.images) for case in cases]


def _modalities(folder: Path) -> Mapping[Path, Modality]:
    """Modality of each scan in a folder of a dataset whose scans are of several."""
    return _by_path(_cases(folder.parent)) if folder.name in DATASET_FOLDERS else {}


def _by_path(cases: list[Case]) -> dict[Path, Modality]:
    """Modality by file; empty where all are of one, which the model knows better: it may be trained on another."""
    found = {case.image: case.modality for case in cases if case.modality is not None}
    return found if len(set(found.values())) > 1 else {}


def _cases(folder: Path) -> list[Case]:
    try:
        return list(load_dataset(folder).cases)
    except DatasetError:
        # Scans to segment need not lie in a dataset.
        return []
