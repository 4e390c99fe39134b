"""How predictions were made, out of their run.json, without saying where anybody's files lie."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# Of run.json: what is said of the run, in this order; cases and failures are counted, and all else stays out.
_PLAIN = ("command", "device", "seconds")
_TABLES = ("configuration", "settings", "versions")
_ABSOLUTE = re.compile(r"(?<![\w.<])(?:[A-Za-z]:[\\/]|\\\\|/)(?:[^\s\\/:;,'\"]+[\\/])*([^\s\\/:;,'\"]+)[\\/]?")


def run_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) lines about a run; of paths the last name only. Empty where run.json says nothing."""
    rows = [(key, str(run[key])) for key in _PLAIN if key in run]
    for table in _TABLES:
        content = run.get(table)
        for key, value in content.items() if isinstance(content, Mapping) else ():
            if value is not None:
                rows.append((f"{table}: {key}", _last_name(_text(value))))
    for key in ("cases", "failures"):
        if isinstance(run.get(key), list):
            rows.append((key, str(len(run[key]))))
    return rows


def without_folders(text: str, folders: Iterable[str | Path] = ()) -> str:
    """A message with the last name in place of each path: of files in and beside `folders`, and what looks absolute.

    folders: absolute or as they were given; their names may hold spaces, which otherwise end a path.
    """
    homes = {home for folder in map(Path, folders) for path in (folder, folder.absolute()) for home in _homes(path)}
    for home in sorted(homes, key=len, reverse=True):
        text = text.replace(home, "")
    return _ABSOLUTE.sub(lambda found: found[1], text)


def _homes(path: Path) -> list[str]:
    """An absolute path and all above it but the root, as they begin the path of a file below them."""
    return [f"{home}{os.sep}" for home in (path, *path.parents) if home.is_absolute() and home.name]


def _last_name(text: str) -> str:
    """Of what may be a path, with the separators of either system."""
    return PurePosixPath(PureWindowsPath(text).as_posix()).name or text if "/" in text or "\\" in text else text


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(entry) for entry in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else _last_name(str(value))
