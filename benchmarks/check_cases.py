"""Seconds and memory of `mambahome check` on a dataset of many tiny cases, all voxels read, every process counted.

python benchmarks/check_cases.py [--cases 5000] [--masks 0] [--workers 1 2]; prints a line of JSON for each number of
workers. With masks the layout is AbdomenAtlas' with so many of them a case, else images/ and labels/.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 16, 12)


def make_cases(folder: Path, cases: int, masks: int) -> None:
    """Scans of noise, each another, with label maps or masks of two blocks or more."""
    from mambahome_jax.datasets.layouts.abdomenatlas import STRUCTURES

    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    label = np.zeros(SHAPE, np.uint8)
    label[2:6, 3:9, 2:5], label[7:10, 8:14, 4:7] = 1, 2
    rng = np.random.default_rng(0)
    for number in range(cases):
        # Each at a place of its own, so that no header is that of another case.
        affine[:3, 3] = rng.uniform(-100, 100, 3)
        image = (rng.normal(0, 30, SHAPE) - np.where(label > 0, 0, 1000)).astype(np.int16)
        if masks:
            home = folder / f"BDMAP_{number:08}"
            (home / "segmentations").mkdir(parents=True)
            files = {"ct": image} | {f"segmentations/{name}": label == 1 for name in STRUCTURES[:masks]}
        else:
            home = folder
            files = {f"images/case{number:05}": image, f"labels/case{number:05}": label}
            for kind in ("images", "labels"):
                (home / kind).mkdir(exist_ok=True)
        for name, array in files.items():
            stored = array if array is image else array.astype(np.uint8)
            nib.save(nib.Nifti1Image(stored, affine), home / f"{name}.nii.gz")


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def memory_mib() -> float:
    """Of this process and its children, what they share counted in each."""
    total = 0
    pids = [os.getpid()]
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total / 2**20


def measure(folder: Path, workers: int) -> dict[str, float]:
    """Seconds, processor seconds of all processes, and the most memory of all processes together."""
    from mambahome_jax.flags import CheckConfig
    from mambahome_jax.preprocessing.examine import check_folders

    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], memory_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, busy = time.perf_counter(), processor_seconds()
    code = check_folders(CheckConfig(folder, num_workers=workers)).exit_code
    seconds, processor = time.perf_counter() - begun, processor_seconds() - busy
    done.set()
    watcher.join()
    return {
        "workers": workers,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_mib": round(most[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--masks", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        make_cases(folder, args.cases, args.masks)
        for workers in args.workers:
            result = {"cases": args.cases, "masks": args.masks} | measure(folder, workers)
            result |= {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
            result |= {"python": platform.python_version(), "numpy": np.__version__}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
