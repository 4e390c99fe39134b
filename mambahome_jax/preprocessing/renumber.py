"""Structures of a dataset without names, numbered 1, 2, 3, ... by the values that occur in any of its label maps.

Which these are is known when every case is done. Where they have gaps, label maps are written once more by the table of
all cases; elsewhere nothing is.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mambahome_jax.datasets.structures import numbering
from mambahome_jax.imaging.labels import replace_values
from mambahome_jax.imaging.volume import Volume, read_labels, write_volume
from mambahome_jax.patches import store
from mambahome_jax.patches.store import StoreEntry
from mambahome_jax.preprocessing.case import CaseJob


@dataclass(frozen=True)
class RenumberJob:
    """A case and the table of its dataset, number -> stored value. names: of the numbers."""

    job: CaseJob
    entry: StoreEntry
    values: Mapping[int, int]
    names: Mapping[int, str]


def stored_values(entries: Iterable[StoreEntry]) -> list[int]:
    """Stored values of the structures that occur in any case after resampling, in their order."""
    return sorted({entry.values.get(value, value) for entry in entries for value in entry.foreground_counts})


def renumber_jobs(
    jobs: Iterable[CaseJob], entries: Mapping[str, StoreEntry]
) -> tuple[dict[int, int], list[RenumberJob]]:
    """The table of all cases, number -> stored value, empty without gaps; and the cases that are numbered otherwise.

    entries: of the cases that are done, by id.
    """
    done = [(job, entries[job.case.id]) for job in jobs if job.case.id in entries]
    stored = stored_values(entry for _, entry in done)
    values = numbering(stored)
    names = names_of(stored)
    todo = [
        RenumberJob(job, entry, values, names)
        for job, entry in done
        if entry.class_counts is not None
        and _table(entry, values) != {value: value for value in entry.foreground_counts}
    ]
    return values, todo


def names_of(stored: Iterable[int]) -> dict[int, str]:
    """Number -> name of structures that have none, by their stored values."""
    return {number: f"label_{value}" for number, value in enumerate(stored, start=1)}


def renumber_case(task: RenumberJob) -> StoreEntry:
    """Write the label maps of a case by the dataset's numbers; the entry comes last.

    Raises DatasetError: what preprocessing wrote is damaged. OutputError: it cannot be written.
    """
    job, root = task.job, task.job.output / "store"
    table = _table(task.entry, task.values)
    label = replace_values(store.whole_label(root, job.case.id), table)
    if job.nifti:
        volume = read_labels(job.label_path)
        volume = dataclasses.replace(volume, array=replace_values(volume.array, table))
    else:
        # No file of the dataset holds these numbers.
        volume = Volume(label, np.array(task.entry.affine))
    values = {value: task.values[value] for value in table.values() if task.values.get(value, value) != value}
    store.remove_entry(root, job.case.id)
    job.label_path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(job.label_path, volume, names=task.names, warn=False)
    return store.rewrite_label(root, dataclasses.replace(task.entry, values=values), label, table)


def _table(entry: StoreEntry, values: Mapping[int, int]) -> dict[int, int]:
    """The case's own value of each structure in it -> the dataset's number."""
    numbers = {stored: number for number, stored in values.items()}
    stored = {value: entry.values.get(value, value) for value in entry.foreground_counts}
    return {value: numbers.get(old, old) for value, old in stored.items()}
