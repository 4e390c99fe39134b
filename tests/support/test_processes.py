"""Jobs over processes: results, errors and processes that die."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax.errors import DatasetError
from mambahome_jax.support import processes
from mambahome_jax.support.processes import WorkerDied, available_memory, isolated, isolated_reads, run_jobs


def square(job: int) -> int:
    """Fails for 3, and kills its process for 5."""
    if job == 3:
        raise ValueError("three")
    if job == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


def unsendable(job: int):
    return (lambda: job) if job == 2 else job


def thread_limit(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


@isolated
def read(path: Path, how: str = "array"):
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    if how == "memory":
        return np.zeros(1 << 60, np.uint8)
    if how == "error":
        raise DatasetError("odd", file=path)
    return os.getpid(), np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))


def test_a_file_is_read_here_unless_a_command_reads_many():
    assert read(Path("a"))[0] == os.getpid()
    with isolated_reads():
        process, array = read(Path("a"))
        assert process != os.getpid() and process == read(Path("a"))[0]
        assert array.flags.f_contiguous and array.sum() == 276
    assert read(Path("a"))[0] == os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("crash", "a: the library that reads it ended its process .exit code -11"),
        ("hang", "a: the library that reads it did not end within 1 s"),
        ("memory", "a: needs more memory than there is"),
        ("error", "a: odd"),
    ],
)
def test_what_a_library_does_to_its_process_is_an_error_of_one_file(monkeypatch, how, message):
    monkeypatch.setattr(processes, "_SECONDS", 1)
    with isolated_reads():
        with pytest.raises(DatasetError, match=message):
            read(Path("a"), how)
        assert read(Path("b"))[1].shape == (2, 3, 4)


def test_a_script_without_a_guard_is_not_run_anew(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom mambahome_jax.support.processes import isolated_reads\n"
        "from tests.support.test_processes import read\n"
        "with isolated_reads():\n    print(read(Path('a'))[1].shape)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "(2, 3, 4)\n" and shown.stderr == ""


def isolated_square(job: int) -> int:
    return read(Path(str(job)))[0] != os.getpid() and job * job


def test_jobs_read_in_processes_of_their_own():
    assert dict(run_jobs(isolated_square, range(3), 2)) == {0: 0, 1: 1, 2: 4}


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


def test_in_batches_too():
    found = dict(run_jobs(square, range(9), 2, batch=4))
    assert isinstance(found.pop(3), ValueError) and isinstance(found.pop(5), WorkerDied)
    assert found == {job: job * job for job in (0, 1, 2, 4, 6, 7, 8)}
    assert list(run_jobs(square, [], 2, batch=4)) == []


def test_a_batch_whose_results_cannot_be_sent_fails_in_all_its_jobs():
    found = dict(run_jobs(unsendable, [1, 2, 3], 1, batch=2))
    assert all(isinstance(found[job], Exception) for job in (1, 2)) and found[3] == 3


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


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the processes in /proc")
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    code = f"""
import os, pathlib, time
from mambahome_jax.support.processes import run_jobs
from tests.support.test_processes import write_pid_and_wait
if __name__ == "__main__":
    list(run_jobs(write_pid_and_wait, [{str(tmp_path)!r}] * 4, 2))
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], env=environment) as parent:
        pids = _wait_for(lambda: [path.name for path in tmp_path.iterdir() if path.name.isdigit()], 2)
        parent.kill()
    assert len(pids) == 2
    assert len(_wait_for(lambda: [pid for pid in pids if not Path(f"/proc/{pid}").exists()], 2)) == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the processes in /proc")
@pytest.mark.parametrize("moment", ["starting", "working"])
def test_an_interrupt_ends_all_processes_at_once_and_only_the_parent_speaks(tmp_path, moment):
    # A shell starts what runs in its background with SIGINT ignored.
    code = f"""
import signal
from mambahome_jax.support.processes import run_jobs
from tests.support.test_processes import write_pid_and_wait
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        list(run_jobs(write_pid_and_wait, [{str(tmp_path)!r}] * 4, 2))
    except KeyboardInterrupt:
        raise SystemExit(130)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        if moment == "starting":
            # The resource tracker and two that work.
            assert len(_wait_for(lambda: children.read_text().split(), 3)) == 3
        else:
            assert len(_wait_for(lambda: [path.name for path in tmp_path.iterdir() if path.name.isdigit()], 2)) == 2
        os.killpg(parent.pid, signal.SIGINT)
        _, shown = parent.communicate(timeout=600)
    assert parent.returncode == 130
    assert shown == ""


def write_pid_and_wait(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    threading.Event().wait()


def _wait_for(values: Callable[[], list[str]], count: int) -> list[str]:
    deadline = time.monotonic() + 600
    while len(values()) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return values()
