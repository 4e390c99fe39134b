"""What every run.json says alike: plain values, versions, devices."""

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax


def plain(value: Any) -> Any:
    """As JSON takes it: paths as text."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of the packages that decide the numbers; "not installed" where one runs from its sources alone."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def device() -> str:
    """How many devices there are, and of what kind."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
