"""Memory of training steps: as a plan estimates it, by XLA's account, and as measured; and a fit of the estimate.

python benchmarks/step_memory.py --json step_memory.json
python benchmarks/step_memory.py --fit step_memory.json

Each row is a `mambahome train` of a few steps in a process of its own, on random volumes. Several run side by side on
the first GPU, each with its part of the memory. "16 GiB" is planned for a limit of 16 GiB; "too many" begins with more
patches than such a limit has room for. --small tries the script on a CPU, with small patches.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from figures import tell
from scipy.optimize import nnls
from train_memory import ROOT, make_dataset

from mambahome_jax.config import Triple, network_from_json
from mambahome_jax.preprocessing.fingerprint import Fingerprint
from mambahome_jax.preprocessing.grids import patch_and_grids
from mambahome_jax.preprocessing.plan import PLAN, Machine, Setting, make_plan, write_plan
from mambahome_jax.preprocessing.step_memory import parameters, step_elements
from mambahome_jax.support.devices import gpu_memory_gib

LIMIT_GIB = 16
SECONDS = 400  # the most that a training may take
SCANS: dict[str, tuple[tuple[float, float, float], Triple]] = {
    "hippocampus": ((1.0, 1.0, 1.0), (36, 50, 35)),
    "left atrium": ((0.625, 0.625, 0.625), (190, 142, 88)),
    "ACDC": ((1.5, 1.5, 10.0), (256, 216, 10)),
    "AMOS": ((0.7, 0.7, 5.0), (512, 512, 100)),
    "pancreas": ((0.8, 0.8, 2.5), (512, 512, 93)),
}


class Row(NamedTuple):
    """What is trained: on which scans, planned with `given` settings, within `gib` of the GPU.

    gib: at least what the step takes. limited: `gib` is also what the plan is made for.
    """

    name: str
    scans: str
    model: str
    classes: int
    gib: float
    given: Mapping[str, Any] = {}
    limited: bool = False
    published: bool = False


PLANS = (
    Row("hippocampus, tiny", "hippocampus", "MambaHoME_tiny", 3, 8),
    Row("hippocampus, small", "hippocampus", "MambaHoME_small", 3, 8),
    Row("left atrium, small", "left atrium", "MambaHoME_small", 3, 14),
    Row("ACDC, small, strides", "ACDC", "MambaHoME_small", 4, 16),
    Row("AMOS, small, strides", "AMOS", "MambaHoME_small", 16, 18),
    Row("published 2 x 128^3", "left atrium", "MambaHoME", 16, 16, published=True),
    Row("16 GiB", "pancreas", "MambaHoME", 3, LIMIT_GIB, limited=True),
    Row("too many", "left atrium", "MambaHoME_tiny", 3, LIMIT_GIB, {"patch_size": (96,) * 3, "batch_size": 80}, True),
)
MORE = (
    Row("left atrium, tiny", "left atrium", "MambaHoME_tiny", 3, 8, {"patch_size": (96,) * 3, "batch_size": 4}),
    Row("AMOS, tiny, strides", "AMOS", "MambaHoME_tiny", 16, 10, {"batch_size": 8}),
    Row("left atrium, one patch", "left atrium", "MambaHoME_small", 3, 8, {"batch_size": 1}),
    Row("left atrium, published size", "left atrium", "MambaHoME", 3, 24),
    Row("AMOS, published size", "AMOS", "MambaHoME", 16, 24, {"batch_size": 2}),
    Row("SegMamba, 2 x 128^3", "left atrium", "SegMamba", 4, 24, {"patch_size": (128,) * 3, "batch_size": 2}),
    Row("hippocampus, published size", "hippocampus", "MambaHoME", 3, 16, {"batch_size": 4}),
)


def prepare(row: Row, folder: Path, card: float | None, small: bool) -> Machine:
    """Write volumes, and the plan that the training is to follow."""
    spacing, shape = SCANS[row.scans]
    machine = Machine() if card is None else Machine(card, row.gib / card) if row.limited else Machine(card)
    given = {"model": row.model, "spacing": spacing, "length": {"steps": 3}, **row.given}
    if small:
        patch = patch_and_grids(spacing, shape, 16**3).patch_size
        given |= {"model": "MambaHoME_tiny", "patch_size": patch, "batch_size": 1}
    fingerprint = Fingerprint(np.array([spacing]), np.array([shape], float))
    plan = make_plan(fingerprint, machine, {name: Setting(value, "given") for name, value in given.items()})
    a, b, c = (128,) * 3 if row.published and not small else plan.patch_size.value
    make_dataset(folder, 2, (a + 8, b + 8, c + 8), spacing)
    if not row.published or small:
        write_plan(folder / PLAN, plan, machine, fingerprint)
    return machine


def train(row: Row, folder: Path, card: float | None, small: bool, run: str = "run") -> dict[str, Any]:
    """Train in a process of its own; what its run.json says of memory, or why there is none."""
    command = [sys.executable, str(ROOT / "train.py"), "--data_train", str(folder), "--output_dir", str(folder / run)]
    command += ["--hold_out", "0", "--num_workers", "0", "--num_devices", "1", "--classes", str(row.classes)]
    if row.published and not small:
        command += ["--recipe", "published", "--model", "MambaHoME", "--patch_size", "128", "128", "128"]
        command += ["--batch_size", "2", "--steps", "3"]
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / "programs"))
    if card is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{row.gib / card:.6f}"
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
        failed = f"{done.returncode}: {(done.stderr or done.stdout)[-2000:]}" if done.returncode else None
        tried = [line for line in done.stdout.splitlines() if "Trying" in line]
    except subprocess.TimeoutExpired as error:
        failed, tried = f"{error}: {str(error.stdout)[-2000:]}", []
    found: dict[str, Any] = {"name": row.name, "seconds": round(time.perf_counter() - begun, 1), "limit_gib": row.gib}
    if failed is not None:
        return found | {"failed": failed}
    report = json.loads((folder / run / "run.json").read_text())
    network = network_from_json(report["model"])
    patch, batch = report["training"]["patch_size"], report["training"]["global_batch"]
    return found | {
        **(report["memory"] or {}),
        "tried": tried,
        "model": report["configuration"]["model"],
        "recipe": report["configuration"]["recipe"],
        "precision": report["training"]["precision"],
        "patch": patch,
        "batch": batch,
        "classes": network.out_chans,
        "strides": network.strides,
        "parameters": parameters(network),
        "elements": step_elements(network, patch, batch),
        "device": report["device"],
        "versions": report["versions"],
    }


def waves(rows: Sequence[Row], card: float | None, jobs: int) -> list[list[Row]]:
    """Rows that run side by side: up to `jobs`, in nine tenths of the card."""
    found: list[list[Row]] = [[]]
    for row in rows:
        if len(found[-1]) == jobs or (card and sum(other.gib for other in [*found[-1], row]) > 0.9 * card):
            found.append([])
        found[-1].append(row)
    return found


def print_row(row: Mapping[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['name']:28s} {row['seconds']:6.0f} s  FAILED {row['failed']}", flush=True)
        return
    figures = [row.get(f"{name}_gib") for name in ("planned", "xla", "peak", "offered")]
    columns = " ".join("       -" if gib is None else f"{gib:8.2f}" for gib in figures)
    errors = " ".join(f"{100 * (gib / figures[2] - 1):+7.1f}%" for gib in figures[:2] if gib and figures[2])
    sizes = f"{row['batch']} x {' x '.join(map(str, row['patch']))}, {row['model']}"
    print(f"{row['name']:28s} {row['seconds']:6.0f} s {columns} {errors}  {sizes}", flush=True)
    for line in row["tried"]:
        print(f"    {line}", flush=True)


def fit(rows: Sequence[Mapping[str, Any]]) -> None:
    """Fit the estimate to XLA's account, by relative error, and print what is left."""
    rows = [row for row in rows if row.get("peak_gib") and row["precision"] == "bf16"]
    needed = np.array([row["xla_gib"] * 2**30 for row in rows])
    table = np.array([[1, row["parameters"], *row["elements"][:2]] for row in rows], float)
    found, _ = nnls(table / needed[:, None], np.ones(len(rows)))
    print("bytes of every step, for each parameter, and for each element:", np.round(found, 2).tolist())
    for row, error in zip(rows, table @ found / needed - 1, strict=True):
        print(f"{row['name']:28s} {row['xla_gib']:8.2f} GiB {100 * error:+7.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help="rows to run (default: the plans)")
    parser.add_argument("--more", action="store_true", help="run the rows that only the fit needs")
    parser.add_argument("--jobs", type=int, default=8, help="trainings side by side")
    parser.add_argument("--again", action="store_true", help="run the first row once more, compiled already")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--fit", nargs="+", type=Path, help="only fit, to the rows of these files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.fit:
        fit([row for file in args.fit for row in json.loads(file.read_text())["rows"]])
        return
    chosen = [row for row in (*PLANS, *MORE) if row.name in args.names] if args.names else MORE if args.more else PLANS
    card = gpu_memory_gib()
    rows: list[dict[str, Any]] = []
    print(f"{'GiB on each device':28s}             planned      xla     peak  offered  against the peak")
    with tempfile.TemporaryDirectory() as name:
        folders = {row.name: Path(name) / str(number) for number, row in enumerate(chosen)}
        for row in chosen:
            prepare(row, folders[row.name], card, args.small)
        for wave in waves(chosen, card, args.jobs):
            with ThreadPoolExecutor(len(wave)) as pool:
                for found in pool.map(lambda row: train(row, folders[row.name], card, args.small), wave):
                    rows.append(found)
                    print_row(found)
        if args.again:
            rows.append(train(chosen[0], folders[chosen[0].name], card, args.small, "again"))
            print_row(rows[-1])
    tell(args, rows=rows)
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
