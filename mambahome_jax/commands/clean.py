"""clean: list what can go of runs, killed commands and compiled programs, and remove it when told to."""

import contextlib
import sys
from pathlib import Path

from rich.console import Console

from mambahome_jax.flags import CleanConfig
from mambahome_jax.support.console import command_line, say
from mambahome_jax.support.files import said_bytes
from mambahome_jax.training.disk import find_removable, remove


def run(config: CleanConfig) -> int:
    """List what can go, and remove it with --yes or after a yes in a terminal; return the exit code.

    Raises ConfigError: as `clean`.
    """
    console, found = Console(), find_removable(config)
    for folder, reason in found.kept.items():
        say(console, f"Kept {folder}: {reason}")
    if not found.found:
        say(console, f"Nothing to remove in {config.folder or 'the cache of compiled programs'}")
        return 0
    sizes = [item.size for item in found.found]
    for item, size in zip(found.found, sizes, strict=True):
        lost = f"; without: {item.lost}" if item.lost else ""
        say(console, f"{said_bytes(size):>8}  {item.folder}: {item.what}{lost}")
    if not config.yes and not _confirmed(console, sum(sizes)):
        words: list[str | Path] = [config.folder] if config.folder is not None else []
        words += ["--older_than", f"{config.older_than:g}"] if config.older_than is not None else []
        line = command_line("clean", *words, "--yes")
        say(console, f"Nothing was removed. To remove {said_bytes(sum(sizes))}: {line}")
        return 0
    result = remove(config, found)
    say(console, f"Removed {said_bytes(sum(size for _, size in result.removed))}")
    for reason in result.failed.values():
        say(console, f"Not removed: {reason}")
    return result.exit_code


def _confirmed(console: Console, size: int) -> bool:
    """Ask, where somebody can answer."""
    if not (console.is_terminal and sys.stdin.isatty()):
        return False
    with contextlib.suppress(EOFError):
        return console.input(f"Remove {said_bytes(size)}? [y/N] ", markup=False).strip().lower() in ("y", "yes")
    return False
