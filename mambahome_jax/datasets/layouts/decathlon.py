"""Medical Segmentation Decathlon: imagesTr/, labelsTr/, imagesTs/ and dataset.json."""

from pathlib import Path
from typing import Any

from mambahome_jax.datasets.base import Case, Dataset, label_names, modality_of, scan_files
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import own_name

NAME = "decathlon"
COVERS: tuple[str, ...] = ()
LOOKS_FOR = 'a Medical Segmentation Decathlon task: imagesTr/, labelsTr/ and dataset.json with "modality"'


def detect(folder: Path) -> bool:
    """Whether the folder has imagesTr/ and no dataset.json of the nnU-Net form ("channel_names")."""
    description = folder / "dataset.json"
    return (folder / "imagesTr").is_dir() and not (description.is_file() and "channel_names" in read_json(description))


def load(folder: Path) -> Dataset:
    """Cases of "training" (split "train"), of "validation" (split "val"), which MONAI's tables have, and of imagesTs
    (split "test", no label); names of channels and labels.

    Raises DatasetError: dataset.json missing, damaged or without its tables; labelsTr missing; no case at all.
    """
    file = folder / "dataset.json"
    content = read_json(file)
    channels = _channels(content, file)
    labels = label_names(content.get("labels"), file)
    modality = modality_of(channels)
    if not (folder / "labelsTr").is_dir():
        raise DatasetError("the folder is missing", file=folder / "labelsTr", expected=LOOKS_FOR)

    images, label_files = scan_files(folder / "imagesTr"), scan_files(folder / "labelsTr")
    training, validation = (
        [scan_stem(Path(path)) for path in _images_of(content, key, file)] for key in ("training", "validation")
    )
    listed = [stem for stem in (*training, *validation) if stem[0] != "."] or sorted(images | label_files)
    cases, skipped = [], []
    for stem in dict.fromkeys(listed):
        missing = [
            f"{part}/{stem}.nii.gz"
            for part, files in (("imagesTr", images), ("labelsTr", label_files))
            if stem not in files
        ]
        if missing:
            skipped.append((stem, f"{' and '.join(missing)} not found"))
        else:
            cases.append(
                Case(stem, images[stem], label_files[stem], "val" if stem in validation else "train", modality)
            )
    test = scan_files(folder / "imagesTs")
    cases += [Case(stem, path, None, "test", modality) for stem, path in test.items() if stem not in images]
    if not cases:
        found = f"no case with both files ({len(listed)} named)"
        raise DatasetError(found, file=folder, expected=LOOKS_FOR)
    left_out = sorted(set(images) - set(listed))
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (f"{len(left_out)} files of imagesTr are not listed in dataset.json and left out: {left_out[0]}, ...",)
    if any(isinstance(entry, dict) and "fold" in entry for entry in content.get("training") or ()):
        notes += ("the folds that dataset.json gives are not read; write the one to train on as splits_final.json",)
    name = str(content.get("name") or own_name(folder))
    return Dataset(name, channels, labels, tuple(cases), tuple(skipped), notes)


def _channels(content: dict[str, Any], file: Path) -> tuple[str, ...]:
    table = content.get("modality")
    if not isinstance(table, dict) or sorted(table) != sorted(str(i) for i in range(len(table))) or not table:
        raise DatasetError(
            f'"modality" is {table!r}', file=file, expected='"modality": {"0": "CT"}, one entry a channel'
        )
    return tuple(str(table[str(i)]) for i in range(len(table)))


def _images_of(content: dict[str, Any], key: str, file: Path) -> list[str]:
    """Image paths of a case list, whose entries are {"image": path, "label": path} or plain paths, / between."""
    entries = content.get(key)
    if entries is None:
        return []
    paths = (
        [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
        if isinstance(entries, list)
        else [None]
    )
    if not all(isinstance(path, str) and path for path in paths):
        raise DatasetError(
            f'"{key}" has entries without an image', file=file, expected='{"image": path, "label": path}'
        )
    return [str(path).replace("\\", "/") for path in paths]
