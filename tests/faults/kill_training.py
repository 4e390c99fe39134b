"""Kill a training with -9 at random moments, resume it each time, and compare its end with an uninterrupted run.

python -m tests.faults.kill_training --kills 10 --json kills.json
python -m tests.faults.kill_training --kills 30 --folds 3 --steps 60

Every second kill waits until a checkpoint is being written. With --folds it is a cross-validation that is killed, and
its pooled scores are compared too: a kill may hit the scores of a fold, or the beginning of the next. The network is
MambaHoME_tiny, the scans are synthetic, the programs compiled with the flags of the tests.
Exit code 0: parameters, optimizer state and losses have the same bits; 1 otherwise.
"""

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mambahome_jax.errors import CheckpointError
from mambahome_jax.weights.checkpoint import find_checkpoint, read_checkpoint_config, read_checkpoint_params
from mambahome_jax.weights.model_path import CROSS_VALIDATION
from tests.commands.test_train import _dataset
from tests.conftest import ROOT

FLAGS = ("--model", "MambaHoME_tiny", "--patch_size", "32", "16", "16", "--batch_size", "1", "--checkpoint_every", "2")
COMPARED = ("step", "epoch", "loss", "lr", "grad_norm", "update_norm", "val_dice")


def kill_training(
    folder: Path,
    kills: int,
    steps: int,
    program: Sequence[str] = (sys.executable, "train.py"),
    seed: int = 0,
    folds: int = 0,
) -> dict[str, Any]:
    """Do it in an empty `folder`; returns the kills, and whether the two runs ended with the same bits."""
    chance = random.Random(seed)
    data = _dataset(folder / "data", val=("c3", "c4"))
    command = [*program, "--data_train", str(data), *FLAGS, "--steps", str(steps), "--val_every", str(steps // 3)]
    command += ["--folds", str(folds)] if folds else []
    begun = time.perf_counter()
    _finish(_start([*command, "--output_dir", str(folder / "straight")], folder))
    straight_s = time.perf_counter() - begun
    run, told = folder / "killed", []
    while len(told) < kills:
        process = _start([*command, "--output_dir", str(run), "--resume"], folder)
        found = _kill(process, _homes(run, folds), chance, while_writing=len(told) % 2 == 1)
        if found is None:
            raise RuntimeError(f"the run was through after {len(told)} kills: give it more --steps")
        told.append(found)
        print(f"kill {len(told)}: {found}", flush=True)
    _finish(_start([*command, "--output_dir", str(run), "--resume"], folder))
    return {
        "kills": told,
        "while_writing": sum("partial" in "".join(kill["left"]) for kill in told),
        "straight_seconds": round(straight_s, 1),
        "different": [
            name
            for one, other in zip(_homes(folder / "straight", folds), _homes(run, folds), strict=True)
            for name in _different(one, other)
        ]
        + (_different_scores(folder / "straight", run) if folds else []),
    }


def _homes(run: Path, folds: int) -> list[Path]:
    """The folders of the networks of a run."""
    return [run / f"fold_{fold}" for fold in range(folds)] or [run]


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    # One cache for all, so that a restart takes seconds.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    with (folder / "train.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _finish(process: subprocess.Popen) -> None:
    code = process.wait()
    if code != 0:
        raise RuntimeError(f"training ended with exit code {code}; see train.log")


def _kill(
    process: subprocess.Popen, homes: Sequence[Path], chance: random.Random, while_writing: bool
) -> dict[str, Any] | None:
    """Kill it after up to two more checkpoints and a random time; None where it ended before that."""
    before, wanted, begun = [_step(home) for home in homes], chance.randint(0, 2), time.time()
    while (
        (sum(map(_step, homes)) - sum(before)) // 2 < wanted
        or (while_writing and not any(list(home.glob("checkpoints/*.partial*")) for home in homes))
        or not any(_written_since(home / "run.json", begun) for home in homes)
    ):
        if process.poll() is not None:
            _finish(process)
            return None
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.04 if while_writing else 1.0))
    process.kill()
    process.wait()
    left = sorted(str(path.relative_to(home.parent)) for home in homes for path in home.glob("checkpoints/*"))
    for home, step in zip(homes, before, strict=True):
        try:
            read_checkpoint_params(home / "checkpoints" / "last")
        except CheckpointError as error:
            if step:
                raise RuntimeError(f"the checkpoint of step {step} is lost: {left}") from error
    return {"step": sum(map(_step, homes)), "left": left}


def _written_since(file: Path, begun: float) -> bool:
    return file.exists() and file.stat().st_mtime > begun


def _step(home: Path) -> int:
    try:
        return int(read_checkpoint_config(home / "checkpoints" / "last")["step"])
    except (CheckpointError, KeyError):
        return 0


def _different(straight: Path, killed: Path) -> list[str]:
    """Names of all values that differ in a bit."""
    different = []
    for item in ("model", "optimizer"):
        one, other = (read_arrays(find_checkpoint(run / "checkpoints" / "last") / item) for run in (straight, killed))
        different += [f"{item}{name}" for name in one if one[name].tobytes() != other[name].tobytes()]
    different += [] if _metrics(straight) == _metrics(killed) else ["metrics.csv"]
    return [f"{straight.name}: {name}" for name in different]


def _different_scores(straight: Path, killed: Path) -> list[str]:
    """Names of the files of the pooled scores, and of the label maps, that differ in a byte but for their folders."""
    names = [f"{CROSS_VALIDATION}/{name}" for name in ("metrics.csv", "summary.json")]
    names += [str(path.relative_to(straight)) for path in sorted(straight.glob("fold_*/validation/*.nii.gz"))]
    contents = ([(run / name).read_bytes().replace(bytes(run), b"") for name in names] for run in (straight, killed))
    return [name for name, one, other in zip(names, *contents, strict=True) if one != other]


def _metrics(run: Path) -> list[list[str]]:
    with (run / "metrics.csv").open() as file:
        return [[row[name] for name in COMPARED] for row in csv.DictReader(file)]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an item of a checkpoint, by their path in it."""
    handler = ocp.PyTreeCheckpointHandler()
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=on_host))
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = kill_training(args.folder or Path(temporary), args.kills, args.steps, seed=args.seed, folds=args.folds)
    about = {"jax": jax.__version__, "python": platform.python_version()}
    about |= {name: getattr(args, name) for name in ("steps", "folds", "seed")}
    if args.json:
        args.json.write_text(json.dumps({"about": about, **result}, indent=1))
    print(f"{args.kills} kills, {result['while_writing']} of them while a checkpoint was written")
    print("Same bits" if not result["different"] else f"Different: {result['different']}")
    return int(bool(result["different"]))


if __name__ == "__main__":
    raise SystemExit(main())
