"""The folder that preprocess writes to: what an earlier run left is known by record, and removed if it has no case."""

import contextlib
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

from mambahome_jax.datasets.files import fault_of_name, listed, listing
from mambahome_jax.datasets.prepared import DESCRIPTION, begin_prepared
from mambahome_jax.errors import ConfigError, OutputError
from mambahome_jax.patches.store import CASE_FILE, read_entry, remove_index
from mambahome_jax.preprocessing.case import CaseJob
from mambahome_jax.support.console import Say, counted
from mambahome_jax.support.files import earlier_json, not_written
from mambahome_jax.support.output_folder import open_output
from mambahome_jax.support.paths import one_form

_LEFTOVERS = (".*.partial", ".*.partial.*", ".*.old", ".*.probe")
_NAMED = 20
_FLAG = "--output_path"


class OutputFolder:
    """The files of this run's jobs in a folder, and those of the cases of earlier runs."""

    def __init__(self, root: Path, jobs: Sequence[CaseJob], say: Say):
        self.root, self.jobs, self.say = root, jobs, say
        self.earlier: set[str] = set()

    def open(self, nifti: bool) -> None:
        """Make the folders and remove what interrupted runs left and no job writes any more.

        Raises OutputError: they cannot be written. ConfigError: files of a dataset as downloaded would be replaced.
        """
        self._require_own()
        store, images, labels = (self.root / part for part in ("store", "images", "labels"))
        for folder in (store, images, labels) if nifti else (store,):
            open_output(folder, flag=_FLAG)
        for folder in (self.root, store, images, labels):
            _remove(path for pattern in _LEFTOVERS for path in folder.glob(pattern))
        self.earlier = self._earlier_cases()
        self._remove_stale()

    def begin(self) -> None:
        """Mark the folder as unfinished before anything in it changes. Raises OutputError."""
        # Old entries would be read beside new voxels if this run does not reach its end.
        remove_index(self.root / "store")
        begin_prepared(self.root, sorted({*self.earlier, *(job.case.id for job in self.jobs)}))

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """`begin`; after an OutputError the mark is taken back where nothing was written yet. Raises OutputError."""
        self.begin()
        try:
            yield
        except OutputError:
            if not any(self._files(job.case.id) for job in self.jobs) and not self.earlier:
                with contextlib.suppress(OSError):
                    (self.root / DESCRIPTION).unlink(missing_ok=True)
            raise

    def remove_failed(self, failed: Iterable[str]) -> None:
        """Remove the files of cases that failed now. Raises OutputError: they cannot be removed."""
        lost = []
        for case in failed:
            paths = self._files(case)
            _remove(paths)
            lost += [case] if paths and case in self.earlier else []
        if lost:
            self.say(f"Removed from the output: {_cases(lost)} of an earlier run, failing now: {listed(lost, _NAMED)}")

    def say_foreign(self, done: Iterable[CaseJob]) -> None:
        """Name the files in images/ and labels/ that preprocess did not write."""
        wanted = {path for job in done for path in _written(job)}
        foreign = [path for path in self._scans() if path.with_name(one_form(path.name)) not in wanted]
        if foreign:
            names = listed([str(path.relative_to(self.root)) for path in foreign], _NAMED)
            self.say(f"Note: files that preprocess did not write stay in the output and are of no case: {names}")

    def _require_own(self) -> None:
        if (self.root / "store").is_dir():
            return
        content = self._description()
        if not content.keys().isdisjoint(("cases", "unfinished")):
            return
        names = {f"{job.case.id}.nii.gz" for job in self.jobs}
        replaced = [path for path in self._scans() if one_form(path.name) in names]
        if content or replaced:
            file = self.root / DESCRIPTION if content else replaced[0]
            raise ConfigError(f"{file}: not written by preprocess, but would be replaced. Name another {_FLAG}")

    def _description(self) -> dict:
        return earlier_json(self.root / DESCRIPTION)

    def _scans(self) -> list[Path]:
        return [path for part in ("images", "labels") for path in listing(self.root / part)[1].values()]

    def _earlier_cases(self) -> set[str]:
        """Find all cases that an earlier run wrote or had begun to, whether or not it reached its end."""
        content, store = self._description(), self.root / "store"
        cases, unfinished = content.get("cases"), content.get("unfinished")
        named = [entry.get("id") for entry in cases if isinstance(entry, dict)] if isinstance(cases, list) else []
        named += unfinished if isinstance(unfinished, list) else []
        parts = (CASE_FILE, "image", "label")
        for folder in store.iterdir() if store.is_dir() else ():
            if folder.name[0] != "." and any((folder / part).exists() for part in parts):
                named.append(folder.name)
        return {one_form(name) for name in named if isinstance(name, str) and not fault_of_name(name)}

    def _remove_stale(self) -> None:
        # Before the work, as on some file systems the files of a case and of one spelt otherwise are the same.
        wanted = {path for job in self.jobs for path in (*_written(job), job.store / job.case.id)}
        stale = {case: paths for case in sorted(self.earlier) if (paths := self._files(case, wanted))}
        if not stale:
            return
        self.begin()
        for paths in stale.values():
            _remove(paths)
        present = {job.case.id for job in self.jobs}
        gone, changed = ([case for case in stale if (case in present) is kept] for kept in (False, True))
        parts = [f"{_cases(gone)} that this dataset no longer has: {listed(gone, _NAMED)}"] if gone else []
        parts += [f"files no longer made of {_cases(changed)}: {listed(changed, _NAMED)}"] if changed else []
        self.say(f"Removed from the output: {'; '.join(parts)}")

    def _files(self, case: str, wanted: Set[Path] = frozenset()) -> list[Path]:
        """Find the files of a case, but those that are wanted, by the places that preprocess writes to."""
        names = (("images", f"{case}.nii.gz"), ("labels", f"{case}.nii.gz"), ("store", case))
        places = [self.root / part / name for part, name in names]
        paths = [path for path in places if path not in wanted]
        if not case.isascii():
            # As macOS writes names; it is the case's own file where there is no other.
            others = [place.with_name(unicodedata.normalize("NFD", place.name)) for place in places]
            for path, place in zip(others, places, strict=True):
                two = path.exists() and place.exists() and not path.samefile(place)
                paths += [path] if two or place not in wanted else []
        return [path for path in paths if path.is_symlink() or path.exists()]


def _written(job: CaseJob) -> tuple[Path, ...]:
    return job.written(None if job.nifti else read_entry(job.store, job.case.id))


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; of a link the link alone. Raises OutputError."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise not_written(path, error, _FLAG) from error


def _cases(cases: list[str]) -> str:
    return counted(len(cases), "case")
