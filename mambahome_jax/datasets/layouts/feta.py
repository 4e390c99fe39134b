"""FeTA: sub-<subject>/anat/sub-<subject>[_...]_T2w.nii.gz with ..._dseg.nii.gz (BIDS)."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, unlabelled_note
from mambahome_jax.datasets.files import listing, scans_of, walk
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.paths import own_name

NAME = "feta"
LOOKS_FOR = "FeTA: sub-<subject>/anat/sub-<subject>_rec-<method>_T2w.nii.gz with ..._dseg.nii.gz"
COVERS: tuple[str, ...] = ()
LABELS = {
    1: "external_cerebrospinal_fluid",
    2: "grey_matter",
    3: "white_matter",
    4: "ventricles",
    5: "cerebellum",
    6: "deep_grey_matter",
    7: "brainstem",
}

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_IMAGE, _LABEL = "_T2w", "_dseg"


def detect(folder: Path) -> bool:
    """Whether the folder, or one of its few subfolders, has subfolders sub-* of which one holds such scans."""
    subjects = (path for _, folders, _ in walk(folder, 1) for name, path in folders.items() if _SUBJECT.fullmatch(name))
    return any(stem.endswith(_IMAGE) for subject in subjects for stem in _files(subject))


def load(folder: Path) -> Dataset:
    """One case a scan, named after its file without _T2w, paired by that name; several of a subject are one patient.

    A scan without its label is kept as unlabelled, a label without its scan is skipped.
    Raises DatasetError: no scan.
    """
    cases, skipped = [], []
    for _, folders, _ in walk(folder, 1):
        for subject in filter(_SUBJECT.fullmatch, folders):
            files = _files(folders[subject])
            stems = {stem.removesuffix(end) for stem in files for end in (_IMAGE, _LABEL) if stem.endswith(end)}
            for stem in sorted(stems):
                image, label = files.get(stem + _IMAGE), files.get(stem + _LABEL)
                if image is None:
                    skipped.append((stem, f"{subject}/anat/{stem}{_IMAGE}.nii.gz not found"))
                else:
                    cases.append(Case(stem, image, label, None, "mr", subject))
    if not cases:
        raise DatasetError("no scan", file=folder, expected=LOOKS_FOR)
    notes = unlabelled_note(cases)
    return Dataset(own_name(folder), ("T2w",), LABELS, tuple(cases), tuple(skipped), notes, patients="given")


def _files(subject: Path) -> dict[str, Path]:
    """NIfTI files of anat/, also below the sessions ses-*."""
    homes = [subject, *(path for name, path in listing(subject)[0].items() if name.startswith("ses-"))]
    return {stem: path for home in homes for stem, path in scans_of(listing(home / "anat")[1]).items()}
