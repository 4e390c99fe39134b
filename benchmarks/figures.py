"""What benchmarks write of what they measured."""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax

from mambahome_jax.support.files import jsonable
from mambahome_jax.training.memory import program_bytes


def tell(args: argparse.Namespace, **measured: object) -> None:
    """Print what was measured, with versions and arguments; write it to `args.json` where that is given."""
    found = measured | _made_with(args)
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def planned_gib(compiled: Any) -> float:
    """What a compiled function takes on each device, arguments and results included; nan where XLA does not say."""
    found = program_bytes(compiled)
    return math.nan if found is None else found / 2**30


def write_rows(path: Path | None, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A table as JSON, {"about": device, versions and arguments, "rows": ...}; what was not measured is null."""
    if path is None:
        return
    about = {"device": jax.devices()[0].device_kind} | _made_with(args)
    path.write_text(json.dumps(jsonable({"about": about, "rows": rows}), indent=1))


def _made_with(args: argparse.Namespace) -> dict[str, Any]:
    """Versions and arguments."""
    given = {name: value for name, value in vars(args).items() if name != "json"}
    return {"jax": jax.__version__, "python": platform.python_version()} | given
