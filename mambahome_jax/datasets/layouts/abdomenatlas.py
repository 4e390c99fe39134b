"""AbdomenAtlas 1.0 and 1.1: BDMAP_<number>/ with ct.nii.gz, combined_labels.nii.gz and segmentations/."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, case_of_masks, dataset_of, numbered
from mambahome_jax.datasets.files import case_folders, listed, listing, plain, scans_of

NAME = "abdomenatlas"
LOOKS_FOR = "AbdomenAtlas: BDMAP_########/ct.nii.gz with combined_labels.nii.gz or segmentations/<structure>.nii.gz"
COVERS: tuple[str, ...] = ("published",)

# Of version 1.1, as its authors list them; version 1.0 has the first nine.
STRUCTURES = (
    *("aorta", "gall_bladder", "kidney_left", "kidney_right", "liver", "pancreas", "postcava", "spleen", "stomach"),
    *("adrenal_gland_left", "adrenal_gland_right", "bladder", "celiac_trunk", "colon", "duodenum", "esophagus"),
    *("femur_left", "femur_right", "hepatic_vessel", "intestine", "lung_left", "lung_right"),
    *("portal_vein_and_splenic_vein", "prostate", "rectum"),
)
OF_VERSION_1_0 = STRUCTURES[:9]

_CASE = re.compile(r"BDMAP_\w?\d{7,8}")


def detect(folder: Path) -> bool:
    """Whether the folder, or one of its few subfolders, has subfolders BDMAP_########."""
    return any(case_folders(folder, _CASE)) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a folder BDMAP_########; its files may lie in several folders of that name, in parts side by side.

    The label is combined_labels.nii.gz where it is there, else the masks in segmentations/. Many cases are published
    without their scan: they are skipped. Raises DatasetError: no case with a scan.
    """
    scans: dict[str, dict[str, Path]] = {}
    masks: dict[str, dict[str, Path]] = {}
    for name, path in case_folders(folder, _CASE):
        scans.setdefault(name, {}).update(listing(path)[1])
        masks.setdefault(name, {}).update(scans_of(listing(path / "segmentations")[1]))
    tables = [set(files) for files in masks.values() if files]
    old = bool(tables) and all(names == set(OF_VERSION_1_0) for names in tables)
    labels = numbered(*(OF_VERSION_1_0 if old else STRUCTURES))
    cases, skipped = [], []
    for name in sorted(scans):
        files = scans_of(scans[name])
        if "ct" not in files:
            reason = f"{name}/ct.nii.gz not found; cases 5196 to 9262 of version 1.1 are published without their scans"
            skipped.append((name, reason))
        elif "combined_labels" in files:
            cases.append(Case(name, files["ct"], files["combined_labels"], None, "ct", may_be_empty=False))
        else:
            cases.append(case_of_masks(name, files["ct"], "ct", labels, masks[name]))
    unknown = sorted(set().union(*tables) - set(labels.values()))
    notes = [f"masks that the table of AbdomenAtlas 1.1 does not name are left out: {listed(unknown)}"]
    notes = notes if unknown else []
    return dataset_of(cases, skipped, folder, LOOKS_FOR, channels=("CT",), labels=labels, notes=notes)
