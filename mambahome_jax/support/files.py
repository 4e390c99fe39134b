"""Names of scan files, and writing a file whole or not at all."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.support.paths import one_form

NIFTI_SUFFIXES = (".nii.gz", ".nii")
META_SUFFIXES = (".mha", ".mhd")
ITK_SUFFIXES = (*META_SUFFIXES, ".nrrd")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
WRITTEN_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")


def suffix_of(name: str, suffixes: tuple[str, ...] = SCAN_SUFFIXES) -> str:
    """The one of `suffixes` that a file's name ends in, as the name spells it (.NII.GZ too); empty without."""
    lower = name.lower()
    return next((name[-len(suffix) :] for suffix in suffixes if lower.endswith(suffix)), "")


def scan_stem(path: Path) -> str:
    """File name without the suffix of a scan, its letters composed: one name on every system."""
    return one_form(path.name.removesuffix(suffix_of(path.name)))


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: dot files, and what macOS puts into archives beside the files."""
    return name.startswith(".") or name == "__MACOSX"


def alternatives(suffixes: tuple[str, ...]) -> str:
    """Suffixes for a message: ".nii.gz, .nii or .mha"."""
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def head_of(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file, or all of a shorter one. Raises DatasetError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=path) from error


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place at the end; nothing is left after an error."""
    # Not the whole name, which may be as long as a name can be.
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}-{threading.get_ident()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        # The folder may have vanished or turned read-only meanwhile; that error is already on its way.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """`beside` in a folder that is made where it is missing.

    Raises OutputError: an OSError, as of a folder that cannot be written or a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        action = "Nothing was written; free some space or name another output folder"
        raise OutputError(f"{path.parent}: cannot write {path.name}: {reason}. {action}") from error


def write_text(path: Path, text: str, elsewhere: str = "output folder", *, parents: bool = False) -> None:
    """Write a text file whole or not at all, in UTF-8; of a path that is none, its odd bytes are escaped.

    elsewhere: what to name another of where it fails. parents: make folders that are missing. Raises OutputError.
    """
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise not_written(path, error, elsewhere) from error


def not_written(path: Path | str, error: OSError, elsewhere: str) -> OutputError:
    """What to raise where a file or folder cannot be written. elsewhere: what to name another of."""
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    action = "Move the file that has its name" if in_the_way else "Free some space"
    return OutputError(f"{path}: cannot be written: {error.strerror or error}. {action} or name another {elsewhere}")
