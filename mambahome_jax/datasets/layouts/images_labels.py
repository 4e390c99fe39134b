"""images/<case>.nii.gz with labels/<case>.nii.gz: what the published converter reads; other formats too."""

import re
from collections import defaultdict
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, dataset_of, modality_of, optional_description
from mambahome_jax.datasets.files import by_channel, listing, scan_files
from mambahome_jax.datasets.scans import search
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import is_scan
from mambahome_jax.support.console import counted

NAME = "images_labels"
LOOKS_FOR = "images/<case>.nii.gz with labels/<case>.nii.gz"  # or another format of scans
COVERS: tuple[str, ...] = ()

# The published converter pairs by sorted order, so its users' names may differ in such an ending.
_IMAGE_ENDING = re.compile(r"[-_. ](0000|image|img|scan|ct|mr|mri|us|volume|vol)$", re.IGNORECASE)
_LABEL_ENDING = re.compile(r"[-_. ](labels?|seg|segmentation|mask|gt|dseg)$", re.IGNORECASE)


def detect(folder: Path) -> bool:
    """Whether the folder has images/ or labels/, however they are capitalised."""
    return any(name.lower() in ("images", "labels") for name in listing(folder)[0])


def load(folder: Path) -> Dataset:
    """Pairs the files of images/ and labels/ by name; an ending such as _0000 or _label may differ.

    Files images/<case>_0000, <case>_0001, ... with labels/<case> are the channels of a case where all are called so; a
    case that lacks one is skipped. An image may also be a folder of DICOM slices, images/<case>/. An image without a
    label is kept as unlabelled, a label without its image is skipped. Names of labels and channels come from an
    optional dataset.json. Raises DatasetError: one of the folders is missing or holds no scan.
    """
    images, labels = _files(folder, "images", slices=True), _files(folder, "labels")
    names, channels = optional_description(folder)
    by_key: dict[str, list[str]] = defaultdict(list)
    for stem in labels:
        by_key[_LABEL_ENDING.sub("", stem)].append(stem)
    numbered = {} if labels.keys() & images.keys() else by_channel(images)
    # Numbers of the cases themselves, scan_0000 and scan_0001, are in the names of their label maps too.
    numbered = numbered if numbered.keys() & by_key.keys() else {}
    count = 1 + max((max(stems) for stems in numbered.values()), default=0)
    files = {case: tuple(images[stems[n]] for n in sorted(stems)) for case, stems in numbered.items()}
    files = files or {stem: (path,) for stem, path in images.items()}
    missing = {
        case: f"images/{case}_{number:04} not found; expected a file for each of {counted(count, 'channel')}"
        for case, stems in numbered.items()
        for number in range(count)
        if number not in stems
    }
    cases, used = [], set()
    for case, paths in files.items():
        candidates = [case] if case in labels else by_key.get(_IMAGE_ENDING.sub("", case), [])
        label = candidates[0] if len(candidates) == 1 else ""
        used.add(label)
        if case not in missing:
            several = paths if count > 1 else ()
            cases.append(Case(case, paths[0], labels.get(label), None, modality_of(channels), images=several))
    skipped = list(missing.items())
    for stem, path in labels.items():
        if stem not in used:
            skipped.append((stem, f"labels/{path.name} has no image; expected images/{path.name}"))
    return dataset_of(cases, skipped, folder, LOOKS_FOR, channels=channels, labels=names)


def _files(root: Path, name: str, slices: bool = False) -> dict[str, Path]:
    """Scan files of a part by stem; slices: and its folders of DICOM slices by their names."""
    folders = listing(root)[0]
    folder = ({other.lower(): path for other, path in folders.items()} | folders).get(name, root / name)
    series = {name: path for name, path in listing(folder)[0].items() if is_scan(path)} if slices else {}
    files = dict(sorted((series | scan_files(folder)).items()))
    if not files:
        is_folder = folder.is_dir()
        failures = search(folder, deepest=0).failures if is_folder else ()
        problem = "the folder holds no scan" if is_folder else "the folder is missing"
        raise DatasetError(problem, file=folder, expected=LOOKS_FOR, action=failures[0][1] if failures else None)
    return files
