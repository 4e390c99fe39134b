"""Structures that the dataset does not name, numbered and named once every case is done."""

from collections.abc import Callable, Sequence

from mambahome_jax.datasets.label_map import stray_values
from mambahome_jax.patches.store import StoreEntry
from mambahome_jax.preprocessing.case import CaseJob
from mambahome_jax.preprocessing.jobs import choose_workers
from mambahome_jax.preprocessing.renumber import names_of, renumber_case, renumber_jobs, stored_values
from mambahome_jax.support.processes import run_jobs

# Label maps whose values are replaced sooner than processes start.
_FEW = 8


def number_structures(
    jobs: Sequence[CaseJob],
    entries: dict[str, StoreEntry],
    num_workers: int | None,
    begin: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[dict[int, str], dict[int, int], list[tuple[str, BaseException]]]:
    """Number the structures of label maps without names by the values that occur, in `entries` too.

    begin: called before anything changes. say: gets notes on values that few voxels have, or none after resampling.
    Returns number -> name, number -> stored value (empty without gaps), and (id, error) of cases that failed; these
    leave `entries`.
    """
    counts = {job.case.id: entries[job.case.id].stored_counts for job in jobs if job.case.id in entries}
    for stray in stray_values({case: found for case, found in counts.items() if found}):
        say(f"Note: {stray}: look at it with mambahome check; it counts as a structure")
    stored = stored_values(entries.values())
    for value in sorted({value for found in counts.values() for value in found} - {*stored}):
        say(f"Note: label value {value} is in no voxel at this spacing, and is no structure")
    values, todo = renumber_jobs(jobs, entries)
    failed = []
    if todo:
        begin()
    workers = choose_workers([task.job for task in todo], num_workers, say)
    for task, result in run_jobs(renumber_case, todo, workers, threads=workers == 1 or len(todo) < _FEW):
        case = task.job.case.id
        if isinstance(result, StoreEntry):
            entries[case] = result
        else:
            failed.append((case, result))
            del entries[case]
    return names_of(stored), values, failed
