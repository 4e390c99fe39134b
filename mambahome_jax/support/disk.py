"""Disk space: what files take, what is free, and how a size is said."""

import contextlib
import os
import shutil
from pathlib import Path


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
