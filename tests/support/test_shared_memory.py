"""Shared memory of worker processes: looked at before the start, named when it is short, given back at the end."""

import subprocess
import sys
import types
from multiprocessing.context import BaseContext

import numpy as np
import pytest

from mambahome_jax.errors import ConfigError, TrainingError
from mambahome_jax.patches import workers
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store
from mambahome_jax.support import processes
from mambahome_jax.support.console import counted
from mambahome_jax.support.processes import Workers, batch_bytes, fitting_workers, needed_bytes, why_no_processes
from tests.commands.test_train import _dataset

DOCKER = 64 << 20


def test_a_batch_is_as_large_as_the_loader_makes_it(tmp_path):
    store = Store(_dataset(tmp_path))
    batches = iter(make_loader(store, store.cases, (8, 12, 16), 3))
    batch = next(batches)
    batches.close()
    assert batch_bytes(3, (8, 12, 16), 1) == sum(array.nbytes for array in batch.values())


@pytest.mark.parametrize(
    ("wanted", "patch", "free", "count"),
    [
        (4, (96, 96, 96), 8 << 30, 4),
        (4, (96, 96, 96), DOCKER, 0),
        (4, (64, 64, 64), DOCKER, 1),
        (4, (48, 48, 48), DOCKER, 4),
        (4, (96, 96, 96), None, 4),
        (0, (96, 96, 96), 0, 0),
    ],
)
def test_as_many_processes_as_shared_memory_holds(wanted, patch, free, count, monkeypatch):
    monkeypatch.setattr(processes, "free_shared_bytes", lambda: free)
    workers = fitting_workers(wanted, batch_bytes(2, patch, 1))
    assert workers.count == count and bool(workers.why_fewer) == (count < wanted)
    if count < wanted:
        instead = f"{counted(count, 'process', 'read')} patches" if count else "patches are read in threads"
        assert "/dev/shm has 67 MB free, 4 processes may need" in workers.why_fewer and instead in workers.why_fewer
        assert "--shm-size=" in workers.why_fewer and "--num_workers" in workers.why_fewer
    assert needed_bytes(0, 10) == 0


def test_where_no_lock_can_be_made_threads_do_the_work(monkeypatch, capsys):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(BaseContext, "Lock", refused)
    reason = "shared memory (/dev/shm) cannot be used: Permission denied"
    assert why_no_processes() == reason
    assert fitting_workers(2, 10) == Workers(0, f"{reason}; patches are read in threads. {processes.REMEDY}")
    assert sorted(processes.run_jobs(abs, [-1, 2], 2, batch=2)) == [(-1, 1), (2, 2)]
    assert f"Note: {reason}; the work is done in this process" in capsys.readouterr().err


def test_without_locks_a_loader_of_processes_says_so(tmp_path, monkeypatch):
    store = Store(_dataset(tmp_path))
    monkeypatch.setattr(processes, "why_no_processes", lambda: "no room")
    with pytest.raises(ConfigError, match=r"no room\. Give /dev/shm more room"):
        iter(make_loader(store, store.cases, (8, 8, 8), 2, num_workers=1))


KILLED = "Worker process was terminated unexpectedly with exit code {}. Search the logs above."


@pytest.mark.parametrize(
    ("error", "found", "action"),
    [
        (RuntimeError(KILLED.format(-7)), "killed for want of shared memory (/dev/shm)", "--shm-size"),
        (RuntimeError(KILLED.format(-9)), "was killed, while reading c1", "If memory was short"),
        (OSError(28, "No space left on device", "/psm_1a2b"), "has no shared memory (No space left", "--shm-size"),
    ],
)
def test_want_of_shared_memory_is_told_from_want_of_memory(error, found, action):
    def fail(_):
        raise error

    notes = workers.CaseNotes()
    watched = workers.WatchedBatches(types.SimpleNamespace(close=lambda: None), notes)
    watched._batches = type("Batches", (), {"__next__": fail, "close": lambda self: None})()
    try:
        with notes.reading("c1"), pytest.raises(TrainingError) as caught:
            next(watched)
    finally:
        watched.close()
    text = str(caught.value)
    assert found in text and action in text and text.endswith("--resume continues")
    assert ("shared memory" in text) == ("--shm-size" in text)


def test_a_fault_of_ours_keeps_its_traceback():
    assert workers.why_killed(OSError(28, "No space left on device", "/tmp/x")) is None
    assert workers.why_killed(ZeroDivisionError()) is None


SHORT_RUN = """
import sys
import jax
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store

HELD = []  # as a device holds what it was given

def main():
    store = Store(sys.argv[1])
    batches = iter(make_loader(store, store.cases, (16, 16, 16), 2, num_workers=1))
    HELD.append(jax.device_put(next(batches)["image"]))
    batches.close()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_nothing_is_said_of_leaked_memory_at_the_end(tmp_path):
    (tmp_path / "run.py").write_text(SHORT_RUN)
    line = [sys.executable, tmp_path / "run.py", _dataset(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_batch_is_still_there_when_its_memory_has_no_name():
    memory = types.SimpleNamespace(unlinked=0)
    memory.unlink = lambda: setattr(memory, "unlinked", memory.unlinked + 1)

    class Shared(np.ndarray):
        shm, _unlink_on_del = memory, True

    array = np.arange(3).view(Shared)
    batch = {"image": array, "case": np.arange(2)}
    assert workers._without_names(workers._without_names(batch)) is batch
    assert memory.unlinked == 1 and not array._unlink_on_del
    assert workers._without_names(1) == 1


def test_without_a_place_for_notes_the_flag_is_named(monkeypatch):
    def refused(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(workers.tempfile, "mkdtemp", refused)
    with pytest.raises(TrainingError, match=r"No usable temporary directory found\. Set TMPDIR"):
        workers.CaseNotes()
