"""Time HD95 and NSD of a pair of label maps against MONAI's on the CPU.

python benchmarks/evaluate.py --monai_python OTHER_ENVIRONMENT/bin/python --json evaluate.json

Ours is what `evaluate` does with a case: all scores of all structures at once, Dice and ASSD too. MONAI's are
compute_hausdorff_distance(percentile=95) and compute_surface_dice, structure by structure, as a loop over classes that
were all unpacked would not fit into memory; masks are made outside of its time. Both run in turn, in processes of their
own; reading, imports and a first small call are in neither's time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1.0


def make_pair(folder: Path, shape: tuple[int, int, int], structures: int) -> None:
    """prediction.npy and reference.npy, uint8: ellipsoids with wavy surfaces, from a fifth of the width down to a
    thirtieth, and the same with other waves, a little off."""
    rng = np.random.default_rng(0)
    labels = {name: np.zeros(shape, np.uint8) for name in ("reference", "prediction")}
    size = np.array(shape)
    for value in range(1, structures + 1):
        radii = size * (0.2 * 0.85 ** (value - 1) + 0.015) * rng.uniform(0.7, 1.2, 3)
        centre = rng.uniform(radii, size - radii)
        for name, off in (("reference", 0.0), ("prediction", 2.0)):
            middle, phase = centre + off * rng.standard_normal(3), rng.uniform(0, 6, 3)
            box = tuple(
                slice(max(int(c - 1.2 * r), 0), min(int(c + 1.2 * r) + 1, n))
                for c, r, n in zip(middle, radii, shape, strict=True)
            )
            axes = np.ogrid[box]
            far = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, middle, radii, strict=True))
            waves = sum(np.sin(axis / 5 + p) for axis, p in zip(axes, phase, strict=True))
            labels[name][box][far + 0.05 * waves < 1] = value
    for name, array in labels.items():
        # As files have it: the first axis is the fastest.
        np.save(folder / f"{name}.npy", np.asfortranarray(array))


def ours(prediction: np.ndarray, reference: np.ndarray, structures: int, spacing: Any, surface: str) -> np.ndarray:
    """(structures, 2): HD95 in mm and NSD."""
    from mambahome_jax.evaluation.metrics import compare

    pairs = compare(prediction, reference, structures, spacing, surface="area" if surface == "area" else "voxels")
    return np.array([(pair.hausdorff(95), pair.surface_dice(TOLERANCE), pair.mean_distance()) for pair in pairs])[:, :2]


def monai(
    prediction: np.ndarray, reference: np.ndarray, structures: int, spacing: Any
) -> tuple[np.ndarray, list[float]]:
    """As `ours`, and seconds and processor seconds without making the masks."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    warnings.simplefilter("ignore")
    rows, seconds = [], [0.0, 0.0]
    how = {"include_background": True, "spacing": list(spacing)}
    for value in range(1, structures + 1):
        masks = [
            torch.from_numpy(np.ascontiguousarray(array == value))[None, None] for array in (prediction, reference)
        ]
        begun = time.perf_counter(), time.process_time()
        far = compute_hausdorff_distance(*masks, percentile=95, **how)
        near = compute_surface_dice(*masks, [TOLERANCE], **how)
        seconds[0] += time.perf_counter() - begun[0]
        seconds[1] += time.process_time() - begun[1]
        rows.append((float(far), float(near)))
    return np.array(rows), seconds


def one(who: str, folder: Path, structures: int, spacing: Any) -> dict[str, Any]:
    """Seconds, processor seconds and scores of one run."""
    pair = [np.load(folder / f"{name}.npy") for name in ("prediction", "reference")]
    small = [array[:: max(array.shape[0] // 32, 1), ::16, ::16] for array in pair]
    if who == "monai":
        monai(*small, structures, spacing)
        scores, seconds = monai(*pair, structures, spacing)
    else:
        ours(*small, structures, spacing, who)
        begun = time.perf_counter(), time.process_time()
        scores = ours(*pair, structures, spacing, who)
        seconds = [time.perf_counter() - begun[0], time.process_time() - begun[1]]
    return {"seconds": seconds[0], "processor_s": seconds[1], "scores": scores.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300), help="voxels")
    parser.add_argument("--spacing", type=float, nargs=3, default=(0.8, 0.8, 1.5), help="mm")
    parser.add_argument("--structures", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many runs counts, on all sides")
    parser.add_argument("--monai_python", default=sys.executable, help="interpreter that has MONAI")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(args.only[0], Path(args.only[1]), args.structures, args.spacing)))
        return

    probe = "import monai, torch, scipy; print(monai.__version__, torch.__version__, scipy.__version__)"
    found = subprocess.run([args.monai_python, "-c", probe], capture_output=True, text=True, check=False)
    versions = found.stdout.split() if found.returncode == 0 else []
    pythons = {"voxels": sys.executable, "area": sys.executable} | ({"monai": args.monai_python} if versions else {})
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), tuple(args.shape), args.structures)
        for _ in range(args.repeats):
            # In turn, so that other work on the machine meets all of them.
            for who, python in pythons.items():
                command = [python, __file__, "--structures", str(args.structures), "--only", who, folder]
                command += ["--spacing", *map(str, args.spacing)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                run = json.loads(output.splitlines()[-1])
                best[who] = min(best.get(who, run), run, key=lambda row: row["processor_s"])
    cores = len(os.sched_getaffinity(0))
    print(f"{args.shape} voxels, {args.structures} structures, {cores} cores, load {os.getloadavg()[0]:.1f}")
    for who, row in best.items():
        print(f"{who}: {row['seconds']:.2f} s, of processors {row['processor_s']:.2f} s")
    if versions:
        apart = np.abs(np.array(best["voxels"]["scores"]) - best["monai"]["scores"]).max(axis=0)
        ratios = [best["monai"][key] / best["voxels"][key] for key in ("seconds", "processor_s")]
        print(f"{ratios[0]:.1f} times as fast as MONAI, by processor seconds {ratios[1]:.1f} times")
        print(f"largest difference: HD95 {apart[0]:.1e} mm, NSD {apart[1]:.1e}")
    else:
        print("MONAI is not installed there, so there is nothing to compare with.")
    if args.json:
        report = {"runs": best, "load_average": os.getloadavg(), "machine": platform.machine(), "cores": cores}
        report |= {"shape": args.shape, "spacing": args.spacing, "structures": args.structures}
        report["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
        if versions:
            report["versions"] |= dict(zip(("monai", "torch", "scipy of monai"), versions, strict=True))
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
