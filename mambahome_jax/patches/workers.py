"""Worker processes of the loader that die or hang: the training stops within a minute and says at which case."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambahome_jax.errors import ConfigError, MambaHomeError, TrainingError
from mambahome_jax.support import processes

STALL_SECONDS = 45.0
# Starting the processes, which import everything anew, perhaps from a slow disk.
START_SECONDS = 300.0
# What the system sends a process that writes to shared memory which is full (SIGBUS; Windows has none).
_BUS_ERROR = int(getattr(signal, "SIGBUS", 7))


class CaseNotes:
    """Notes of which case each worker is reading: a file a process, named by its number, in a folder of their own."""

    def __init__(self) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="mambahome-reading-"))
        except OSError as error:
            found = f"no folder for the notes of the processes that read patches: {error.strerror or error}"
            raise TrainingError(f"{found}. Set TMPDIR to one that can be written, or --num_workers to 0") from error

    @contextlib.contextmanager
    def reading(self, case: str) -> Iterator[None]:
        """Note that this process reads a case; an error that leaves names the case."""
        self._note(case)
        try:
            yield
        except Exception as error:
            error.add_note(f"while reading {case}")
            raise
        self._note("")

    def _note(self, case: str) -> None:
        # The folder is gone when the training has ended, which this process may not have heard yet.
        with contextlib.suppress(FileNotFoundError):
            (self.folder / str(os.getpid())).write_text(case, encoding="utf-8")

    @property
    def processes(self) -> set[int]:
        """Processes that have noted anything."""
        return {int(path.name) for path in self.folder.glob("*")}

    def cases(self) -> set[str]:
        """Cases that are being read."""
        cases = set()
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                cases.add(path.read_text(encoding="utf-8"))
        return cases - {""}

    def seconds_since(self) -> float | None:
        """Seconds since a worker noted anything; None before the first."""
        times = [path.stat().st_mtime for path in self.folder.glob("*")]
        return time.time() - max(times) if times else None


@dataclass(frozen=True)
class WatchedLoader:
    """A loader with worker processes whose iterators do not wait for ever."""

    loader: Iterable[Any]
    notes: CaseNotes

    def __iter__(self) -> "WatchedBatches":
        """Start the processes. Raises ConfigError: their queues have no shared memory."""
        if reason := processes.why_no_processes():
            raise ConfigError(f"{reason}. {processes.REMEDY}")
        return WatchedBatches(iter(self.loader), self.notes)


class WatchedBatches:
    """The iterator of a loader with worker processes, which raises where nothing comes any more."""

    def __init__(self, batches: Any, notes: CaseNotes):
        self._batches, self._notes = batches, notes
        self._thread = ThreadPoolExecutor(1)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Wait for the next batch. Raises TrainingError: a worker died, or none has read for STALL_SECONDS."""
        begun, coming = time.monotonic(), self._thread.submit(next, self._batches)
        while not wait([coming], timeout=1).done:
            waited, silent = time.monotonic() - begun, self._notes.seconds_since()
            limit = START_SECONDS if silent is None else STALL_SECONDS
            if min(waited, waited if silent is None else silent) > limit:
                found = f"no patch for {limit:.0f} s from the processes that read them{self._at()}"
                self._kill()
                raise TrainingError(f"{found}. Stopped. Is the disk or network that it lies on still there?")
        try:
            return _without_names(coming.result())
        except (MambaHomeError, StopIteration):
            raise
        except Exception as error:
            reason = why_killed(error)
            if not reason:
                # A fault of ours, which keeps its traceback.
                raise
            found = f"a process that reads patches {reason[0]}{self._at()}"
            raise TrainingError(f"{found}. Stopped. {reason[1]}; --resume continues") from error

    def start_prefetch(self) -> None:
        """Start the processes, so that the first batch is there when it is asked for."""
        self._batches.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """Give the state of the loader."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of the loader."""
        self._batches.set_state(state)

    def close(self) -> None:
        """End the processes."""
        self._batches.close()
        self._thread.shutdown()
        shutil.rmtree(self._notes.folder, ignore_errors=True)

    def _at(self) -> str:
        cases = sorted(self._notes.cases())
        return f", while reading {', '.join(cases)}" if cases else ""

    def _kill(self) -> None:
        """End workers that do not answer: waiting for them would take as long again."""
        for process in multiprocessing.active_children():
            if process.pid in self._notes.processes:
                process.kill()


def why_killed(error: Exception) -> tuple[str, str] | None:
    """Say how the system stopped a worker, and what to do about it; None where the error is a fault of the program."""
    text = str(error)
    # Grain's own words of a process that was killed.
    if "Worker process" in text:
        if f"exit code -{_BUS_ERROR}." in text:
            return f"was killed for want of shared memory ({processes.SHARED_MEMORY})", processes.REMEDY
        return "was killed", "If memory was short, try fewer --num_workers"
    if isinstance(error, OSError) and "psm_" in f"{error.filename} {text}":
        return f"has no shared memory ({error.strerror})", processes.REMEDY
    return None


def _without_names(batch: Any) -> Any:
    """Take the names off a batch's shared memory: the system then frees it with the batch, without a warning."""
    for array in batch.values() if isinstance(batch, dict) else ():
        memory = getattr(array, "shm", None)
        if memory is not None and getattr(array, "_unlink_on_del", False):
            memory.unlink()
            array._unlink_on_del = False
    return batch
