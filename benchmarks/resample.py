"""Time `resample` against MONAI's Spacingd on one CT-like array, which is left out where MONAI is not installed.

Cubic splines are timed against scipy.ndimage.zoom, which nnU-Net resamples with. One thread: OPENBLAS_NUM_THREADS=1.

python benchmarks/resample.py --shape 512 512 400 --spacing 0.8 0.8 3.0 --json resample.json
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import ndimage

from mambahome_jax.imaging.geometry import Order, resample
from mambahome_jax.imaging.volume import Volume


def make_volume(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Volume:
    """Smooth structures with noise, float32, in the memory order that a NIfTI file has."""
    rng = np.random.default_rng(0)
    i, j, k = np.ogrid[tuple(slice(n) for n in shape)]
    smooth = 200 * np.sin(i / 17) * np.cos(j / 23) * np.sin(k / 11)
    array = np.asfortranarray(smooth + 20 * rng.standard_normal(shape, dtype=np.float32), dtype=np.float32)
    return Volume(array, np.diag([*spacing, 1.0]))


def ours(volume: Volume, spacing: tuple[float, float, float], order: Order) -> np.ndarray:
    return resample(volume, spacing, order).array


def zoom(volume: Volume, shape: tuple[int, ...]) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, volume.shape, strict=True)]
    return ndimage.zoom(volume.array, factors, order=3, mode="nearest", grid_mode=True)


def monai_spacing(volume: Volume, spacing: tuple[float, float, float], order: str) -> np.ndarray:
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacingd

    mode = "bilinear" if order == "linear" else "nearest"
    transform = Spacingd(keys="image", pixdim=spacing, mode=mode)
    image = MetaTensor(
        torch.from_numpy(np.ascontiguousarray(volume.array))[None], affine=torch.from_numpy(volume.affine)
    )
    return transform({"image": image})["image"][0].numpy()


def measure(function: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float, float]:
    """The result, and the medians of wall-clock seconds and of those of all cores."""
    seconds = []
    for _ in range(repeats):
        start, processor = time.perf_counter(), time.process_time()
        result = function()
        seconds.append((time.perf_counter() - start, time.process_time() - processor))
    wall, cores = map(statistics.median, zip(*seconds, strict=True))
    return result, wall, cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 200), help="voxels")
    parser.add_argument("--from_spacing", type=float, nargs=3, default=(0.75, 0.75, 1.0), help="mm")
    parser.add_argument("--spacing", type=float, nargs=3, default=(0.8, 0.8, 3.0), help="mm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    volume = make_volume(tuple(args.shape), tuple(args.from_spacing))
    labels = Volume(np.asfortranarray(volume.array > 0).astype(np.uint8, order="F"), volume.affine)
    has_monai = importlib.util.find_spec("monai") is not None
    if has_monai:
        # The first call imports; that is not what is compared.
        monai_spacing(make_volume((8, 8, 8), (1.0, 1.0, 1.0)), (2.0, 2.0, 2.0), "linear")
    rows = []
    cases: tuple[tuple[Order, Volume], ...] = (("linear", volume), ("cubic", volume), ("nearest", labels))
    for order, source in cases:
        row: dict[str, Any] = {"order": order}
        ask = functools.partial(ours, source, tuple(args.spacing), order)
        result, row["ours_s"], row["ours_cpu_s"] = measure(ask, args.repeats)
        row["shape"] = result.shape
        row["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if order == "cubic":
            _, _, row["scipy_cpu_s"] = measure(functools.partial(zoom, source, result.shape), 1)
        elif has_monai:
            theirs, row["monai_s"], _ = measure(lambda s=source, o=order: monai_spacing(s, tuple(args.spacing), o), 1)
            difference = np.abs(result.astype(np.float32) - theirs)
            row["largest_difference"] = float(difference.max())
            row["differing"] = float((difference > 1e-3).mean())
        rows.append(row)

    print(f"{'x'.join(map(str, args.shape))} at {args.from_spacing} mm -> {args.spacing} mm, {os.cpu_count()} cores")
    for row in rows:
        line = f"{row['order']:8s} {row['shape']}  ours {row['ours_s']:.2f} s ({row['ours_cpu_s']:.2f} CPU s)"
        if "scipy_cpu_s" in row:
            line += f"  scipy {row['scipy_cpu_s']:.2f} CPU s"
        if "monai_s" in row:
            line += f"  MONAI {row['monai_s']:.2f} s ({row['monai_s'] / row['ours_s']:.1f} times)"
            line += (
                f"  largest difference {row['largest_difference']:.2g}, {row['differing']:.2%} of voxels above 0.001"
            )
        print(line)
    if not has_monai:
        print("MONAI is not installed here, so there is nothing to compare with.")
    if args.json:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
        if has_monai:
            import monai
            import torch

            versions |= {"monai": monai.__version__, "torch": torch.__version__}
        hardware = {"machine": platform.machine(), "cores": os.cpu_count()}
        report = {"shape": args.shape, "from_spacing": args.from_spacing, "spacing": args.spacing, "rows": rows}
        args.json.write_text(json.dumps(report | {"versions": versions, "hardware": hardware}, indent=2) + "\n")


if __name__ == "__main__":
    main()
