"""Jobs over processes: results, errors and processes that die."""

import os
import signal

from mambahome_jax.data.pool import WorkerDied, available_memory, run_jobs


def square(job: int) -> int:
    """Fails for 3, and kills its process for 5."""
    if job == 3:
        raise ValueError("three")
    if job == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


def thread_limit(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_errors_come_back_beside_results():
    found = dict(run_jobs(square, [1, 2, 3, 4], 1, threads=True))
    assert isinstance(found.pop(3), ValueError)
    assert found == {1: 1, 2: 4, 4: 16}


def test_a_killed_process_costs_only_its_own_job():
    found = dict(run_jobs(square, range(9), 2))
    assert isinstance(found.pop(3), ValueError)
    died = found.pop(5)
    assert isinstance(died, WorkerDied) and "killed" in str(died)
    assert found == {job: job * job for job in (0, 1, 2, 4, 6, 7, 8)}


def test_processes_get_one_thread_and_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert list(run_jobs(thread_limit, [0], 1)) == [(0, "1")]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_stopping_early_begins_no_further_job():
    begun = []
    for _ in run_jobs(begun.append, range(100), 1, threads=True):
        break
    assert len(begun) <= 2


def test_available_memory_is_plausible():
    available = available_memory()
    assert available is None or 2**20 < available < 2**50
