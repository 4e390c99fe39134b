"""Worker processes of the loader that hang or are killed."""

import os
import signal
import threading
import time

import pytest

from mambahome_jax.errors import DatasetError, TrainingError
from mambahome_jax.patches import workers
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store
from tests.commands.test_train import _dataset


class Batches:
    """One batch, and then what `after` does."""

    def __init__(self, after):
        self.after, self.count = after, 0

    def __next__(self):
        self.count += 1
        return self.count if self.count == 1 else self.after()

    def close(self):
        pass


def test_nothing_coming_ends_with_the_case(monkeypatch):
    monkeypatch.setattr(workers, "STALL_SECONDS", 0.5)
    notes, end = workers.CaseNotes(), threading.Event()
    watched = workers.WatchedBatches(Batches(end.wait), notes)
    assert next(watched) == 1
    with notes.reading("c1"):
        pass
    assert notes.cases() == set()
    with notes.reading("c2"), pytest.raises(TrainingError, match=r"no patch for 0 s .* while reading c2. Stopped"):
        next(watched)
    end.set()
    watched.close()
    assert not notes.folder.exists()


def test_errors_of_a_worker_are_its_own_and_name_the_case():
    def fail():
        with notes.reading("c3"):
            raise ZeroDivisionError("ours")

    def damaged():
        raise DatasetError("damaged", case="c4")

    notes = workers.CaseNotes()
    for after, kind in ((fail, ZeroDivisionError), (damaged, DatasetError)):
        watched = workers.WatchedBatches(Batches(after), notes)
        next(watched)
        with pytest.raises(kind) as caught:
            next(watched)
        assert "c3" in str(getattr(caught.value, "__notes__", "")) or "c4" in str(caught.value)
        watched.close()


@pytest.mark.slow
def test_workers_that_are_killed_end_the_run_with_one_line(tmp_path):
    store = Store(_dataset(tmp_path))
    batches = iter(make_loader(store, store.cases, (8, 8, 8), 2, num_workers=1))
    try:
        next(batches)
        for path in batches._notes.folder.iterdir():
            os.kill(int(path.name), signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(TrainingError, match="a process that reads patches was killed"):
            while True:
                next(batches)
        assert time.monotonic() - begun < 600
    finally:
        batches.close()
