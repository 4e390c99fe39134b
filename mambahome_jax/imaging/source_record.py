"""Whether files hold what they held when a result was made of them: by what the file system says, else by content."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambahome_jax.errors import DatasetError


def record_of(files: Sequence[Path]) -> dict[str, str]:
    """{"stat": digest, "content": digest} of files, in values of JSON.

    To be taken before the files are read: what changes meanwhile is then a change. Raises DatasetError: a file cannot
    be read.
    """
    return {"stat": _stat(files), "content": _content(files)}


def renewed(record: Any, files: Sequence[Path]) -> dict[str, str] | None:
    """The record of the files as they are now where their content is that of `record`, whatever their names; else None.

    Only files that were touched are read: of the others place, size, times and number are as recorded. None also where
    `record` is none. Raises DatasetError: a file cannot be read.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("content"), str):
        return None
    stat = _stat(files)
    if record.get("stat") == stat:
        return dict(record)
    content = _content(files)
    return {"stat": stat, "content": content} if record["content"] == content else None


def place_of(path: Path) -> str:
    """Digest of where a file lies: compared, never read, as somebody's name may be in a path."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()


def _stat(files: Sequence[Path]) -> str:
    # Copying and unpacking set the time of modification back, which leaves that of the last change of status.
    try:
        found = [(place_of(path), path.stat()) for path in files]
    except OSError as error:
        raise _unreadable(error) from error
    rows = [(place, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for place, s in found]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _content(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise _unreadable(error, path) from error
    return digest.hexdigest()


def _unreadable(error: OSError, path: Path | None = None) -> DatasetError:
    return DatasetError(f"cannot be read: {error.strerror or error}", file=path or error.filename)
