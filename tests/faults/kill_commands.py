"""Kill preprocess, infer, evaluate and convert at random moments: every file with its final name is whole, and a second
run ends as one that was never killed.

python -m tests.faults.kill_commands --kills 20 --json kills.json      # so many of each command

Signals take turns: KILL, TERM, INT. The times are spread over what the command takes without being killed. For training
see kill_training.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mambahome_jax.errors import MambaHomeError
from mambahome_jax.imaging.volume import read_labels, read_volume
from mambahome_jax.weights.weights import read_weights
from tests.commands.scans import scan, write
from tests.conftest import ROOT, golden_path
from tests.faults.results import tell

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CASES, SHAPE = 12, (40, 40, 24)
_INFER = """
import sys
from mambahome_jax.cli import run_command
from mambahome_jax.inference import batch
from tests.faults.fuzz_worker import PROPERTIES
from tests.inference.models import Levels
batch.load_model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES)
raise SystemExit(run_command("infer", sys.argv[1:], "infer.py"))
"""


def commands(root: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Name -> the program's arguments for an output folder; writes the inputs below root."""
    for number in range(CASES):
        image, label = scan(SHAPE, seed=number)
        write(root / f"in/images/{number:02}.nii.gz", image)
        write(root / f"in/labels/{number:02}.nii.gz", label)
    mambahome = [sys.executable, "-m", "mambahome_jax"]
    data, flags = str(root / "in"), ["--spacing", "1", "1", "3", "--modality", "ct", "--num_workers", "1"]
    maps, weights = str(root / "in/labels"), str(golden_path("mambahome_tiny.pth"))
    return {
        "preprocess": lambda out: [*mambahome, "preprocess", "--input_path", data, "--output_path", str(out), *flags],
        "infer": lambda out: [
            *(sys.executable, "-c", _INFER, "--data_path", f"{data}/images", "--model_path", "none"),
            *("--output_dir", str(out), "--save_probabilities"),
        ],
        "evaluate": lambda out: [
            *(*mambahome, "evaluate", "--predictions", maps, "--references", maps, "--output_dir", str(out)),
            *("--num_workers", "1"),
        ],
        "convert": lambda out: [*mambahome, "convert", weights, str(out / "w.safetensors"), "--overwrite"],
        "convert folder": lambda out: [*mambahome, "convert", weights, str(out / "best"), "--overwrite"],
    }


def start(program: list[str], log: Path) -> subprocess.Popen:
    """The program in a group of its own, as a terminal or a queue has it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(log.parent / "xla")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OPENBLAS_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def broken(folder: Path) -> list[str]:
    """Files below the folder that have their final names and cannot be read to their end."""
    found = []
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".gz": lambda path: read_labels(path) if path.parent.name != "images" else read_volume(path),
        ".npz": lambda path: [np.load(path)[name] for name in np.load(path).files],
        ".png": lambda path: Image.open(path).load(),
        ".csv": lambda path: [row.split(",") for row in path.read_text().splitlines()][-1],
        ".safetensors": read_weights,
    }
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or ".partial" in part for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and path.suffix in readers and "model" not in path.parts:
            try:
                readers[path.suffix](path)
            except (MambaHomeError, OSError, ValueError, KeyError, IndexError) as error:
                found.append(f"{path.relative_to(folder)}: {error}")
    if (folder / "best").is_dir():
        try:
            read_weights(folder / "best")
        except MambaHomeError as error:
            found.append(str(error))
    return found


def contents(folder: Path) -> dict[str, Any]:
    """What two ends of one command have to share: every file but the reports of times, and the folders of Orbax by
    their parameters."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in ("run.json", "summary.json") and not name.startswith("best/"):
            found[name] = path.read_bytes()
    if (folder / "best").is_dir():
        found |= {name: array.tobytes() for name, array in read_weights(folder / "best").params.items()}
    return found


def kill(root: Path, name: str, program: Callable[[Path], list[str]], kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill it so often, each time followed by a run to the end; returns the counts and the faults.

    A command that ended before the signal came is started again, and counted as too late.
    """
    chance, log = random.Random(seed), root / "log"
    straight = root / f"{name}-straight"
    for _ in range(2):  # the second time its programs are compiled
        shutil.rmtree(straight, ignore_errors=True)
        begun = time.monotonic()
        if start(program(straight), log).wait() != 0:
            raise RuntimeError(f"{name} failed: {log.read_text()[-2000:]}")
        took = time.monotonic() - begun
    expected = contents(straight)
    out, faults, ended, partials, number = root / f"{name}-killed", [], 0, 0, 0
    while number < kills:
        if chance.random() < 0.3:
            shutil.rmtree(out, ignore_errors=True)
        process = start(program(out), log)
        # Most of it is imports, during which nothing can break.
        time.sleep(took * chance.uniform(0.5, 1.0))
        if process.poll() is not None and ended < 4 * kills:
            ended += 1
            continue
        number_of = SIGNALS[number % len(SIGNALS)]
        process.send_signal(number_of)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            faults.append(f"{name} kill {number}: {number_of.name} did not end it within a minute")
            process.kill()
            process.wait()
        if out.exists():
            partials += any(".partial" in path.name for path in out.rglob("*"))
            faults += [f"{name} kill {number}: {fault}" for fault in broken(out)]
        code = start(program(out), log).wait()
        if code != 0:
            faults.append(f"{name} kill {number}: the run after it ended with {code}")
        found = contents(out)
        different = [key for key in {*expected, *found} if expected.get(key) != found.get(key)]
        faults += [f"{name} kill {number}: {key} differs after it" for key in sorted(different)]
        number += 1
    return {"kills": kills, "too late": ended, "left partial files": partials, "seconds": took, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--commands", nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = commands(Path(folder))
        result = {name: kill(Path(folder), name, found[name], args.kills) for name in args.commands or found}
    tell(result, args.json)
    return int(any(entry["faults"] for entry in result.values()))


if __name__ == "__main__":
    raise SystemExit(main())
