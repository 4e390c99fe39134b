"""The output folder of a command: looked at before the work is done rather than after, and held by one at a time."""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from mambahome_jax.errors import OutputError
from mambahome_jax.support.files import not_written

LOCK = ".mambahome.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def open_output(folder: Path, files: Iterable[str] = (), flag: str = "--output_dir") -> None:
    """Make an output folder and see that it can be written, and that no folder stands where `files` shall be.

    flag: what names the folder. Raises OutputError.
    """
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"mambahome")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise not_written(folder, error, flag) from error
    for name in files:
        if (folder / name).is_dir():
            reason = f"{folder / name}: cannot be written: a folder has its name"
            raise OutputError(f"{reason}. Move it or name another {flag}")


@contextlib.contextmanager
def locked(folder: Path, command: str, flag: str = "--output_dir") -> Iterator[None]:
    """Hold an output folder (see `held`), which is made where it is missing, and remove what a killed run left in it.

    Raises OutputError: as `held`.
    """
    new = not folder.exists()
    try:
        with held(folder, command, flag):
            # What a killed run was writing: nobody else writes here now.
            for leftover in (
                *folder.glob(".*.partial*"),
                *folder.glob("previews/.*.partial*"),
                *folder.glob(".*.probe"),
            ):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def held(folder: Path, command: str, flag: str = "--output_dir") -> Iterator[None]:
    """Hold a folder, which is made where it is missing, against any other process that would write to it.

    The lock is the operating system's, on a file in the folder that says who holds it: it ends with its process,
    however that ends, so the file of a dead one keeps nobody out. Where the file system knows no locks, none is taken.
    flag: what names the folder. Raises OutputError: another process holds it, and which; it cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0, on_acquired=lambda file: _sign(file, command))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(f"{folder}: {_holder(folder / LOCK)}. Wait for its end, or name another {flag}") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise not_written(folder, error, flag) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Before it is given up: whoever opened it meanwhile sees that it is gone, and makes a new one.
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def holder_of(folder: Path) -> str | None:
    """Say who holds a folder; None where nobody does. A file system without locks leaves that open: then somebody."""
    file = folder / LOCK
    if not file.exists():
        return None
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError):
        return _holder(file)
    lock.release()
    return None


def _sign(file: int, command: str) -> None:
    """Write into the lock file who holds it."""
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(file, 0)
    os.write(file, (json.dumps(holder) + "\n").encode())


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = f"`mambahome {holder['command']}` (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # It has taken the lock, but not yet said who it is.
        who = "another process"
    return f"{who} is writing to it"
