"""AMOS 2022: imagesTr, labelsTr, imagesVa, labelsVa, imagesTs with amos_####.nii.gz; CT up to 500, MR above."""

import re
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset, Split, label_names, unlabelled_note
from mambahome_jax.datasets.files import scan_files
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.files import read_json

NAME = "amos"
LOOKS_FOR = "AMOS 2022: imagesTr, labelsTr, imagesVa, labelsVa, imagesTs with amos_####.nii.gz"
COVERS: tuple[str, ...] = ("decathlon",)
LABELS = {
    **{1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gall bladder", 5: "esophagus", 6: "liver", 7: "stomach"},
    **{8: "aorta", 9: "postcava", 10: "pancreas", 11: "right adrenal gland", 12: "left adrenal gland"},
    **{13: "duodenum", 14: "bladder", 15: "prostate/uterus"},
}
LAST_CT = 500

_CASE = re.compile(r"amos_(\d{4})")
_PARTS: tuple[tuple[str, Split], ...] = (("Tr", "train"), ("Va", "val"), ("Ts", "test"))


def detect(folder: Path) -> bool:
    """Whether imagesTr, imagesVa or imagesTs has a file amos_####.nii.gz."""
    return any(_CASE.fullmatch(stem) for part, _ in _PARTS for stem in scan_files(folder / f"images{part}"))


def load(folder: Path) -> Dataset:
    """The cases of all three parts; those of imagesTs have labels only where labelsTs is there.

    Modality by the number of the case. Names from dataset.json where it has them ("arota" is mended), else as
    published. A scan of training or validation without its label is skipped where the other cases have theirs.
    Raises DatasetError: no scan; damaged dataset.json.
    """
    file = folder / "dataset.json"
    content = read_json(file) if file.is_file() else {}
    table = label_names(content["labels"], file) if "labels" in content else LABELS
    labels = {value: "aorta" if name == "arota" else name for value, name in table.items()}
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    for part, split in _PARTS:
        images, maps = scan_files(folder / f"images{part}"), scan_files(folder / f"labels{part}")
        for stem, image in images.items():
            if maps and stem not in maps and split != "test":
                skipped.append((stem, f"labels{part}/{stem}.nii.gz not found"))
                continue
            cases.append(Case(stem, image, maps.get(stem), split, _modality(stem)))
        skipped += [(stem, f"images{part}/{stem}.nii.gz not found") for stem in maps if stem not in images]
    known = {case.id for case in cases} | {case for case, _ in skipped}
    for part, key in (("Tr", "training"), ("Va", "validation")):
        named = content.get(key)
        entries = [entry["image"] for entry in named if isinstance(entry, dict) and "image" in entry] if named else []
        missing = [stem for stem in (scan_stem(Path(entry)) for entry in entries) if stem not in known]
        skipped += [(stem, f"images{part}/{stem}.nii.gz not found, which dataset.json lists") for stem in missing]
    if not cases:
        raise DatasetError("no scan with its label", file=folder, expected=LOOKS_FOR)
    notes = unlabelled_note(case for case in cases if case.split != "test")
    return Dataset("AMOS", ("image",), labels, tuple(cases), tuple(skipped), notes)


def _modality(stem: str) -> Modality | None:
    found = _CASE.fullmatch(stem)
    return None if found is None else "ct" if int(found[1]) <= LAST_CT else "mr"
