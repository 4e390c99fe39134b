"""The output folder of a command, looked at before the work is done rather than after."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from mambahome_jax.errors import OutputError


def open_output(folder: Path, files: Iterable[str] = ()) -> None:
    """Make an output folder and see that it can be written, and that no folder stands where `files` shall be.

    Raises OutputError.
    """
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"mambahome")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        reason = f"{folder}: cannot be written: {error.strerror or error}"
        raise OutputError(f"{reason}. Free some space or name another --output_dir") from error
    for name in files:
        if (folder / name).is_dir():
            reason = f"{folder / name}: cannot be written: a folder has its name"
            raise OutputError(f"{reason}. Move it or name another --output_dir")
