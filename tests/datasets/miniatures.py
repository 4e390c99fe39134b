"""A miniature of every layout, with the names, headers and faults of the published datasets and phantoms for scans.

Each function writes one into a folder and returns what reading it has to give, down to the voxel: labels are drawn on
a grid in RAS and stored in the axes of the published files, so that bringing them back to RAS gives the drawn array.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mambahome_jax.datasets.layouts.abdomenatlas import STRUCTURES as ATLAS
from mambahome_jax.datasets.layouts.totalsegmentator_mri import STRUCTURES as TOTAL
from tests.datasets.drawn import draw, first_voxel, scan, write


@dataclass(frozen=True)
class Expected:
    """What has to come of one case: label (24, 20, 16) in RAS with the values of the prepared dataset, or None."""

    label: np.ndarray | None
    split: str | None
    modality: str
    patient: str
    channels: int = 1
    labelled: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Miniature:
    """A dataset on disk and what reading it has to give. skipped: case -> words of the reason."""

    folder: Path
    layout: str
    labels: Mapping[int, str]
    cases: Mapping[str, Expected]
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


def abdomenatlas(root: Path) -> Miniature:
    """Two usable cases, one of them with masks alone; one without its scan, one that nobody labelled."""
    labels = dict(enumerate(ATLAS, start=1))
    whole, masks = draw(labels), draw(labels, 3)
    write(root / "BDMAP_00000001/ct.nii.gz", scan(whole, "ct"), "LPS")
    write(root / "BDMAP_00000001/combined_labels.nii.gz", whole, "LPS", "uint8")
    (root / "BDMAP_00000001/._ct.nii.gz").write_bytes(b"Mac OS X")
    write(root / "BDMAP_00000002/ct.nii.gz", scan(masks, "ct", 1), "RAS")
    for case, drawn in (("BDMAP_00000001", whole), ("BDMAP_00000002", masks), ("BDMAP_00005196", masks)):
        for value, name in labels.items():
            mask = drawn == value
            if name == "liver":
                # One voxel of the aorta: the later of the table has it.
                mask = mask | first_voxel(drawn == 1)
            axes, dtype = ("LPS", "uint8") if case == "BDMAP_00000001" else ("RAS", "float64")
            write(root / f"{case}/segmentations/{name}.nii.gz", mask, axes, dtype)
    write(root / "BDMAP_00000007/ct.nii.gz", scan(whole, "ct", 2), "LPS")
    write(root / "BDMAP_00000007/combined_labels.nii.gz", whole * 0, "LPS", "uint8")
    merged = np.where(first_voxel(masks == 1), 5, masks)
    cases = {
        name: Expected(label, None, "ct", name)
        for name, label in (("BDMAP_00000001", whole), ("BDMAP_00000002", merged))
    }
    skipped = {
        "BDMAP_00005196": ("ct.nii.gz not found", "without their scans"),
        "BDMAP_00000007": ("combined_labels.nii.gz", "empty"),
    }
    remarks = {"BDMAP_00000002": "1 voxel lies in two masks (most: 1 in aorta and liver)"}
    return Miniature(root, "abdomenatlas", labels, cases, skipped, remarks)


def totalsegmentator_mri(root: Path, version: int = 2) -> Miniature:
    """Cases in odd axes, with masks of every structure; one empty, one without its scan; splits in meta.csv."""
    names = TOTAL if version == 2 else (*TOTAL[:31], "femur_left", "fibula", "quadriceps_femoris_left", "thigh_left")
    labels = dict(enumerate(names, start=1))
    rows = [("s0001", "train", "RAS"), ("s0002", "train", "PSR"), ("s0005", "test", "LPI"), ("s0026", "train", "RAS")]
    cases = {}
    for number, (name, split, axes) in enumerate(rows):
        label = draw(labels, number) * (name != "s0026")
        write(root / f"{name}/mri.nii.gz", scan(label, "mr", number), axes, "float32")
        for value, structure in labels.items():
            write(root / f"{name}/segmentations/{structure}.nii.gz", label == value, axes, "uint8")
        cases[name] = Expected(label, split, "mr", name)
    write(root / "s0031/segmentations/liver.nii.gz", draw([5]), dtype="uint8")
    separator = ";" if version == 2 else ","
    lines = [("image_id", "institute", "split"), *((name, "A", split) for name, split, _ in rows)]
    (root / "meta.csv").write_text("".join(separator.join(line) + "\n" for line in lines))
    del cases["s0026"]
    skipped = {"s0026": ("masks are empty", "Nobody labelled"), "s0031": ("mri.nii.gz not found",)}
    return Miniature(root, "totalsegmentator_mri", labels, cases, skipped)


def totalsegmentator_mri_v1(root: Path) -> Miniature:
    """Version 1, whose table is another beyond the 31st structure."""
    return totalsegmentator_mri(root, version=1)


def panorama(root: Path) -> Miniature:
    """Batches of scans, the clone of the label repository, a patient with two studies, stray values, odd headers."""
    names = ("pdac_lesion", "veins", "arteries", "pancreas_parenchyma", "pancreatic_duct", "common_bile_duct")
    labels = dict(enumerate(names, start=1))
    studies = {
        "100000_00001": ("batch_1", "manual", "LPS", "float64", "qform", labels),
        "100000_00002": ("batch_1", "automatic", "LPS", "uint16", "both", [2, 3, 4]),
        "100001_00001": ("batch_2", "automatic", "SLP", "float64", "zero sform", [2, 3, 4, 5]),
        "101994_00001": ("batch_2", "automatic", "RAS", "float64", "both", [1, 2, 4, 7, 8]),
    }
    cases = {}
    for number, (study, (batch, kind, axes, dtype, forms, values)) in enumerate(studies.items()):
        label = draw(values, number)
        write(root / batch / f"{study}_0000.nii.gz", scan(label, "ct", number), axes)
        write(root / f"panorama_labels/{kind}_labels/{study}.nii.gz", label, axes, dtype, forms)
        cases[study] = Expected(label, None, "ct", study.split("_")[0])
    write(root / "panorama_labels/automatic_labels/100433_00001.nii.gz", draw([2, 3, 4]), dtype="uint16")
    (root / "panorama_labels/.git").mkdir()
    (root / "panorama_labels/.git/HEAD").write_text("0123456789abcdef\n")
    del cases["101994_00001"]
    skipped = {
        "101994_00001": ("unknown label values 7, 8", "1 pdac_lesion", "git pull"),
        "100433_00001": ("100433_00001.nii.gz has no scan", "is a batch missing?"),
    }
    return Miniature(root, "panorama", labels, cases, skipped)


def amos(root: Path) -> Miniature:
    """CT and MR in one folder, Tr, Va and Ts, the misspelt name, entries as objects, all in a folder of the archive."""
    home = root / "amos22"
    names = ["spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota"]
    names += ["postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder"]
    labels = dict(enumerate([*names, "prostate/uterus"], start=1))
    cases, lists = {}, {"training": [], "validation": [], "test": []}
    rows = [("Tr", "0001"), ("Tr", "0004"), ("Tr", "0507"), ("Va", "0010"), ("Va", "0551"), ("Ts", "0600")]
    split_of = {"Tr": ("train", "training"), "Va": ("val", "validation"), "Ts": ("test", "test")}
    for number, (part, case) in enumerate(rows):
        modality = "ct" if int(case) <= 500 else "mr"
        label = draw(range(1, 16 if modality == "ct" else 14), number)
        name = f"amos_{case}"
        write(home / f"images{part}/{name}.nii.gz", scan(label, modality, number), "LAS" if number % 2 else "LPS")
        entry = {"image": f"./images{part}/{name}.nii.gz"}
        if part != "Ts" and case != "0004":
            axes = "LAS" if number % 2 else "LPS"
            write(home / f"labels{part}/{name}.nii.gz", label, axes, "float32")
            entry["label"] = f"./labels{part}/{name}.nii.gz"
        split, key = split_of[part]
        lists[key].append(entry)
        cases[name] = Expected(label if part != "Ts" else None, split, modality, name)
    lists["validation"].append({"image": "./imagesVa/amos_0020.nii.gz", "label": "./labelsVa/amos_0020.nii.gz"})
    for folder in ("imagesTr", "labelsTr"):
        (home / folder / "._amos_0001.nii.gz").write_bytes(b"Mac OS X")
    (root / "__MACOSX").mkdir()
    table = {"0": "background"} | {str(value): name for value, name in labels.items()}
    (home / "dataset.json").write_text(json.dumps({"name": "AMOS", "licence": "x", "labels": table, **lists}))
    del cases["amos_0004"]
    skipped = {
        "amos_0004": ("labelsTr/amos_0004.nii.gz not found",),
        "amos_0020": ("imagesVa/amos_0020.nii.gz not found", "dataset.json lists"),
    }
    return Miniature(root, "amos", labels | {8: "aorta"}, cases, skipped)


def feta(root: Path) -> Miniature:
    """BIDS names of two reconstructions, one of them also as .nii; a label whose scan is not there."""
    names = ("external_cerebrospinal_fluid", "grey_matter", "white_matter", "ventricles", "cerebellum")
    labels = dict(enumerate((*names, "deep_grey_matter", "brainstem"), start=1))
    cases = {}
    for number, (subject, method, axes) in enumerate(
        [("sub-001", "mial", "RAS"), ("sub-041", "irtk", "LSA"), ("sub-080", "irtk", "AIR")]
    ):
        stem, label = f"{subject}_rec-{method}", draw(labels, number)
        write(root / f"{subject}/anat/{stem}_T2w.nii.gz", scan(label, "mr", number), axes, "float32")
        write(root / f"{subject}/anat/{stem}_dseg.nii.gz", label, axes, "float64")
        (root / f"{subject}/anat/{stem}_T2w.json").write_text("{}")
        cases[stem] = Expected(label, None, "mr", subject)
    write(root / "sub-041/anat/sub-041_rec-irtk_T2w.nii", draw([]), "LSA", "float32")
    write(root / "sub-060/anat/sub-060_rec-irtk_dseg.nii.gz", draw(labels), dtype="uint8")
    (root / "participants.tsv").write_text("participant_id\tPathology\tGestational age\n")
    return Miniature(root, "feta", labels, cases, {"sub-060_rec-irtk": ("_T2w.nii.gz not found",)})


def mvseg(root: Path) -> Miniature:
    """Ultrasound in train, val and test; the test cases have no labels."""
    labels = {1: "posterior_leaflet", 2: "anterior_leaflet"}
    cases = {}
    for number, (split, case) in enumerate([("train", "001"), ("train", "002"), ("val", "001"), ("test", "001")]):
        name, label = f"{split}_{case}", draw(labels, 7 * number)
        write(root / f"{split}/{name}-US.nii.gz", scan(label, "us", number), "LPS", "uint8")
        if split != "test":
            write(root / f"{split}/{name}-label.nii.gz", label, "LPS", "uint8")
        cases[name] = Expected(label if split != "test" else None, split, "us", name)
    return Miniature(root, "mvseg", labels, cases)


def decathlon(root: Path) -> Miniature:
    """Two channels as a fourth axis, label values with a gap, hidden files, no background in the table."""
    labels = {1: "peripheral_zone", 2: "transition_zone"}
    cases, entries = {}, []
    for number, name in enumerate(["prostate_00", "prostate_02"]):
        label = draw(labels, number)
        image = np.stack([scan(label, "mr", number), 2 * scan(label, "mr", number + 5)], axis=-1)
        write(root / f"imagesTr/{name}.nii.gz", image, "LAS", "float32")
        write(root / f"labelsTr/{name}.nii.gz", np.where(label == 2, 4, label), "LAS", "float32")
        entries.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
        cases[name] = Expected(label, "train", "mr", name, channels=2)
    write(root / "imagesTs/prostate_03.nii.gz", np.stack([draw([1]), draw([2])], axis=-1), "LAS")
    cases["prostate_03"] = Expected(None, "test", "mr", "prostate_03", channels=2)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (root / folder / "._prostate_00.nii.gz").write_bytes(b"Mac OS X")
    content = {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"1": "peripheral_zone", "4": "transition_zone"},
        "training": entries,
        "test": ["./imagesTs/prostate_03.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return Miniature(root, "decathlon", labels, cases)


def nnunet_raw(root: Path) -> Miniature:
    """A file a channel; a case that lacks one, a case that lacks its label; a fold."""
    labels = {1: "edema", 2: "core", 3: "enhancing"}
    cases = {}
    for number, name in enumerate(["BRATS_001", "BRATS_002", "BRATS_003", "BRATS_004", "BRATS_010"]):
        part, label = "Ts" if name == "BRATS_010" else "Tr", draw(labels, number)
        for channel in range(1 if name == "BRATS_003" else 2):
            image = scan(label, "mr", 10 * number + channel)
            write(root / f"images{part}/{name}_{channel:04}.nii.gz", image, "LPS", "float32")
        if name not in ("BRATS_004", "BRATS_010"):
            write(root / f"labels{part}/{name}.nii.gz", label, "LPS", "uint8")
        split = {"BRATS_002": "val", "BRATS_010": "test"}.get(name, "train")
        cases[name] = Expected(label if part == "Tr" else None, split, "mr", name, channels=2)
    content = {
        "channel_names": {"0": "FLAIR", "1": "T1w"},
        "labels": {"background": 0} | {name: value for value, name in labels.items()},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    (root / "splits_final.json").write_text(json.dumps([{"train": ["BRATS_001"], "val": ["BRATS_002"]}]))
    skipped = {"BRATS_003": ("BRATS_003_0001 (T1w) not found",), "BRATS_004": ("labelsTr/BRATS_004.nii.gz not found",)}
    for name in skipped:
        del cases[name]
    return Miniature(root, "nnunet_raw", labels, cases, skipped)


def images_labels(root: Path) -> Miniature:
    """images/ and labels/ with a table of names."""
    labels, cases = {1: "liver", 2: "spleen"}, {}
    for number, name in enumerate(["a", "b"]):
        label = draw(labels, number)
        write(root / f"images/{name}.nii.gz", scan(label, "ct", number), "LPS")
        write(root / f"labels/{name}.nii.gz", label, "LPS", "float64")
        cases[name] = Expected(label, None, "ct", name)
    (root / "dataset.json").write_text(json.dumps({"labels": {"liver": 1, "spleen": 2}, "channels": ["CT"]}))
    return Miniature(root, "images_labels", labels, cases)


def published(root: Path) -> Miniature:
    """What the published training script reads; the labels have no names."""
    cases = {}
    for number, name in enumerate(["p1", "p2"]):
        label = draw([1, 2], number)
        write(root / f"{name}/{name}_ct.nii.gz", scan(label, "ct", number), "LPS")
        write(root / f"{name}/{name}_labels.nii.gz", label, "LPS", "uint8")
        cases[name] = Expected(label, None, "ct", name)
    return Miniature(root, "published", {1: "label_1", 2: "label_2"}, cases)


def table(root: Path) -> Miniature:
    """A CSV file with splits, modalities, patients and rows that cannot be used."""
    labels, cases, rows = {1: "liver", 2: "tumour"}, {}, []
    for number, (split, modality) in enumerate([("train", "ct"), ("val", "mr"), ("test", "ct")]):
        name, label = f"case{number}", draw(labels, number)
        write(root / f"files/{name}/volume.nii.gz", scan(label, modality, number), "LPS")
        write(root / f"files/{name}/truth.nii.gz", label, "LPS", "uint8")
        files = (f"files/{name}/volume.nii.gz", f"files/{name}/truth.nii.gz")
        rows.append((name, *files, split, modality, f"patient{number // 2}"))
        cases[name] = Expected(label, split, modality, f"patient{number // 2}")
    rows.append(("gone", "files/gone.nii.gz", "", "train", "ct", ""))
    rows.append(("odd", rows[0][1], "", "training", "ct", ""))
    with (root / "cases.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "image", "label", "split", "modality", "patient"), *rows])
    (root / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "tumour"}}))
    skipped = {"gone": ("line 5", "files/gone.nii.gz not found"), "odd": ("line 6", "split 'training'")}
    return Miniature(root, "csv", labels, cases, skipped)


MINIATURES: dict[str, Callable[[Path], Miniature]] = {
    make.__name__: make
    for make in (
        *(abdomenatlas, totalsegmentator_mri, totalsegmentator_mri_v1, panorama, amos, feta, mvseg),
        *(decathlon, nnunet_raw, images_labels, published, table),
    )
}
