"""The output folder of a command: looked at before the work is done rather than after, and held by one at a time."""

import contextlib
import datetime
import errno
import importlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from mambahome_jax.errors import OutputError
from mambahome_jax.support.files import not_written

LOCK = ".mambahome.lock"


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
    """Hold an output folder, which is made where it is missing, against any other process that would write to it.

    The lock is the operating system's, on a file in the folder that says who holds it: it ends with its process,
    however that ends, so the file of a dead one keeps nobody out. Where the file system knows no locks, none is taken.
    flag: what names the folder. Raises OutputError: another process holds it, and which; it cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(folder / LOCK, command)
    except BlockingIOError as error:
        raise OutputError(f"{folder}: {_holder(folder / LOCK)}. Wait for its end, or name another {flag}") from error
    except OSError as error:
        raise not_written(folder, error, flag) from error
    try:
        # What a killed run was writing: nobody else writes here now.
        for leftover in (*folder.glob(".*.partial*"), *folder.glob("previews/.*.partial*"), *folder.glob(".*.probe")):
            with contextlib.suppress(OSError):
                leftover.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):
            # Before it is given up: whoever opened it meanwhile sees that it is gone, and makes a new one.
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _taken(path: Path, command: str) -> int:
    """Descriptor of the lock file, locked. Raises BlockingIOError: another process has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _lock(file)
            there = path.stat()
            if (there.st_dev, there.st_ino) == (os.fstat(file).st_dev, os.fstat(file).st_ino):
                os.ftruncate(file, 0)
                now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
                held = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
                os.write(file, (json.dumps(held) + "\n").encode())
                return file
        except FileNotFoundError:
            # Its holder removed it between our two looks.
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> None:
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        who = f"`mambahome {held['command']}` (process {held['pid']} on {held['host']}, since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # It has taken the lock, but not yet said who it is.
        who = "another process"
    return f"{who} is writing to it"
