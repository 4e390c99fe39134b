"""FeTA: sub-<subject>/anat/sub-<subject>[_...]_T2w.nii.gz with ..._dseg.nii.gz (BIDS)."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, dataset_of, numbered
from mambahome_jax.datasets.files import case_folders, listing, paired, scans_of

NAME = "feta"
LOOKS_FOR = "FeTA: sub-<subject>/anat/sub-<subject>_rec-<method>_T2w.nii.gz with ..._dseg.nii.gz"
COVERS: tuple[str, ...] = ()
LABELS = numbered(
    *("external_cerebrospinal_fluid", "grey_matter", "white_matter", "ventricles"),
    *("cerebellum", "deep_grey_matter", "brainstem"),
)

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_IMAGE, _LABEL = "_T2w", "_dseg"


def detect(folder: Path) -> bool:
    """Whether the folder, or one of its few subfolders, has subfolders sub-* of which one holds such scans."""
    return any(stem.endswith(_IMAGE) for _, path in case_folders(folder, _SUBJECT) for stem in _files(path))


def load(folder: Path) -> Dataset:
    """One case a scan, named after its file without _T2w, paired by that name; several of a subject are one patient.

    A scan without its label is kept as unlabelled, a label without its scan is skipped. Raises DatasetError: no scan.
    """
    cases, skipped = [], []
    for subject, path in case_folders(folder, _SUBJECT):
        for case, (image, label) in paired(_files(path), _IMAGE, _LABEL).items():
            if image is None:
                skipped.append((case, f"{subject}/anat/{case}{_IMAGE}.nii.gz not found"))
            else:
                cases.append(Case(case, image, label, None, "mr", subject))
    return dataset_of(cases, skipped, folder, LOOKS_FOR, channels=("T2w",), labels=LABELS, patients="given")


def _files(subject: Path) -> dict[str, Path]:
    """Scan files of anat/, also below the sessions ses-*."""
    homes = [subject, *(path for name, path in listing(subject)[0].items() if name.startswith("ses-"))]
    return {stem: path for home in homes for stem, path in scans_of(listing(home / "anat")[1]).items()}
