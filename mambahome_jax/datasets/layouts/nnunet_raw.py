"""nnU-Net raw: imagesTr/<case>_0000.nii.gz (a file a channel), labelsTr/<case>.nii.gz, imagesTs and dataset.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambahome_jax.datasets.base import Case, Dataset, Split, label_names, modality_of, scan_files
from mambahome_jax.datasets.files import CHANNEL
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, alternatives
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import one_form, own_name, path_in

NAME = "nnunet_raw"
LOOKS_FOR = 'nnU-Net raw: imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz and dataset.json with "channel_names"'
COVERS: tuple[str, ...] = ("decathlon", "panorama", "amos")


def detect(folder: Path) -> bool:
    """Whether dataset.json has "channel_names", or, as in version 1, "modality" with files named <case>_0000."""
    file = folder / "dataset.json"
    if not (folder / "imagesTr").is_dir() or not file.is_file():
        return False
    content = read_json(file)
    if "channel_names" in content:
        return True
    first = [stem for stem in scan_files(folder / "imagesTr") if stem.endswith("_0000")]
    # Where the label map is called _0000 too, it is the number of a case.
    return "modality" in content and bool(first) and scan_files(folder / "labelsTr").keys().isdisjoint(first)


def load(folder: Path) -> Dataset:
    """Cases of imagesTr (split "train") and imagesTs (split "test").

    A case lacking a channel or its label is skipped. Regions are read as nnU-Net writes them: each value of
    "regions_class_order" under the name of its region. The label "ignore" is not in the table.
    Raises DatasetError: damaged dataset.json, files that are no scans, no case.
    """
    file = folder / "dataset.json"
    content = read_json(file)
    ending = content.get("file_ending", ".nii.gz")
    if ending not in SCAN_SUFFIXES:
        action = "Convert the files to .nii.gz, labels too."
        raise DatasetError(
            f'"file_ending" is {ending!r}', file=file, expected=alternatives(SCAN_SUFFIXES), action=action
        )
    channels = _channels(content, file)
    labels, notes, hint = _labels(content, file)
    modality = modality_of(channels)
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    explicit = content.get("dataset")
    if isinstance(explicit, dict):
        found = {one_form(name): _explicit(folder, entry, file) for name, entry in explicit.items()}
        parts = [("train", found)]
    else:
        parts = [(split, _listed(folder, part, channels)) for part, split in (("Tr", "train"), ("Ts", "test"))]
    for part_split, found in parts:
        for name, (images, label, missing) in found.items():
            lacking = missing + ([] if label or part_split == "test" else [f"labelsTr/{name}{ending}"])
            if lacking:
                skipped.append((name, f"{' and '.join(lacking)} not found"))
                continue
            split: Split = "test" if part_split == "test" else "train"
            several = tuple(images) if len(images) > 1 else ()
            cases.append(Case(name, images[0], label, split, modality, images=several))
    if not cases:
        reason = f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise DatasetError(f"no complete case{reason}", file=folder, expected=LOOKS_FOR)
    name = str(content.get("name") or own_name(folder))
    return Dataset(name, channels, labels, tuple(cases), tuple(skipped), notes, hint)


_Files = tuple[list[Path], Path | None, list[str]]


def _listed(folder: Path, part: str, channels: tuple[str, ...]) -> dict[str, _Files]:
    """Images in order of channel, label and what is missing, of each case of imagesTr or imagesTs."""
    images, labels = scan_files(folder / f"images{part}"), scan_files(folder / f"labels{part}")
    names = {found[1] for found in map(CHANNEL.fullmatch, images) if found} | set(labels)
    result: dict[str, _Files] = {}
    for name in sorted(names):
        stems = [f"{name}_{number:04}" for number in range(len(channels))]
        missing = [
            f"images{part}/{stem} ({channel})"
            for stem, channel in zip(stems, channels, strict=True)
            if stem not in images
        ]
        result[name] = ([images[stem] for stem in stems if stem in images], labels.get(name), missing)
    return result


def _explicit(folder: Path, entry: Any, file: Path) -> _Files:
    """The same of an entry {"images": [path, ...], "label": path} of the optional table "dataset"."""
    try:
        images, label = [path_in(folder, path) for path in entry["images"]], path_in(folder, entry["label"])
    except (KeyError, TypeError, AttributeError) as error:
        expected = '{"images": [path, ...], "label": path}'
        raise DatasetError(f'entry {entry!r} of "dataset"', file=file, expected=expected) from error
    return images, label, [str(path) for path in [*images, label] if not path.is_file()]


def _channels(content: dict[str, Any], file: Path) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in content else "modality"
    table = content.get(key)
    if not isinstance(table, dict) or not table or sorted(table) != sorted(str(i) for i in range(len(table))):
        raise DatasetError(f'"{key}" is {table!r}', file=file, expected=f'"{key}": {{"0": "CT"}}, one entry a channel')
    return tuple(str(table[str(number)]) for number in range(len(table)))


def _labels(content: dict[str, Any], file: Path) -> tuple[dict[int, str], tuple[str, ...], str]:
    """Label table, notes and the hint for values outside of it."""
    table = content.get("labels")
    notes: tuple[str, ...] = ()
    if not isinstance(table, Mapping):
        return label_names(table, file), notes, ""
    hint = ""
    if "ignore" in table:
        hint = (
            f'Value {table["ignore"]} is nnU-Net\'s "ignore", voxels without any label, which is not supported: give '
            "them a label, or map them to 0 if they are background."
        )
    plain = {name: value for name, value in table.items() if name not in ("ignore", "background")}
    order = content.get("regions_class_order")
    if any(isinstance(value, list) for value in plain.values()):
        if not isinstance(order, list) or len(order) != len(plain):
            found = f'{len(plain)} regions with "regions_class_order" {order!r}'
            raise DatasetError(found, file=file, expected="one value a region")
        plain = dict(zip(plain, order, strict=True))
        notes = ("regions are trained as classes: a voxel belongs to the last region that holds it",)
    return label_names(plain, file), notes, hint
