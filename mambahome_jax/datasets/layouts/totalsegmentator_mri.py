"""TotalSegmentator MRI, versions 1 and 2: s####/ with mri.nii.gz and one binary mask a structure; meta.csv."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import SPLIT_WORDS, Dataset, Split, case_of_masks, dataset_of, numbered
from mambahome_jax.datasets.files import listed, listing, read_table, scans_of, walk
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem

NAME = "totalsegmentator_mri"
LOOKS_FOR = "TotalSegmentator MRI: s####/mri.nii.gz with segmentations/<structure>.nii.gz, and meta.csv"
COVERS: tuple[str, ...] = ()

# Task total_mr of version 2. Version 1 has the first 31 of them, then others.
STRUCTURES = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right"),
    *("adrenal_gland_left", "lung_left", "lung_right", "esophagus", "small_bowel", "duodenum", "colon"),
    *("urinary_bladder", "prostate", "sacrum", "vertebrae", "intervertebral_discs", "spinal_cord", "heart", "aorta"),
    *("inferior_vena_cava", "portal_vein_and_splenic_vein", "iliac_artery_left", "iliac_artery_right"),
    *("iliac_vena_left", "iliac_vena_right", "humerus_left", "humerus_right", "scapula_left", "scapula_right"),
    *("clavicula_left", "clavicula_right", "femur_left", "femur_right", "hip_left", "hip_right"),
    *("gluteus_maximus_left", "gluteus_maximus_right", "gluteus_medius_left", "gluteus_medius_right"),
    *("gluteus_minimus_left", "gluteus_minimus_right", "autochthon_left", "autochthon_right", "iliopsoas_left"),
    *("iliopsoas_right", "brain"),
)
SHARED = 31

_CASE = re.compile(r"s\d{4}")


def detect(folder: Path) -> bool:
    """Whether the folder, or one of its few subfolders, has subfolders s#### of which one holds mri.nii.gz or masks."""
    for _, folders, _ in walk(folder, 1):
        for name, path in folders.items():
            if _CASE.fullmatch(name):
                below, files = listing(path)
                if "mri" in scans_of(files):
                    return True
                if "segmentations" not in below:
                    break
    return False


def load(folder: Path) -> Dataset:
    """One case a folder s####, its masks to be merged in the order of the table, its split from meta.csv.

    The table is that of version 2, or, where masks have other names, its first 31 and then the names found. A case
    without a mask for a structure of the table does not label it.
    Raises DatasetError: no case with a scan; meta.csv without its columns.
    """
    homes, tables = [], []
    for _, folders, files in walk(folder, 1):
        homes += [path for name, path in folders.items() if _CASE.fullmatch(name)]
        tables += [files["meta.csv"]] if "meta.csv" in files else []
    masks = {home.name: scans_of(listing(home / "segmentations")[1]) for home in homes}
    labels = numbered(*table_of(set().union(*masks.values())))
    splits = _read_splits(tables[0]) if tables else {}
    cases, skipped = [], []
    for home in homes:
        name, scan = home.name, scans_of(listing(home)[1]).get("mri")
        if scan is None:
            skipped.append((name, f"{name}/mri.nii.gz not found"))
        else:
            cases.append(case_of_masks(name, scan, "mr", labels, masks[name], split=splits.get(name)))
    absent = sorted(splits.keys() - masks.keys())
    notes = [f"cases of meta.csv that are not here ({len(absent)}): {listed(absent)}"] if absent else []
    if not tables:
        notes.append("meta.csv is not there, so the official split is not known")
    return dataset_of(cases, skipped, folder, LOOKS_FOR, channels=("MRI",), labels=labels, notes=notes)


def table_of(names: set[str]) -> tuple[str, ...]:
    """Names of the structures in order of their values, given the names of the masks."""
    if names <= set(STRUCTURES):
        return STRUCTURES
    others = names - set(STRUCTURES[:SHARED])
    known = [name for name in STRUCTURES if name in others]
    return (*STRUCTURES[:SHARED], *known, *sorted(others - set(known)))


def _read_splits(file: Path) -> dict[str, Split | None]:
    """Split of each case by meta.csv."""
    expected = "image_id and split among them"
    table = read_table(file, expected)
    if not {"image_id", "split"} <= set(table.columns):
        raise DatasetError(f"columns {table.head!r}", file=file, expected=expected)
    return {scan_stem(Path(row["image_id"])): SPLIT_WORDS.get(row["split"].lower()) for _, row in table.rows}
