"""What an earlier run of preprocess left in its output folder: known by record, removed where it belongs to no case."""

import contextlib
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path

from mambahome_jax.datasets.files import fault_of_name, listed, listing
from mambahome_jax.datasets.prepared import DESCRIPTION, begin_prepared
from mambahome_jax.errors import ConfigError, DatasetError, OutputError
from mambahome_jax.patches.store import CASE_FILE, read_entry, remove_index
from mambahome_jax.preprocessing.case import CaseJob
from mambahome_jax.support.files import not_written, read_json
from mambahome_jax.support.paths import one_form

_NAMED = 20
_ARRAYS = ("image", "label")


def require_own(output: Path, cases: Iterable[str]) -> None:
    """Raises ConfigError: the folder is a dataset as downloaded, of which files would be replaced.

    cases: ids of those that are about to be written.
    """
    if (output / "store").is_dir():
        return
    file = output / DESCRIPTION
    try:
        content = read_json(file)
    except DatasetError:
        # Missing, or damaged by whatever stopped an earlier run.
        content = {}
    if not content.keys().isdisjoint(("cases", "unfinished")):
        return
    names = {f"{case}.nii.gz" for case in cases}
    there = [path for part in ("images", "labels") for path in listing(output / part)[1].values()]
    foreign = [file] if content else [path for path in there if one_form(path.name) in names]
    if foreign:
        raise ConfigError(f"{foreign[0]}: not written by preprocess, but would be replaced. Name another --output_path")


def earlier_cases(output: Path) -> set[str]:
    """Ids of all cases that an earlier run wrote to this folder or had begun to, whether or not it reached its end."""
    try:
        content = read_json(output / DESCRIPTION)
    except DatasetError:
        content = {}
    cases, unfinished = content.get("cases"), content.get("unfinished")
    named = [entry.get("id") for entry in cases if isinstance(entry, dict)] if isinstance(cases, list) else []
    named += unfinished if isinstance(unfinished, list) else []
    store = output / "store"
    stored = [folder.name for folder in store.iterdir() if _is_case(folder)] if store.is_dir() else []
    return {one_form(name) for name in (*named, *stored) if isinstance(name, str) and not fault_of_name(name)}


def begin(output: Path, earlier: Iterable[str], jobs: Iterable[CaseJob]) -> None:
    """Mark the folder as unfinished before anything in it changes. Raises OutputError."""
    # Old entries would be read beside new voxels if this run does not reach its end.
    remove_index(output / "store")
    begin_prepared(output, sorted({*earlier, *(job.case.id for job in jobs)}))


@contextlib.contextmanager
def begun(output: Path, earlier: Iterable[str], jobs: Sequence[CaseJob]) -> Iterator[None]:
    """`begin`; after an OutputError the mark is taken back where nothing was written yet. Raises OutputError."""
    begin(output, earlier, jobs)
    try:
        yield
    except OutputError:
        if not any(_existing(output, job.case.id) for job in jobs) and not set(earlier):
            with contextlib.suppress(OSError):
                (output / DESCRIPTION).unlink(missing_ok=True)
        raise


def remove_stale(output: Path, jobs: Sequence[CaseJob], say: Callable[[str], None]) -> set[str]:
    """Remove, before the work begins, what an earlier run wrote and no case of this one has; returns `earlier_cases`.

    Before it, as on some file systems the files of a case and of one spelt otherwise are the same.
    Raises OutputError: it cannot be removed.
    """
    earlier = earlier_cases(output)
    wanted = {path for job in jobs for path in (*_written(job), job.output / "store" / job.case.id)}
    stale = {case: _existing(output, case, wanted) for case in sorted(earlier)}
    stale = {case: paths for case, paths in stale.items() if paths}
    if not stale:
        return earlier
    begin(output, earlier, jobs)
    for paths in stale.values():
        _remove(paths)
    present = {job.case.id for job in jobs}
    gone, changed = ([case for case in stale if (case in present) is kept] for kept in (False, True))
    parts = [f"{_cases(gone)} that this dataset no longer has: {listed(gone, _NAMED)}"] if gone else []
    parts += [f"files no longer made of {_cases(changed)}: {listed(changed, _NAMED)}"] if changed else []
    say(f"Removed from the output: {'; '.join(parts)}")
    return earlier


def remove_failed(output: Path, failed: Iterable[str], earlier: set[str], say: Callable[[str], None]) -> None:
    """Remove what the output holds of cases that failed now. Raises OutputError: it cannot be removed."""
    lost = []
    for case in failed:
        paths = _existing(output, case)
        _remove(paths)
        lost += [case] if paths and case in earlier else []
    if lost:
        say(f"Removed from the output: {_cases(lost)} of an earlier run, failing now: {listed(lost, _NAMED)}")


def say_foreign(output: Path, jobs: Iterable[CaseJob], say: Callable[[str], None]) -> None:
    """Name the files in images/ and labels/ that preprocess did not write."""
    wanted = {path for job in jobs for path in _written(job)}
    there = [path for part in ("images", "labels") for path in listing(output / part)[1].values()]
    found = [path for path in there if path.with_name(one_form(path.name)) not in wanted]
    if found:
        names = listed([str(path.relative_to(output)) for path in found], _NAMED)
        say(f"Note: files that preprocess did not write stay in the output and are of no case: {names}")


def _existing(output: Path, case: str, wanted: Set[Path] = frozenset()) -> list[Path]:
    """What there is of a case, but what is wanted, by the places that preprocess writes to."""
    places = output / "images" / f"{case}.nii.gz", output / "labels" / f"{case}.nii.gz", output / "store" / case
    paths = [path for path in places if path not in wanted]
    if not case.isascii():
        # As macOS writes names; it is the case's own file where there is no other.
        others = [place.with_name(unicodedata.normalize("NFD", place.name)) for place in places]
        paths += [path for path, place in zip(others, places, strict=True) if place not in wanted or _both(path, place)]
    return [path for path in paths if path.is_symlink() or path.exists()]


def _both(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and not path.samefile(other)


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; of a link the link alone. Raises OutputError."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise not_written(path, error, "--output_path") from error


def _written(job: CaseJob) -> tuple[Path, ...]:
    if not job.nifti:
        entry = read_entry(job.output / "store", job.case.id) if job.case.has_label else None
        return (job.label_path,) if entry is not None and entry.values else ()
    return (job.image_path, job.label_path) if job.case.has_label else (job.image_path,)


def _is_case(folder: Path) -> bool:
    """Whether a folder of the store was written for a case, to its end or not."""
    return folder.name[0] != "." and any((folder / part).exists() for part in (CASE_FILE, *_ARRAYS))


def _cases(cases: list[str]) -> str:
    return "1 case" if len(cases) == 1 else f"{len(cases)} cases"
