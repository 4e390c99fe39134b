"""How many cores this process may use."""

import os


def usable_cores() -> int:
    """Those that it was given, where the system tells (Linux), else all of the machine; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
