"""What the benchmarks that start a whole program print: one line of JSON, and a file of it on request."""

import argparse
import json
import platform

import jax


def tell(args: argparse.Namespace, **measured: object) -> None:
    """Print what was measured, with versions and arguments; write it to `args.json` where that is given."""
    given = {name: value for name, value in vars(args).items() if name != "json"}
    found = measured | {"jax": jax.__version__, "python": platform.python_version()} | given
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
