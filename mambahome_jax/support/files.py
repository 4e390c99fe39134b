"""Files of every room: text, JSON and CSV, written whole or not at all; what a file is known by; room on the disk."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.support.paths import one_form

# What numpy and zipfile raise for a .npy or .npz file that is missing or damaged, or none at all.
NPZ_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, MemoryError, OverflowError, RuntimeError, SyntaxError),
    *(NotImplementedError, RecursionError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)
_LARGEST_DEFLATE_RATIO = 1032
# A spreadsheet computes a cell that begins so. The last four are = + - @ in full width, the same to a Japanese one.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_MARK = "'"


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: dot files, and what macOS puts into archives beside the files."""
    return name.startswith(".") or name == "__MACOSX"


def head_of(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file, or all of a shorter one. Raises DatasetError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise not_read(path, error) from error


def not_read(path: Path | str, error: OSError, action: str | None = None) -> DatasetError:
    """The error of a file or folder that cannot be read."""
    return DatasetError(f"cannot be read: {error.strerror or error}", file=path, action=action)


def not_written(path: Path | str, error: OSError, elsewhere: str) -> OutputError:
    """The error of a file or folder that cannot be written. elsewhere: what to name another of."""
    in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
    action = "Move the file that has its name" if in_the_way else "Free some space"
    return OutputError(f"{path}: cannot be written: {error.strerror or error}. {action} or name another {elsewhere}")


@contextlib.contextmanager
def atomic_write(path: Path, elsewhere: str = "", *, parents: bool = True) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place at the end; nothing is left after an error.

    Args:
        path: file to write.
        elsewhere: what to name another of where it fails; empty for the folder.
        parents: make folders that are missing.

    Raises:
        OutputError: an OSError, as of a folder that cannot be written or a full disk.
    """
    # Not the whole name, which may be as long as a name can be.
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{threading.get_ident()}.partial{path.suffix}")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        if elsewhere:
            raise not_written(path, error, elsewhere) from error
        action = "Nothing was written; free some space or name another output folder"
        reason = error.strerror or str(error)
        raise OutputError(f"{path.parent}: cannot write {path.name}: {reason}. {action}") from error
    finally:
        # The folder may have vanished or turned read-only meanwhile; that error is already on its way.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, elsewhere: str = "output folder", *, parents: bool = False) -> None:
    """Write UTF-8 text by `atomic_write`; the odd bytes of a path in it are escaped. Raises OutputError."""
    with atomic_write(path, elsewhere, parents=parents) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that anybody may have written. Raises ValueError: no JSON, or nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, action: str | None = None) -> dict[str, Any]:
    """Read a JSON file that holds an object. action: what to do where it does not.

    Raises DatasetError: missing, not readable, not JSON, not an object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DatasetError("no such file", file=path, action=action) from error
    except OSError as error:
        raise not_read(path, error, action) from error
    except ValueError as error:
        raise DatasetError(f"not valid JSON ({error})", file=path, action=action) from error
    if not isinstance(content, dict):
        expected = "an object with keys"
        raise DatasetError(json_form(content), file=path, expected=expected, action=action)
    return content


def json_form(value: Any) -> str:
    """What a value read from JSON is there."""
    forms = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return forms.get(type(value), "a number")


def earlier_json(path: Path) -> dict[str, Any]:
    """What an earlier command wrote, as `read_json`; empty where it is missing, or damaged by what stopped that."""
    with contextlib.suppress(DatasetError):
        return read_json(path)
    return {}


def jsonable(value: Any) -> Any:
    """The value as JSON takes it, at any depth: paths as text, nan and inf as None."""
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(
    path: Path, content: Any, elsewhere: str = "output folder", *, indent: int | None = 1, parents: bool = False
) -> None:
    """Write the `plain` content as JSON, whole or not at all (see `atomic_write`). Raises OutputError."""
    write_text(path, json_text(content, indent), elsewhere, parents=parents)


def json_text(content: Any, indent: int | None = 1) -> str:
    """Return what `write_json` writes."""
    return json.dumps(jsonable(content), indent=indent, allow_nan=False) + "\n"


def csv_name(name: str) -> str:
    """A name that anybody may have given as a CSV cell: with an apostrophe before what a spreadsheet would compute."""
    return _MARK + name if name.startswith((*_FORMULA, _MARK)) else name


def read_name(cell: str) -> str:
    """The name of which `csv_name` made a cell, its letters composed."""
    return one_form(cell[1:] if cell.startswith(_MARK) and cell[1:].startswith((*_FORMULA, _MARK)) else cell)


def write_csv(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    elsewhere: str = "output folder",
    *,
    parents: bool = False,
) -> None:
    """Write a header and rows, whole or not at all (see `atomic_write`); names are to be as `csv_name` makes them.

    Raises OutputError.
    """
    text = io.StringIO(newline="")
    usual, quoted = (
        csv.writer(text, quoting=quoting, lineterminator="\n") for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    for row in (columns, *rows):
        # A semicolon divides cells where numbers are written with a comma, and a formula may follow it.
        (quoted if any({*str(cell)} & {*";\t\r\n"} for cell in row) else usual).writerow(row)
    write_text(path, text.getvalue(), elsewhere, parents=parents)


def require_whole_npz(path: Path) -> None:
    """Raises ValueError: an array larger than its member, or a member larger than the file; NPZ_ERRORS else.

    Looked at before numpy makes room for the arrays that a damaged or hostile file claims.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > _LARGEST_DEFLATE_RATIO * min(member.compress_size, size):
                raise ValueError(f"{member.filename} claims {member.file_size} bytes of {member.compress_size}")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims shape {shape} in {member.file_size} bytes")


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
        raise not_read(error.filename, error) from error
    rows = [(place, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for place, s in found]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _content(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise not_read(path, error) from error
    return digest.hexdigest()


def said_bytes(size: float) -> str:
    """Say a size as a person reads it: 0.2 MB, 12 MB, 1.5 GB (powers of ten)."""
    value, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def bytes_of(path: Path) -> int:
    """Count the bytes of a file, or of all files in a folder; links count nothing, and what is gone is passed over."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            return 0
        if path.is_dir():
            return sum(bytes_of(Path(entry)) for entry in os.scandir(path))
        return path.stat().st_size
    return 0


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free where a folder lies or will be made; None where the system does not say."""
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else None  # file systems that do not tell say 0
    return None
