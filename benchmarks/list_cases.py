"""Seconds to recognise and list a dataset of many cases, from names alone: AbdomenAtlas' layout with tiny files.

python benchmarks/list_cases.py [--cases 5000] [--masks 25]; prints one line of JSON.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

from mambahome_jax.datasets.layouts.abdomenatlas import STRUCTURES
from mambahome_jax.datasets.registry import load_dataset


def main() -> None:
    """Write the folder, list it twice (the first time with a cold cache of this process only), and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--masks", type=int, default=len(STRUCTURES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.cases):
            case = Path(folder) / f"BDMAP_{number:08}"
            (case / "segmentations").mkdir(parents=True)
            for name in ("ct", *(f"segmentations/{part}" for part in STRUCTURES[: options.masks])):
                (case / f"{name}.nii.gz").touch()
        seconds, cpu = [], []
        for _ in range(2):
            begun, busy = time.perf_counter(), time.process_time()
            dataset = load_dataset(folder)
            cpu.append(round(time.process_time() - busy, 2))
            seconds.append(round(time.perf_counter() - begun, 2))
    result = {
        "cases": len(dataset.cases),
        "files": options.cases * (options.masks + 1),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
