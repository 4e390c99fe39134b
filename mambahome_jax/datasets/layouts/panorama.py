"""PANORAMA: <patient>_<study>_0000.nii.gz in one or more batches, with a clone of the panorama_labels repository."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, dataset_of, numbered
from mambahome_jax.datasets.files import listing, plain, scans_of, walk
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.console import counted
from mambahome_jax.support.paths import real_path

NAME = "panorama"
LOOKS_FOR = (
    "PANORAMA: ######_#####_0000.nii.gz (in batches or not), and the repository panorama_labels in or beside the "
    "folder: manual_labels/ and automatic_labels/ with ######_#####.nii.gz"
)
COVERS: tuple[str, ...] = ("images_labels", "decathlon")
LABELS = numbered(*("pdac_lesion", "veins", "arteries", "pancreas_parenchyma", "pancreatic_duct", "common_bile_duct"))
REPOSITORY = "panorama_labels"
HINT = (
    "Labels cloned before 21 June 2024 hold stray values 7 and 8, corrected since: run git pull in panorama_labels and "
    "preprocess again."
)

_IMAGE = re.compile(r"((\d{6})_\d{5})_0000")
_LABEL = re.compile(r"\d{6}_\d{5}")
# Unpacked side by side, each batch may have a folder of its own around it: images/batch_1/batch_1/.
_DEPTH = 3


def detect(folder: Path) -> bool:
    """Whether such scans lie in the folder or up to three folders below."""
    stems = (stem for _, _, files in walk(folder, _DEPTH) for stem in scans_of(files))
    return any(map(_IMAGE.fullmatch, stems)) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a study, named <patient>_<study>; studies of one patient stay on one side of a split.

    Of two labels of one study, the one in manual_labels/ wins. A label without a scan is skipped, a scan without a
    label is kept as unlabelled. The commit of the labels is noted where it is known, as they changed over time.
    Raises DatasetError: no scan, no label at all.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    neighbours = listing(real_path(folder).parent)[0]
    for root in [folder, *(path for name, path in neighbours.items() if name.startswith(REPOSITORY))]:
        for home, _, files in walk(root, _DEPTH):
            for stem, path in scans_of(files).items():
                if match := _IMAGE.fullmatch(stem):
                    images.setdefault(match[1], path)
                elif _LABEL.fullmatch(stem) and (stem not in labels or "manual" in home.name):
                    labels[stem] = path
    if not images or not labels:
        action = "Clone github.com/DIAGNijmegen/panorama_labels into the folder." if images else None
        counts = f"{counted(len(images), 'scan')} and {counted(len(labels), 'label')}"
        raise DatasetError(counts, file=folder, expected=LOOKS_FOR, action=action)
    cases = [
        Case(study, path, labels.get(study), None, "ct", study.split("_")[0]) for study, path in sorted(images.items())
    ]
    skipped = [
        (study, f"{path.parent.name}/{path.name} has no scan; expected {study}_0000.nii.gz (is a batch missing?)")
        for study, path in sorted(labels.items())
        if study not in images
    ]
    commit = _commit(next(iter(labels.values())).parent)
    fields = {"notes": (f"labels of commit {commit}",) * bool(commit), "hint": HINT, "patients": "given"}
    return dataset_of(cases, skipped, folder, LOOKS_FOR, "no scan", channels=("CT",), labels=LABELS, **fields)


def _commit(folder: Path) -> str | None:
    """Commit that the clone around a folder has checked out."""
    for home in (folder, folder.parent):
        git = home / ".git"
        try:
            head = (git / "HEAD").read_text(encoding="utf-8").strip()
            name = head.removeprefix("ref: ")
            if name == head:
                return head
            if (git / name).is_file():
                return (git / name).read_text(encoding="utf-8").strip()
            packed = (line.split() for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines())
            return next((words[0] for words in packed if words[1:] == [name]), None)
        except (OSError, UnicodeDecodeError):
            continue
    return None
