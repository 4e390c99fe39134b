"""MVSeg-3DTEE2023: train/, val/, test/ with <case>-US.nii.gz and <case>-label.nii.gz."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import SPLIT_WORDS, Case, Dataset, dataset_of, numbered
from mambahome_jax.datasets.files import paired, plain, scans_of, walk

NAME = "mvseg"
LOOKS_FOR = "MVSeg: train/, val/, test/ with <case>-US.nii.gz and <case>-label.nii.gz"
COVERS: tuple[str, ...] = ()
LABELS = numbered("posterior_leaflet", "anterior_leaflet")


def detect(folder: Path) -> bool:
    """Whether the folder, or one up to two folders below, holds a <case>-US.nii.gz."""
    stems = (stem for _, _, files in walk(folder, 2) for stem in scans_of(files))
    return any(stem.endswith("-US") for stem in stems) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a scan, in the split that its folder, else the first word of its name, says.

    Raises DatasetError: no scan.
    """
    cases, skipped = [], []
    for home, _, files in walk(folder, 2):
        for case, (image, label) in paired(scans_of(files), "-US", "-label").items():
            split = SPLIT_WORDS.get(home.name.lower()) or SPLIT_WORDS.get(re.split(r"[-_]", case.lower())[0])
            if image is None:
                skipped.append((case, f"{home.name}/{case}-US.nii.gz not found"))
            else:
                cases.append(Case(case, image, label, split, "us"))
    return dataset_of(cases, skipped, folder, LOOKS_FOR, channels=("US",), labels=LABELS)
