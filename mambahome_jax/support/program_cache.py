"""Where compiled programs are kept between runs, so that a second start takes seconds."""

import os
from pathlib import Path


def program_cache() -> Path | None:
    """Folder for compiled programs in the user's cache; None where there is no home, or none that can be written.

    The folder is made where it is missing. A relative XDG_CACHE_HOME does not count, as its specification says.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
        # A home that does not exist, as /nonexistent of a service, is not made; of an empty one Path makes "/".
        if not cache.parent.is_dir() or (not named and os.environ.get("HOME") == ""):
            return None
        folder = cache / "mambahome" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        # RuntimeError: neither HOME nor an entry in passwd.
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
