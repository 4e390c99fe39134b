"""Medical Segmentation Decathlon: imagesTr/, labelsTr/, imagesTs/ and dataset.json."""

from pathlib import Path
from typing import Any

from mambahome_jax.datasets.base import Case, Dataset, Split, channel_names, dataset_of, label_names, modality_of
from mambahome_jax.datasets.files import listed, scan_files
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import own_name

NAME = "decathlon"
LOOKS_FOR = 'a Medical Segmentation Decathlon task: imagesTr/, labelsTr/ and dataset.json with "modality"'
COVERS: tuple[str, ...] = ()


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
    channels, labels = channel_names(content, "modality", file), label_names(content.get("labels"), file)
    modality = modality_of(channels)
    if not (folder / "labelsTr").is_dir():
        raise DatasetError("the folder is missing", file=folder / "labelsTr", expected=LOOKS_FOR)

    files = {part: scan_files(folder / part) for part in ("imagesTr", "labelsTr")}
    images, maps = files.values()
    training, validation = (_stems(content, key, file) for key in ("training", "validation"))
    named = [stem for stem in (*training, *validation) if stem[0] != "."] or sorted(images | maps)
    cases, skipped = [], []
    for stem in dict.fromkeys(named):
        missing = [f"{part}/{stem}.nii.gz" for part in files if stem not in files[part]]
        if missing:
            skipped.append((stem, f"{' and '.join(missing)} not found"))
        else:
            split: Split = "val" if stem in validation else "train"
            cases.append(Case(stem, images[stem], maps[stem], split, modality))
    tests = scan_files(folder / "imagesTs")
    cases += [Case(stem, path, None, "test", modality) for stem, path in tests.items() if stem not in images]
    notes = []
    if left_out := sorted(set(images) - set(named)):
        number = counted(len(left_out), "file")
        notes.append(f"{number} of imagesTr left out, as dataset.json does not list them: {listed(left_out)}")
    if any(isinstance(entry, dict) and "fold" in entry for entry in content.get("training") or ()):
        notes.append("the folds that dataset.json gives are not read; write the one to train on as splits_final.json")
    name = str(content.get("name") or own_name(folder))
    return dataset_of(cases, skipped, folder, LOOKS_FOR, notes=notes, name=name, channels=channels, labels=labels)


def _stems(content: dict[str, Any], key: str, file: Path) -> list[str]:
    """Names of the images of a case list, whose entries are {"image": path, "label": path} or plain paths."""
    entries = content.get(key) if content.get(key) is not None else []
    paths = entries if isinstance(entries, list) else [None]
    paths = [entry.get("image") if isinstance(entry, dict) else entry for entry in paths]
    if not all(isinstance(path, str) and path for path in paths):
        expected = '{"image": path, "label": path}'
        raise DatasetError(f'"{key}" has entries without an image', file=file, expected=expected)
    return [scan_stem(Path(str(path).replace("\\", "/"))) for path in paths]
