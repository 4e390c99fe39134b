"""Paths as people type them, in the one form in which every library opens the same file."""

import errno
import os
import re
import sys
import unicodedata
from pathlib import Path

from mambahome_jax.errors import ConfigError

# Two letters at least: C:/ is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str | Path) -> bool:
    """Whether a path names a place of another machine, such as s3://bucket/scans."""
    return _URL.match(str(path)) is not None


def one_form(name: str) -> str:
    """A name with its letters composed (NFC), so that it equals itself however it was typed or stored."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def fault_of_letters(name: str) -> str:
    """Why libraries cannot open what has this name, and what to do; empty where they can."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not name.isascii():
        # TensorStore and ITK take names for UTF-8 whatever the locale, and would open or make another file.
        return f"a name beyond ASCII in a locale of another encoding, {encoding}; set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "a name that is no UTF-8, but perhaps Latin-1; rename the file, as convmv does for whole folders"
    return ""


def require_letters(path: Path) -> None:
    """Raises ConfigError: a path that TensorStore and Orbax cannot open, as a name in it is no UTF-8."""
    if fault := fault_of_letters(str(path)):
        raise ConfigError(f"{str(path)!r}: {fault}")


def real_path(path: Path) -> Path:
    """Where a path leads once links are followed; itself where they run in a circle, which Path.resolve raises for."""
    return Path(os.path.realpath(path))


def own_name(folder: Path) -> str:
    """Name of a folder, also of `.`; of a link its own, composed. No dataset is called by the place that a link has."""
    return one_form(Path(os.path.abspath(local_path(folder))).name)  # noqa: PTH100 (Path.absolute keeps "..")


def local_path(path: str | Path) -> Path:
    """The path with `~` expanded and each `..` followed through links, as the operating system follows it.

    What lies in the working folder stays relative to it unless it was typed in whole, and a link as the last name stays
    a link. A name that exists in another Unicode form alone is given in that. A URL stays as it is.
    Raises ConfigError: `~` where no home folder is known.
    """
    path = Path(path)
    if is_url(path):
        return path
    if path.parts[:1] and path.parts[0].startswith("~"):
        expanded = os.path.expanduser(path)  # noqa: PTH111 (Path.expanduser raises for a folder that is named ~x)
        if path.parts[0] == "~" and expanded == str(path):
            raise ConfigError(f"{path}: no home folder is known. Set HOME, or write the whole path")
        path = Path(expanded)
    if ".." in path.parts:
        # TensorStore takes no such parts, and behind a link they do not lead to where the name suggests.
        last = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:last])), *path.parts[last:])
        # Relative again where it can be: reports repeat paths, and the rest of a disk is nobody's business.
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return as_on_disk(path)


def openable_path(path: str | Path) -> Path:
    """The `local_path` of what is to be read or written.

    Raises ConfigError: a URL, of which a local folder `s3:` would be made; `~` where no home folder is known; no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path is {path!r}; expected text or a Path")
    if is_url(path):
        action = "Copy what lies there, or mount it"
        raise ConfigError(f"{path}: a URL; expected a file or folder of this machine. {action}")
    return local_path(path)


def typed_path(path: str | Path) -> Path:
    """The `openable_path` of a flag.

    Raises ConfigError: also no text, a name that is too long, a folder not to be entered.
    """
    if not str(path):
        # Path would take it for the working folder.
        raise ConfigError("a path is empty text; expected a file or folder. Is a variable of the shell not set?")
    path = openable_path(path)
    try:
        path.lstat()
    except OSError as error:
        # Path.exists and its like are asked of it in many places, and raise for these.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise ConfigError(f"{path}: {error.strerror or error}; expected a path that you may open") from error
    return path


def path_in(folder: Path, text: str) -> Path:
    """The path that a file in `folder` names: from there where it is relative, else as `local_path`."""
    return local_path(text if text.startswith("~") else folder / text)


def as_on_disk(path: Path) -> Path:
    """The path, or where only another Unicode form of its names exists, that: macOS decomposes letters, others do not.

    What exists in no form is composed, so that new files have one spelling.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    place = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        place /= part if part.isascii() or os.path.lexists(place / part) else _other_form(place, part)
    return place


def _other_form(folder: Path, name: str) -> str:
    composed = one_form(name)
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except OSError:
        return composed
    return next((other for other in sorted(names) if one_form(other) == composed), composed)
