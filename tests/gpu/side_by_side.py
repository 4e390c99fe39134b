"""Train folds side by side on the GPUs of this host and in turn on one of them, and compare bits and time.

python -m tests.gpu.side_by_side --folds 4 --steps 200 --json side_by_side.json

Synthetic scans and MambaHoME_small. Exit code 0: the weights of all folds have the same bits, and each ran on a GPU of
its own; 1 otherwise, 2 with fewer than two GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mambahome_jax.datasets.phantom import write_phantoms
from mambahome_jax.support.devices import visible_gpus
from mambahome_jax.support.files import read_json
from tests.conftest import ROOT
from tests.faults.kill_training import read_arrays


def mambahome(*words: str | Path) -> float:
    """Run a command in a process of its own; returns the seconds that it took."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mambahome_jax", *map(str, words)]
    subprocess.run(command, env=environment | {"PYTHONPATH": path}, check=True)
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpus = visible_gpus()
    if len(gpus) < 2:
        print(f"{len(gpus)} GPUs; expected two or more")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_phantoms(folder / "raw", 2 * args.folds)
        mambahome("preprocess", "--input_path", folder / "raw", "--output_path", folder / "ready", "--spacing", 2, 2, 2)
        train = ("train", "--data_train", folder / "ready", "--folds", args.folds, "--steps", args.steps)
        train += ("--val_every", args.steps, "--model", "MambaHoME_small")
        seconds = {
            "side by side": mambahome(*train, "--output_dir", folder / "apart"),
            "in turn": mambahome(*train, "--output_dir", folder / "turn", "--num_devices", 1),
        }
        different = []
        for fold in range(args.folds):
            one, other = (
                read_arrays(folder / run / f"fold_{fold}/checkpoints/last/model") for run in ("apart", "turn")
            )
            different += [f"fold_{fold}{name}" for name in one if not np.array_equal(one[name], other[name])]
        device = read_json(folder / "apart" / "fold_0" / "run.json")["device"]
        versions = read_json(folder / "apart" / "fold_0" / "run.json")["versions"]
    about = {"gpus": len(gpus), "device": device, "versions": versions, "folds": args.folds, "steps": args.steps}
    result = {"about": about, "seconds": seconds, "different": different}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return int(bool(different) or not device.startswith("1 x "))


if __name__ == "__main__":
    raise SystemExit(main())
