"""Patches a second of the training loader on a store that this script makes: by number of workers, with its memory.

python benchmarks/loader.py --workers 0 1 2 4 8 --patch 128 128 128 --step_ms 120 --json loader.json
python benchmarks/loader.py --volumes 4 --shape 512 512 1000 --workers 4

Volumes are smooth noise with two structures, float32 as preprocess.py stores them. "from disk" counts what the
processes read through the kernel's file system, cached or not (rchar of /proc); memory is the sum over the processes of
what each alone holds plus its share of what they share (PSS), at its highest. "waits" is the share of a training of
--step_ms a step that waits for its next batch.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np

from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store, StoreEntry, write_case, write_index


def make_volume(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (*shape, 1) float32 that compresses about as a scan does, label (*shape) uint8."""
    rng = np.random.default_rng(seed)
    # One tile repeated: the noise of a whole volume of this size would take longer to draw than to load.
    tile = rng.normal(0, 20, tuple(min(64, n) for n in shape)).astype(np.float32).round()
    image = np.empty((*shape, 1), np.float32)
    for first in range(0, shape[0], tile.shape[0]):
        rows = min(tile.shape[0], shape[0] - first)
        repeats = [-(-n // t) for n, t in zip(shape[1:], tile.shape[1:], strict=True)]
        image[first : first + rows, ..., 0] = np.tile(tile[:rows], (1, *repeats))[:, : shape[1], : shape[2]]
    label = np.zeros(shape, np.uint8)
    organ = tuple(slice(n // 4, n // 2) for n in shape)
    lesion = tuple(slice(n // 2, n // 2 + max(n // 16, 1)) for n in shape)
    image[organ] += 100
    image[lesion] += 200
    label[organ], label[lesion] = 1, 2
    return image, label


def make_store(root: Path, volumes: int, shape: tuple[int, int, int]) -> None:
    entries = []
    for number in range(volumes):
        image, label = make_volume(shape, number)
        entry = StoreEntry(
            id=f"volume{number}",
            shape=shape,
            channels=1,
            spacing=(0.8, 0.8, 3.0),
            affine=((0.8, 0.0, 0.0, 0.0), (0.0, 0.8, 0.0, 0.0), (0.0, 0.0, 3.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
            modality="ct",
            # Of a part: this is about reading.
            statistics=statistics(image[:64, :64, :64]),
            body_box=((0, 0, 0), shape),
            class_counts=None,
        )
        entries.append(write_case(root, entry, image, label))
    write_index(root, entries)


class Usage:
    """Bytes read and memory of this process and its children, watched from a thread while the block runs."""

    def __enter__(self) -> "Usage":
        self.read: dict[int, int] = {}
        self.first_read: dict[int, int] = {os.getpid(): _io(os.getpid())}
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def total_read(self) -> int:
        return sum(value - self.first_read.get(pid, 0) for pid, value in self.read.items())

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            family = [os.getpid(), *_children(os.getpid())]
            self.peak = max(self.peak, sum(_pss(pid) for pid in family))
            self.read |= {pid: _io(pid) for pid in family}


def _children(pid: int) -> list[int]:
    try:
        found = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return found + [grandchild for child in found for grandchild in _children(child)]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _io(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except OSError:
        return 0


def measure(store: Store, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    loader = make_loader(store, store.cases, args.patch, args.batch, num_workers=workers)
    with Usage() as usage:
        iterator = iter(loader)
        try:
            begun = time.perf_counter()
            next(iterator)
            first = time.perf_counter() - begun
            # What the workers prepared ahead while the first batch was made is not what they can sustain.
            for _ in range(args.warm_up):
                next(iterator)
            before, begun = usage.total_read, time.perf_counter()
            for _ in range(args.batches):
                next(iterator)
            seconds = time.perf_counter() - begun
            read = usage.total_read - before
            waited = 0.0
            for _ in range(args.batches if args.step_ms else 0):
                time.sleep(args.step_ms / 1e3)
                begun = time.perf_counter()
                next(iterator)
                waited += time.perf_counter() - begun
        finally:
            iterator.close()
    patches = args.batches * args.batch
    return {
        "workers": workers,
        "patches_per_s": patches / seconds,
        "mb_per_s_from_disk": read / seconds / 1e6,
        "mb_per_patch": read / patches / 1e6,
        "first_batch_s": first,
        "waits": waited / (waited + args.batches * args.step_ms / 1e3) if args.step_ms else None,
        "peak_gib": usage.peak / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="an existing store, or preprocessed folder, instead of making one")
    parser.add_argument("--folder", type=Path, help="where to make it (default: a temporary folder)")
    parser.add_argument("--volumes", type=int, default=8)
    parser.add_argument("--shape", nargs=3, type=int, default=[384, 384, 160])
    parser.add_argument("--patch", nargs=3, type=int, default=[128, 128, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--batches", type=int, default=40, help="measured, after --warm_up")
    parser.add_argument("--warm_up", type=int, default=10)
    parser.add_argument("--step_ms", type=float, default=0.0, help="time of a training step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.store is None:
            begun = time.perf_counter()
            # In another process: what making it leaves behind is not the loader's memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                other.submit(make_store, root, args.volumes, tuple(args.shape)).result()
            store = Store(root)
            size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            made = f"made in {time.perf_counter() - begun:.0f} s, {size / 1e9:.2f} GB on disk"
        else:
            store, made = Store(args.store), str(args.store)
        cores = len(os.sched_getaffinity(0))
        print(f"{len(store.cases)} volumes ({made}); {cores} cores, Grain {grain.__version__}")
        print(f"batches of {args.batch} x {args.patch}; waits at {args.step_ms:g} ms a step")
        print("workers  patches/s  MB/s from disk  MB/patch  first batch s  waits  peak GiB")
        rows = []
        for workers in args.workers:
            row = measure(store, args, workers)
            rows.append(row)
            waits = "-" if row["waits"] is None else f"{row['waits']:.1%}"
            print(
                f"{workers:7d} {row['patches_per_s']:10.1f} {row['mb_per_s_from_disk']:15.1f} "
                f"{row['mb_per_patch']:9.2f} {row['first_batch_s']:14.1f} {waits:>6s} {row['peak_gib']:9.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if args.json:
        about = {"python": platform.python_version(), "cores": cores, "store": made, "grain": grain.__version__}
        about |= {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
