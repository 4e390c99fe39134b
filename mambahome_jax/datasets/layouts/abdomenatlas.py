"""AbdomenAtlas 1.0 and 1.1: BDMAP_<number>/ with ct.nii.gz, combined_labels.nii.gz and segmentations/."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, unlabelled_note
from mambahome_jax.datasets.files import listed, listing, plain, scans_of, walk
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.paths import own_name

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
    return any(_CASE.fullmatch(name) for _, folders, _ in walk(folder, 1) for name in folders) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a folder BDMAP_########; its files may lie in several folders of that name, in parts side by side.

    The label is combined_labels.nii.gz where it is there, else the masks in segmentations/; masks of other names than
    the table's are left out and noted. Many cases are published without their scan: they are skipped.
    Raises DatasetError: no case with a scan.
    """
    contents: dict[str, tuple[dict[str, Path], dict[str, Path]]] = {}
    for _, folders, _ in walk(folder, 1):
        for name in filter(_CASE.fullmatch, folders):
            files, masks = contents.setdefault(name, ({}, {}))
            files |= listing(folders[name])[1]
            masks |= scans_of(listing(folders[name] / "segmentations")[1])
    with_masks = [set(masks) for _, masks in contents.values() if masks]
    old = bool(with_masks) and all(found == set(OF_VERSION_1_0) for found in with_masks)
    labels = dict(enumerate(OF_VERSION_1_0 if old else STRUCTURES, start=1))
    unknown = sorted(set().union(*with_masks) - set(labels.values()))
    cases, skipped = [], []
    for name, (files, masks) in sorted(contents.items()):
        scans = scans_of(files)
        if "ct" not in scans:
            reason = f"{name}/ct.nii.gz not found; cases 5196 to 9262 of version 1.1 are published without their scans"
            skipped.append((name, reason))
            continue
        combined = scans.get("combined_labels")
        known = () if combined else tuple((value, masks[part]) for value, part in labels.items() if part in masks)
        partial = tuple(value for value, _ in known) if 0 < len(known) < len(labels) else None
        cases.append(
            Case(name, scans["ct"], combined, None, "ct", masks=known, labelled=partial, may_be_empty=False),
        )
    if not cases:
        reason = f" ({skipped[0][1]})" if skipped else ""
        raise DatasetError(f"no case with a scan{reason}", file=folder, expected=LOOKS_FOR)
    notes = unlabelled_note(cases)
    if unknown:
        notes += (f"masks that the table of AbdomenAtlas 1.1 does not name are left out: {listed(unknown)}",)
    return Dataset(own_name(folder), ("CT",), labels, tuple(cases), tuple(skipped), notes)
