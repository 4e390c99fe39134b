"""Seconds to read and write .nii.gz of a synthetic CT and a label map, with isal and with zlib.

python benchmarks/nifti_files.py [--shape 512 512 100] [--repeats 3]; prints a line of JSON for each,
the best of the repeats.
"""

import argparse
import gzip
import json
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from infer_volume import make_scan

from mambahome_jax.imaging import nifti
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume


def balls(shape: tuple[int, int, int]) -> np.ndarray:
    """(D0, D1, D2) uint8: 15 labels of smooth shapes, the last axis contiguous."""
    rng = np.random.default_rng(0)
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    labels = np.zeros(shape, np.uint8)
    for value in range(1, 16):
        centre, radius = rng.uniform(-0.7, 0.7, 3), rng.uniform(0.05, 0.3, 3)
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radius, strict=True)) < 1
        labels[inside] = value
    return labels


def best(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of the clock and of all cores, the least of each."""
    clock, cores = [], []
    for _ in range(repeats):
        begun, busy = time.perf_counter(), time.process_time()
        function()
        clock.append(time.perf_counter() - begun)
        cores.append(time.process_time() - busy)
    return {"seconds": round(min(clock), 3), "cpu_seconds": round(min(cores), 3)}


def main() -> None:
    """Write each volume to a temporary folder and read it again, with each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 100])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shape = tuple(options.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nii.gz"
        make_scan(path, shape, (0.8, 0.8, 1.0))
        scan = read_volume(path, as_stored=True)
        values = np.asarray(scan.array, np.float32) + np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        volumes = {
            "CT, int16": (scan, lambda: read_volume(path, as_stored=True)),
            "CT, float32": (Volume(values, scan.affine), lambda: read_volume(path)),
            "labels": (Volume(balls(shape), scan.affine), lambda: read_labels(path)),
        }
        for engines in dict.fromkeys([(nifti.deflate, nifti.packer), (zlib, gzip)]):
            nifti.deflate, nifti.packer = engines
            for name, (volume, read) in volumes.items():
                result = {
                    "volume": name,
                    "by": nifti.packer.__name__,
                    "write": best(lambda volume=volume: write_volume(path, volume), options.repeats),
                    "read": best(read, options.repeats),
                    "megabytes": round(path.stat().st_size / 1e6, 2),
                    "threads": nifti.threads(),
                    "load": round(os.getloadavg()[0], 1),
                    "python": platform.python_version(),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
