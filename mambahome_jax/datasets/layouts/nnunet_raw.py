"""nnU-Net raw: imagesTr/<case>_0000.nii.gz (a file a channel), labelsTr/<case>.nii.gz, imagesTs and dataset.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambahome_jax.datasets.base import (
    Case,
    Dataset,
    Split,
    channel_names,
    dataset_of,
    label_names,
    modality_of,
    region_names,
)
from mambahome_jax.datasets.files import CHANNEL, scan_files
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import SCAN_SUFFIXES, alternatives
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import one_form, own_name, path_in

NAME = "nnunet_raw"
LOOKS_FOR = 'nnU-Net raw: imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz and dataset.json with "channel_names"'
COVERS: tuple[str, ...] = ("decathlon", "panorama", "amos")

# Images in order of channel, label, and what is missing, of a case.
_Files = tuple[list[Path], Path | None, list[str]]


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
    """Cases of imagesTr (split "train") and imagesTs (split "test"), or of the optional table "dataset".

    A case lacking a channel or its label is skipped. Regions are read as nnU-Net writes them: each value of
    "regions_class_order" under the name of its region. The label "ignore" is not in the table.
    Raises DatasetError: damaged dataset.json, files that are no scans, no case.
    """
    file = folder / "dataset.json"
    content = read_json(file)
    ending = content.get("file_ending", ".nii.gz")
    if ending not in SCAN_SUFFIXES:
        found, action = f'"file_ending" is {ending!r}', "Convert the files to .nii.gz, labels too."
        raise DatasetError(found, file=file, expected=alternatives(SCAN_SUFFIXES), action=action)
    channels = channel_names(content, "channel_names" if "channel_names" in content else "modality", file)
    labels, notes, hint = _labels(content, file)
    explicit = content.get("dataset")
    parts: list[tuple[Split, dict[str, _Files]]]
    if isinstance(explicit, dict):
        parts = [("train", {one_form(name): _explicit(folder, entry, file) for name, entry in explicit.items()})]
    else:
        parts = [("train", _listed(folder, "Tr", channels)), ("test", _listed(folder, "Ts", channels))]
    cases: list[Case] = []
    skipped: list[tuple[str, str]] = []
    for split, files in parts:
        for name, (images, label, missing) in files.items():
            if not label and split == "train":
                missing.append(f"labelsTr/{name}{ending}")
            if missing:
                skipped.append((name, f"{' and '.join(missing)} not found"))
            else:
                several = tuple(images) if len(images) > 1 else ()
                cases.append(Case(name, images[0], label, split, modality_of(channels), images=several))
    known = {"name": str(content.get("name") or own_name(folder)), "channels": channels, "labels": labels}
    return dataset_of(cases, skipped, folder, LOOKS_FOR, "no complete case", notes=notes, hint=hint, **known)


def _listed(folder: Path, part: str, channels: tuple[str, ...]) -> dict[str, _Files]:
    """The files of each case of imagesTr or imagesTs."""
    images, labels = scan_files(folder / f"images{part}"), scan_files(folder / f"labels{part}")
    names = {match[1] for match in map(CHANNEL.fullmatch, images) if match} | set(labels)
    cases: dict[str, _Files] = {}
    for name in sorted(names):
        stems = {f"{name}_{number:04}": channel for number, channel in enumerate(channels)}
        missing = [f"images{part}/{stem} ({channel})" for stem, channel in stems.items() if stem not in images]
        cases[name] = ([images[stem] for stem in stems if stem in images], labels.get(name), missing)
    return cases


def _explicit(folder: Path, entry: Any, file: Path) -> _Files:
    """The files of an entry {"images": [path, ...], "label": path} of the optional table "dataset"."""
    try:
        images, label = [path_in(folder, path) for path in entry["images"]], path_in(folder, entry["label"])
    except (KeyError, TypeError, AttributeError) as error:
        expected = '{"images": [path, ...], "label": path}'
        raise DatasetError(f'entry {entry!r} of "dataset"', file=file, expected=expected) from error
    return images, label, [str(path) for path in [*images, label] if not path.is_file()]


def _labels(content: Mapping[str, Any], file: Path) -> tuple[dict[int, str], tuple[str, ...], str]:
    """Label table, notes and the hint for values outside of it."""
    table = content.get("labels")
    if not isinstance(table, Mapping):
        return label_names(table, file), (), ""
    hint = (
        f'Value {table["ignore"]} is nnU-Net\'s "ignore", voxels without any label, which is not supported: give '
        "them a label, or map them to 0 if they are background."
        if "ignore" in table
        else ""
    )
    names, regions = region_names(content, file)
    note = "regions are trained as classes: a voxel belongs to the last region that holds it"
    return names, (note,) if regions else (), hint
