"""The dataset that the flags of check and preprocess mean: read, joined, its structures chosen; or scans alone."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.files import channels_of, listed, listing
from mambahome_jax.datasets.find_scans import find_scans, join_channels
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import (
    consecutive,
    join_datasets,
    merge_structures,
    read_structure_table,
    select_structures,
)
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import CheckConfig, PreprocessConfig
from mambahome_jax.imaging.dicom import contents_of, files_below, files_in
from mambahome_jax.imaging.formats import identify, suffix_of
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.imaging.volume import read_grid
from mambahome_jax.preprocessing.findings import SCANS
from mambahome_jax.support.paths import own_name

# Storage classes of images by their first number after this (DICOM PS3.6, annex A), and what they are.
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_MODALITIES: dict[str, Modality] = {"2": "ct", "3": "us", "4": "mr", "6": "us"}


def several(paths: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """Give the paths of a flag that takes one or several."""
    return paths if isinstance(paths, tuple) else (paths,)


def open_dataset(config: PreprocessConfig) -> Dataset:
    """Read every --input_path, join them, and number the structures that are asked for 1, 2, 3, ...

    Raises DatasetError: a folder, a label map or a name that does not work. ConfigError: flags that contradict.
    """
    paths = several(config.input_path)
    if config.labels and config.label_map is not None:
        raise ConfigError("--labels and --label_map both choose structures; give one of them")
    dataset = _by_flags(_read_datasets(paths, config.dataset), config)
    if config.only is not None:
        cases = tuple(case for case in dataset.cases if case.modality == config.only)
        if not cases:
            known = sorted({str(case.modality) for case in dataset.cases})
            found = f"--only {config.only}: no such case; the dataset says {', '.join(known)}"
            raise DatasetError(found, file=paths[0])
        dataset = dataclasses.replace(dataset, cases=cases)
    if config.label_map is not None:
        return merge_structures(dataset, read_structure_table(config.label_map))
    return select_structures(dataset, config.labels) if config.labels else consecutive(dataset)


def open_checked(config: CheckConfig) -> Dataset:
    """Read the dataset as preprocess takes it, else the scans of a folder without labels. Raises as `open_dataset`."""
    paths = several(config.folder)
    try:
        dataset = consecutive(_read_datasets(paths, config.dataset))
    except DatasetError:
        scans: Dataset | None = None
        if not config.dataset and len(paths) == 1 and _holds_scans_alone(paths[0]):
            # Where there is no scan either, what a dataset looks like is what helps.
            with contextlib.suppress(DatasetError):
                scans = _read_scans(paths[0])
        if scans is None:
            raise
        dataset = scans
    return _by_flags(dataset, config)


def _read_datasets(paths: tuple[Path, ...], layouts: tuple[str, ...]) -> Dataset:
    """Read a folder or CSV file, or join several. layouts: none to recognise them, one for all, or one for each."""
    if not paths:
        raise ConfigError("no folder is named; expected that of a dataset, or a CSV file")
    if len(layouts) not in (0, 1, len(paths)):
        raise ConfigError(f"--dataset has {len(layouts)} names for {len(paths)} folders; expected 1 or {len(paths)}")
    names = layouts if len(layouts) == len(paths) else (layouts[0] if layouts else None,) * len(paths)
    datasets = [load_dataset(path, name) for path, name in zip(paths, names, strict=True)]
    return join_datasets(datasets) if len(datasets) > 1 else datasets[0]


def _by_flags(dataset: Dataset, config: CheckConfig | PreprocessConfig) -> Dataset:
    """Have the files read by --spacing_scale and --series. Raises ConfigError, DatasetError."""
    require_scale(config.spacing_scale)
    if config.spacing_scale is not None:
        cases = tuple(dataclasses.replace(case, spacing_scale=config.spacing_scale) for case in dataset.cases)
        dataset = dataclasses.replace(dataset, cases=cases)
    return _with_series(dataset, config.series) if config.series else dataset


def _with_series(dataset: Dataset, uids: Collection[str]) -> Dataset:
    """Choose the DICOM series of these SeriesInstanceUIDs where a folder holds several; some folder has each."""
    cases, known = [], set()
    for case in dataset.cases:
        if case.images or suffix_of(case.image.name) or not case.image.is_dir():
            cases.append(case)
            continue
        series = [one.uid for one in contents_of(case.image).series]
        known |= set(series)
        chosen = tuple(uid for uid in series if uid in uids)
        # Of a folder of scans alone each series is a case.
        if dataset.layout != SCANS:
            cases.append(dataclasses.replace(case, series=chosen if len(series) > 1 else ()))
        elif set(case.series or series) & set(chosen):
            cases.append(case)
    if unknown := [uid for uid in uids if uid not in known]:
        expected = f"one of {listed(sorted(known))}" if known else "folders of DICOM slices"
        found = f"no series {listed(unknown)}"
        raise DatasetError(found, file=dataset.name, expected=expected, action="Check --series.")
    return dataclasses.replace(dataset, cases=tuple(cases))


def _holds_scans_alone(path: Path) -> bool:
    """Tell whether a path that is no dataset may hold scans alone; else the fault of the dataset is to be told."""
    if path.is_file():
        return bool(suffix_of(path.name))
    folders, files = listing(path)
    labelled = any(name.lower().startswith(("label", "segmentation")) for name in folders)
    return not labelled and "dataset.json" not in files


def _read_scans(path: Path) -> Dataset:
    """Read the scans that `infer` would find, with the channels of the first that can be read. Raises DatasetError."""
    found = find_scans(path)
    files = channels_of([scan.case for scan in found.scans])
    scans, incomplete = join_channels(path, found.scans, max(map(len, files.values()), default=1))
    cases = tuple(
        Case(
            id=scan.case,
            image=scan.path,
            label=None,
            split=None,
            modality=scan.modality or _dicom_modality(scan.path),
            images=scan.channels,
            series=scan.series,
        )
        for scan in scans
    )
    channels = _count_channels(cases)
    return Dataset(
        name=own_name(path),
        channels=("image",) if channels == 1 else tuple(f"channel {number}" for number in range(channels)),
        labels={},
        cases=cases,
        skipped=tuple((failure["id"], failure["reason"]) for failure in [*found.failures, *incomplete]),
        notes=found.notes,
        layout=SCANS,
    )


def _dicom_modality(path: Path) -> Modality | None:
    """Read what DICOM slices say that they are; None of other scans and other classes of images."""
    # What cannot be read is reported when its turn comes.
    with contextlib.suppress(DatasetError, OSError):
        files = [path] if path.is_file() else files_in(path) or files_below(path)
        identity = identify(files[0]) if files else None
        if identity is not None:
            return _MODALITIES.get(identity.sop_class.removeprefix(_STORAGE).partition(".")[0])
    return None


def _count_channels(cases: Iterable[Case]) -> int:
    for case in cases:
        with contextlib.suppress(DatasetError):
            shape = read_grid(case.image, spacing_scale=1, series=case.series).array.shape
            return len(case.images) or (shape[3] if len(shape) == 4 else 1)
    return 1
