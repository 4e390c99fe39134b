"""The dataset that the flags of preprocess mean: read, joined, its structures chosen."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

from mambahome_jax.datasets import Dataset, load_dataset
from mambahome_jax.datasets.files import listed
from mambahome_jax.datasets.structures import (
    consecutive,
    join_datasets,
    merge_structures,
    read_structure_table,
    select_structures,
)
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.imaging.dicom_series import contents_of
from mambahome_jax.imaging.formats import suffix_of
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.preprocessing.findings import SCANS


def several(paths: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths of a flag that takes one or several."""
    return paths if isinstance(paths, tuple) else (paths,)


def read_datasets(paths: tuple[Path, ...], layouts: tuple[str, ...]) -> Dataset:
    """The dataset of a folder or a CSV file; of several, all of them joined by the names of their structures.

    layouts: none, to recognise them, one for all, or one for each path.
    Raises DatasetError: a folder that cannot be read, datasets that cannot be joined. ConfigError: no path, an unknown
    layout, another number of them.
    """
    if not paths:
        raise ConfigError("no folder is named; expected that of a dataset, or a CSV file")
    if len(layouts) not in (0, 1, len(paths)):
        raise ConfigError(f"--dataset has {len(layouts)} names for {len(paths)} folders; expected 1 or {len(paths)}")
    names = layouts if len(layouts) == len(paths) else (layouts[0] if layouts else None,) * len(paths)
    found = [load_dataset(path, name) for path, name in zip(paths, names, strict=True)]
    return join_datasets(found) if len(found) > 1 else found[0]


def with_scale(dataset: Dataset, spacing_scale: float | None) -> Dataset:
    """The dataset, its files read with this `spacing_scale`. Raises ConfigError: it is not above 0."""
    require_scale(spacing_scale)
    if spacing_scale is None:
        return dataset
    cases = tuple(dataclasses.replace(case, spacing_scale=spacing_scale) for case in dataset.cases)
    return dataclasses.replace(dataset, cases=cases)


def with_series(dataset: Dataset, uids: Collection[str]) -> Dataset:
    """The dataset with the DICOM series of these SeriesInstanceUIDs, where a folder holds several.

    Raises DatasetError: a UID that no folder of the dataset has.
    """
    if not uids:
        return dataset
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
    unknown = [uid for uid in uids if uid not in known]
    if unknown:
        expected = f"one of {listed(sorted(known))}" if known else "folders of DICOM slices"
        raise DatasetError(
            f"no series {listed(unknown)}", file=dataset.name, expected=expected, action="Check --series."
        )
    return dataclasses.replace(dataset, cases=tuple(cases))


def open_dataset(config: PreprocessConfig) -> Dataset:
    """Read every --input_path, join them where there are several, and keep or merge the structures asked for.

    The labels become 1, 2, 3, ...; every case knows which stored value stands for which.
    Raises DatasetError: a folder, a label map or a name of a structure that does not work. ConfigError: flags that
    contradict each other.
    """
    paths = several(config.input_path)
    if config.labels and config.label_map is not None:
        raise ConfigError("--labels and --label_map both choose structures; give one of them")
    dataset = with_series(with_scale(read_datasets(paths, config.dataset), config.spacing_scale), config.series)
    if config.only is not None:
        cases = tuple(case for case in dataset.cases if case.modality == config.only)
        if not cases:
            known = sorted({str(case.modality) for case in dataset.cases})
            found_only = f"--only {config.only}: no such case; the dataset says {', '.join(known)}"
            raise DatasetError(found_only, file=paths[0])
        dataset = dataclasses.replace(dataset, cases=cases)
    if config.label_map is not None:
        return merge_structures(dataset, read_structure_table(config.label_map))
    return select_structures(dataset, config.labels) if config.labels else consecutive(dataset)
