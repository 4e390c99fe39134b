"""AMOS 2022: imagesTr, labelsTr, imagesVa, labelsVa, imagesTs with amos_####.nii.gz; CT up to 500, MR above."""

import re
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset, Split, dataset_of, label_names, numbered
from mambahome_jax.datasets.files import scan_files
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.files import read_json

NAME = "amos"
LOOKS_FOR = "AMOS 2022: imagesTr, labelsTr, imagesVa, labelsVa, imagesTs with amos_####.nii.gz"
COVERS: tuple[str, ...] = ("decathlon",)
LABELS = numbered(
    *("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava"),
    *("pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
)
LAST_CT = 500

_CASE = re.compile(r"amos_(\d{4})")
# Ending of the folders, split, and key of dataset.json that lists its cases.
_PARTS: dict[str, tuple[Split, str]] = {"Tr": ("train", "training"), "Va": ("val", "validation"), "Ts": ("test", "")}


def detect(folder: Path) -> bool:
    """Whether imagesTr, imagesVa or imagesTs has a file amos_####.nii.gz."""
    return any(_CASE.fullmatch(stem) for part in _PARTS for stem in scan_files(folder / f"images{part}"))


def load(folder: Path) -> Dataset:
    """The cases of all three parts; those of imagesTs have labels only where labelsTs is there.

    Names from dataset.json where it has them ("arota" is corrected), else as published. A scan of training or
    validation without its label is skipped where the other cases have theirs.
    Raises DatasetError: no scan; damaged dataset.json.
    """
    file = folder / "dataset.json"
    content = read_json(file) if file.is_file() else {}
    table = label_names(content["labels"], file) if "labels" in content else LABELS
    labels = {value: "aorta" if name == "arota" else name for value, name in table.items()}
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    for part, (split, _) in _PARTS.items():
        images, maps = scan_files(folder / f"images{part}"), scan_files(folder / f"labels{part}")
        for stem, image in images.items():
            if maps and stem not in maps and split != "test":
                skipped.append((stem, f"labels{part}/{stem}.nii.gz not found"))
            else:
                number = _CASE.fullmatch(stem)
                modality: Modality | None = ("ct" if int(number[1]) <= LAST_CT else "mr") if number else None
                cases.append(Case(stem, image, maps.get(stem), split, modality))
        skipped += [(stem, f"images{part}/{stem}.nii.gz not found") for stem in maps if stem not in images]
    known = {case.id for case in cases} | {case for case, _ in skipped}
    for part, (_, key) in _PARTS.items():
        entries = [entry["image"] for entry in content.get(key) or () if isinstance(entry, dict) and "image" in entry]
        missing = [stem for stem in (scan_stem(Path(entry)) for entry in entries) if stem not in known]
        skipped += [(stem, f"images{part}/{stem}.nii.gz not found, which dataset.json lists") for stem in missing]
    return dataset_of(cases, skipped, folder, LOOKS_FOR, "no scan with its label", name="AMOS", labels=labels)
