"""Jobs over several processes, where neither an error nor a killed process stops the others; cores and memory."""

import functools
import importlib
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE
from typing import Any, BinaryIO, ClassVar, Concatenate, ParamSpec, TypeVar

from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError
from mambahome_jax.support.console import Say, counted
from mambahome_jax.support.files import said_bytes

J = TypeVar("J")
R = TypeVar("R")
P = ParamSpec("P")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_STDOUT, _STDERR = 1, 2  # descriptors
_SECONDS = 600  # in which a library must have read a file
_ADDRESSES = 8 << 30  # bytes that a process may name beside those that it uses, as for its libraries
# Shared memory. Containers have 64 MB of it unless told otherwise; who writes beyond is killed without a word.
SHARED_MEMORY = Path("/dev/shm")
# Batches that a worker has there at most: being made, in its queue, taken out and waiting their turn, being freed.
# Seven were measured.
_BATCHES_A_WORKER = 8
# Batches in use by the training itself, and the locks of the queues.
_BATCHES_IN_USE, _LOCKS = 4, 1 << 20
REMEDY = (
    f"Give {SHARED_MEMORY} more room (docker run --shm-size=8g; --ipc=host), or use fewer --num_workers; 0 are threads"
)


def usable_cores() -> int:
    """Cores that this process was given, where the system tells (Linux), else all of the machine; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerDied(MambaHomeError):
    """The process that worked on a job ended without an answer."""


def in_thread(function: Callable[[], R]) -> Future[R]:
    """Call a function in a thread of its own."""
    thread = ThreadPoolExecutor(1)
    result = thread.submit(function)
    thread.shutdown(wait=False)
    return result


def run_jobs(
    function: Callable[[J], R], jobs: Iterable[J], workers: int, *, threads: bool = False, batch: int = 1
) -> Iterator[tuple[J, R | BaseException]]:
    """Yield (job, result or exception) as jobs finish, in no fixed order.

    When a process is killed, nobody knows by which of the running jobs, so each of them is tried again alone; one that
    kills its process again yields WorkerDied.

    Args:
        function: importable by name, as the processes are spawned.
        threads: run in one thread of this process instead, where starting a process is not worth its second; without
            room for a lock in shared memory this is so anyway.
        batch: jobs that a process is given at a time, more than one where handing them over takes longer.
    """
    if not threads and (reason := why_no_processes()):
        print(f"Note: {reason}; the work is done in this process, one job after the other", file=sys.stderr)
        threads = True
    if batch > 1 and not threads:
        yield from _run_batches(function, list(jobs), workers, batch)
        return
    waiting = deque(jobs)
    while waiting:
        suspects: list[J] = []
        yield from _run_until_broken(function, waiting, workers, suspects, threads)
        for suspect in suspects:
            again: list[J] = []
            yield from _run_until_broken(function, deque([suspect]), 1, again, threads)
            for job in again:
                yield job, WorkerDied("its process was killed, most likely for want of memory. Try fewer --num_workers")


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its control group; None where nobody says."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            # Page cache counts as used but is given back, hence only anonymous memory.
            lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
            used = next(int(line.split()[1]) for line in lines if line.startswith("anon "))
            found.append(int(limit) - used)
    except (OSError, ValueError, StopIteration):
        pass
    return max(min(found), 0) if found else None


def count_workers(asked: int | None, jobs: Sequence[J], peak_bytes: Callable[[J], int], say: Say) -> int:
    """Count the processes that the cores and jobs call for and that memory holds, at least 1.

    asked: None for one a core. peak_bytes: memory of one job at its peak. Raises ConfigError: fewer than 0 asked for.
    """
    if asked is not None and asked < 0:
        raise ConfigError(f"num_workers is {asked}; expected 0 or more")
    wanted = max(min(usable_cores() if asked is None else asked, len(jobs)), 1)
    available = available_memory()
    if wanted == 1 or available is None:
        return wanted
    fitting = max(int(0.9 * available / max(map(peak_bytes, jobs), default=1)), 1)
    if fitting < wanted:
        say(f"{counted(fitting, 'process')} instead of {wanted}: memory for more of the largest scan is not free")
    return min(wanted, fitting)


def why_failed(error: BaseException, say: Say, out_of_memory: str = "") -> str:
    """Say in a line why a job failed; of a fault of ours `say` gets the traceback, which is needed to fix it.

    out_of_memory: what to do about that.
    """
    if isinstance(error, MambaHomeError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({error})" + (f". {out_of_memory}" if out_of_memory else "")
    if not isinstance(error, OSError):
        say("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error}"


def _run_batches(
    function: Callable[[J], R], jobs: Sequence[J], workers: int, size: int
) -> Iterator[tuple[J, R | BaseException]]:
    groups = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    for group, results in run_jobs(partial(_each, function), groups, workers):
        if isinstance(results, WorkerDied) and len(group) > 1:
            # One of them did it; the others have a result.
            yield from run_jobs(function, group, workers)
        elif isinstance(results, BaseException):
            yield from ((job, results) for job in group)
        else:
            yield from zip(group, results, strict=True)


def _each(function: Callable[[J], R], jobs: Sequence[J]) -> list[R | BaseException]:
    """Do several jobs, of which none stops the others."""
    results: list[R | BaseException] = []
    for job in jobs:
        try:
            results.append(function(job))
        except Exception as error:  # noqa: BLE001
            results.append(error)
    return results


def _run_until_broken(
    function: Callable[[J], R], waiting: deque[J], workers: int, suspects: list[J], threads: bool
) -> Iterator[tuple[J, R | BaseException]]:
    """Take jobs from `waiting` until none is left or a process dies; the jobs that ran then go to `suspects`."""
    context = multiprocessing.get_context("spawn")
    listener, stop = context.Pipe(duplex=False)
    # They share the cores, so the linear algebra of each gets one thread.
    with environment(dict.fromkeys(_THREAD_VARIABLES, "1")), listener, stop:
        executor: Executor = (
            ThreadPoolExecutor(1)
            if threads
            else ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent, initargs=(listener,))
        )
        running: dict[Future, J] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers and not suspects:
                    # A process is started here, and inherits what is held back.
                    with _interrupt_held_back():
                        running[executor.submit(function, waiting[0])] = waiting[0]
                    waiting.popleft()
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job, error = running.pop(future), future.exception()
                    if isinstance(error, BrokenProcessPool):
                        suspects.append(job)
                    else:
                        yield job, future.result() if error is None else error
        except BrokenProcessPool:
            # Raised by submit() when the pool broke between two jobs: that job has not begun and stays in `waiting`.
            suspects.extend(running.values())
        except KeyboardInterrupt:
            # Files appear whole or not at all, so nothing is lost that waiting for the cases in hand would keep.
            stop.close()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


def end_with_parent(*others: Connection) -> None:
    """End this process when its parent is gone or has closed the other end of `others`, and on nothing else.

    A pool's processes outlive a parent that was killed: they would wait for ever, and go on to write the case in hand
    while the next run writes it too. Ctrl-C reaches the whole process group, but is the parent's alone to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Reader.users = 1  # jobs are files of many
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel, *others])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def isolated_reads() -> Iterator[None]:
    """While this lasts, functions marked `isolated` run in processes of their own; commands use it as a decorator."""
    _Reader.users += 1
    try:
        yield
    finally:
        _Reader.users -= 1
        while not _Reader.users and _Reader.idle:
            _Reader.idle.pop().close()


def isolated(function: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """Mark a function that reads a file through a library: where a command reads many, in a process of its own.

    A crash, ten minutes without an answer or an allocation beyond the machine's memory is then a DatasetError of this
    file. The result is pickled; its arrays are read-only.
    """

    @functools.wraps(function)
    def call(path: Path, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _Reader.users:
            return function(path, *args, **kwargs)
        try:
            reader = _Reader.idle.pop()
        except IndexError:
            reader = _Reader()
        result = reader.call(call, path, *args, **kwargs)
        _Reader.idle.append(reader)
        if isinstance(result, MemoryError):
            raise DatasetError("needs more memory than there is", file=path) from result
        if isinstance(result, Exception):
            raise result
        return result

    return call


class _Reader:
    """A process that reads one file after the other."""

    users = 0
    idle: ClassVar[list["_Reader"]] = []

    def __init__(self) -> None:
        # Not by multiprocessing, which would run a script anew that is not guarded against it.
        code = "from mambahome_jax.support.processes import serve_reads; serve_reads()"
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with _interrupt_held_back():
            self._process = subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, env=paths)

    def call(self, function: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> Any:
        """Give what the function returns or raises there. Raises DatasetError: the process ended."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            pickle.dump((_SECONDS, function, (path, *args), kwargs), requests)
            requests.flush()
            buffers = [answers.read(size) for size in pickle.load(answers)]
            return pickle.load(answers, buffers=buffers)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            code = self._process.returncode
            slow = hasattr(signal, "SIGALRM") and code == -signal.SIGALRM
            how = f"did not end within {_SECONDS} s" if slow else f"ended its process (exit code {code})"
            action = "Copy or export it again, or leave it out."
            raise DatasetError(f"the library that reads it {how}", file=path, action=action) from error
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def close(self) -> None:
        """Wait for the end of the process, which is not reading."""
        self._process.communicate()


def serve_reads() -> None:
    """Answer the calls of a `_Reader` until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    answers = os.fdopen(os.dup(_STDOUT), "wb")
    # What a library prints is for people.
    os.dup2(_STDERR, _STDOUT)
    with suppress(EOFError):
        while True:
            _answer(answers, *pickle.load(sys.stdin.buffer))


def _answer(answers: BinaryIO, seconds: int, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    # By default it ends the process, whatever a library is doing, and also where the parent is gone.
    alarm = getattr(signal, "alarm", lambda seconds: None)
    alarm(seconds)
    try:
        result = function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        result = error
    alarm(0)
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pickle.dump([view.nbytes for view in views], answers)
    for view in views:
        answers.write(view)
    answers.write(content)
    answers.flush()


def _limit_memory() -> None:
    """Let an allocation beyond what is free fail, before the system ends some other process for it."""
    available = available_memory()
    if available is not None:
        resource = importlib.import_module("resource")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = available + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Hold Ctrl-C back till the end; processes that are started meanwhile never see it, not while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    pending: list[int] = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Another thread, as of a library for linear algebra, may take the signal: Python then calls the handler here.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: pending.append(number)) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if pending:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have these variables in the environment while it lasts, as for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Workers:
    """How many processes can read patches, and why they are fewer than asked for; empty where they are not."""

    count: int
    why_fewer: str = ""


def needed_bytes(workers: int, batch_bytes: int) -> int:
    """Shared memory that so many processes take at most, for batches of `batch_bytes`."""
    return (_BATCHES_A_WORKER * workers + _BATCHES_IN_USE) * batch_bytes + _LOCKS if workers else 0


def batch_bytes(batch_size: int, patch_size: tuple[int, int, int], channels: int) -> int:
    """Bytes of a batch of the loader: image float32 with its channels, label and case int32."""
    return batch_size * (math.prod(patch_size) * (channels + 1) + 1) * 4


def free_shared_bytes() -> int | None:
    """Room in the folder of shared memory; None where the system has none that is limited by itself."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def why_no_processes() -> str:
    """Why no process can be given work here; empty where it can. Queues need locks in shared memory."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        return f"shared memory ({SHARED_MEMORY}) cannot be used: {getattr(error, 'strerror', None) or error}"
    return ""


def fitting_workers(wanted: int, size: int) -> Workers:
    """As many of the `wanted` processes as shared memory holds with batches of `size` bytes; 0 where none fits."""
    if wanted == 0:
        return Workers(0)
    if reason := why_no_processes():
        return Workers(0, f"{reason}; patches are read in threads. {REMEDY}")
    free = free_shared_bytes()
    if free is None or needed_bytes(wanted, size) <= free:
        return Workers(wanted)
    fitting = next((count for count in range(wanted - 1, 0, -1) if needed_bytes(count, size) <= free), 0)
    instead = f"{counted(fitting, 'process', 'read')} patches" if fitting else "patches are read in threads"
    needed = said_bytes(needed_bytes(wanted, size))
    need = f"{SHARED_MEMORY} has {said_bytes(free)} free, {counted(wanted, 'process')} may need {needed}"
    return Workers(fitting, f"{need}; {instead}. {REMEDY}")
