"""MVSeg-3DTEE2023: train/, val/, test/ with <case>-US.nii.gz and <case>-label.nii.gz."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, unlabelled_note
from mambahome_jax.datasets.files import plain, scans_of, walk
from mambahome_jax.datasets.splits import WORDS
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.paths import own_name

NAME = "mvseg"
LOOKS_FOR = "MVSeg: train/, val/, test/ with <case>-US.nii.gz and <case>-label.nii.gz"
COVERS: tuple[str, ...] = ()
LABELS = {1: "posterior_leaflet", 2: "anterior_leaflet"}


def detect(folder: Path) -> bool:
    """Whether the folder, or one up to two folders below, holds a <case>-US.nii.gz."""
    names = (stem for _, _, files in walk(folder, 2) for stem in scans_of(files))
    return any(stem.endswith("-US") for stem in names) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a scan, in the split that its folder, else the first word of its name, says.

    Raises DatasetError: no scan.
    """
    cases, skipped = [], []
    for home, _, content in walk(folder, 2):
        files = scans_of(content)
        stems = {stem.removesuffix(end) for stem in files for end in ("-US", "-label") if stem.endswith(end)}
        for stem in sorted(stems):
            split = WORDS.get(home.name.lower()) or WORDS.get(re.split(r"[-_]", stem.lower())[0])
            if f"{stem}-US" not in files:
                skipped.append((stem, f"{home.name}/{stem}-US.nii.gz not found"))
            else:
                cases.append(Case(stem, files[f"{stem}-US"], files.get(f"{stem}-label"), split, "us"))
    if not cases:
        raise DatasetError("no scan", file=folder, expected=LOOKS_FOR)
    notes = unlabelled_note(case for case in cases if case.split != "test")
    return Dataset(own_name(folder), ("US",), LABELS, tuple(cases), tuple(skipped), notes)
