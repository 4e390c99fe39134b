"""What every run.json says alike: plain values, versions, devices."""

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from mambahome_jax.support.program_cache import program_cache


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


def say_versions() -> None:
    """Print what a report of a fault needs: Python, the system, the packages, the devices, where programs are kept."""
    print(f"system: {platform.platform()}")
    for name, number in versions(("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")).items():
        print(f"{name} {number}")
    print(f"devices: {device()}")
    print(f"compiled programs: {program_cache() or 'not kept'}")


def device() -> str:
    """How many devices there are, and of what kind."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
