"""Weak scaling of the training step over a host's GPUs: images/s, efficiency, memory, share of collectives, losses.

python benchmarks/scaling.py --json scaling.json                      # 1, 2, 4, 8 devices, as many as there are
python benchmarks/scaling.py --strategies ddp --store READY           # the real loader beside synthetic batches
srun --ntasks-per-node=8 python benchmarks/scaling.py --devices 8  # one process per GPU; see docs/how-to/clusters.md

Where one device is not among --devices there is nothing to compare with, and the efficiency is nan. "real loader": of
all steps together, beside medians of synthetic batches.

Each device has --batch patches, whatever their number, and every strategy is compared with one device of the same run.
"equal losses": largest relative difference, over --equal_steps steps, to one device with the same global batch, on
patches of --equal_patch so that one device can hold it. On one device the strategies do the same: it is measured once.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from figures import planned_gib, write_rows
from profiling import kernel_times
from train_step import RATE, make_step

from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.patches.loader import make_loader
from mambahome_jax.patches.store import Store
from mambahome_jax.training.distributed import is_first, join_processes, put_batch

COLLECTIVES = ("nccl", "all-reduce", "all-gather", "reduce-scatter", "allreduce", "allgather", "reducescatter")


def synthetic(args: argparse.Namespace, patch: list[int], share: int) -> Iterator[dict[str, np.ndarray]]:
    """The same batch for ever: this process' `share` patches of it."""
    rng = np.random.default_rng(jax.process_index())
    image = rng.standard_normal((share, *patch, 1), dtype=np.float32)
    batch = {"image": image, "label": rng.integers(0, args.classes, (share, *patch)).astype(np.int32)}
    while True:
        yield batch


def drawn(args: argparse.Namespace, patch: list[int], total: int) -> Iterator[dict[str, np.ndarray]]:
    """Another batch of `total` patches each step, the same whatever the number of devices."""
    for step in range(args.equal_steps):
        rng = np.random.default_rng(step)
        label = rng.integers(0, args.classes, (total, *(n // 16 for n in patch)))
        for axis in (1, 2, 3):
            label = np.repeat(label, 16, axis)
        noise = rng.normal(0, 0.3, label.shape)
        batch = {"image": (label / args.classes + noise)[..., None].astype(np.float32), "label": label.astype(np.int32)}
        part = total // jax.process_count()
        first = jax.process_index() * part
        yield {name: array[first : first + part] for name, array in batch.items()}


class Step:
    """The step on so many devices, compiled for a patch."""

    def __init__(self, args: argparse.Namespace, devices: list[jax.Device], strategy, batch: dict[str, np.ndarray]):
        config = replace(
            MODEL_SIZES[args.model].model, in_chans=1, out_chans=args.classes, use_checkpoint=args.use_checkpoint
        )
        self.make = functools.partial(make_step, config, args.precision, len(devices), strategy)
        step, self.state, self.mesh = self.make()
        begun = time.perf_counter()
        self.compiled = step.lower(self.state, put_batch(batch, self.mesh), RATE).compile()
        self.compile_s = time.perf_counter() - begun

    def begin_again(self) -> None:
        """The state from before the first step."""
        self.state = None
        self.state = self.make()[1]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        self.state, metrics = self.compiled(self.state, put_batch(batch, self.mesh), RATE)
        return metrics


def seconds_a_step(step: Step, batches: Iterator[dict[str, np.ndarray]], args: argparse.Namespace) -> list[float]:
    """Sorted: of single steps, each begun when the one before it is half done, as in training."""
    running = step(next(batches))
    for _ in range(args.warm_up):
        jax.block_until_ready(running)
        running = step(next(batches))
    samples, before = [], time.perf_counter()
    for _ in range(args.runs):
        following = step(next(batches))
        jax.block_until_ready(running)
        running, now = following, time.perf_counter()
        samples.append(now - before)
        before = now
    jax.block_until_ready(running)
    return sorted(samples)


def share_of_collectives(step: Step, batch: dict[str, np.ndarray]) -> float:
    """Of the time that kernels take on the first GPU; those that run beside others are counted too."""
    times = kernel_times(lambda: step(batch))
    total = sum(ms for ms, _, _ in times)
    return sum(ms for ms, _, name in times if any(c in name.lower() for c in COLLECTIVES)) / total if total else 0.0


def measure(args: argparse.Namespace, devices: list[jax.Device], strategy: str) -> tuple[dict[str, Any], Step]:
    local = sum(device.process_index == jax.process_index() for device in devices)
    total, batches = args.batch * len(devices), synthetic(args, args.patch, args.batch * local)
    step = Step(args, devices, strategy, next(batches))
    samples = seconds_a_step(step, batches, args)
    row = {
        "strategy": strategy,
        "devices": len(devices),
        "ms": statistics.median(samples) * 1e3,
        "fastest_ms": samples[0] * 1e3,
        "slowest_ms": samples[-1] * 1e3,
        "images_per_s": total / statistics.median(samples),
        "planned_gib": planned_gib(step.compiled),
        "compile_s": step.compile_s,
        "collectives": share_of_collectives(step, next(batches)) if devices[0].platform == "gpu" else float("nan"),
    }
    if args.store is not None:
        store = Store(args.store)
        share = (jax.process_index(), jax.process_count())
        iterator = iter(make_loader(store, store.cases, args.patch, total, num_workers=args.workers, share=share))
        try:
            real = ({name: batch[name] for name in ("image", "label")} for batch in iterator)
            # Of all steps together: the median would not see one in ten that waits.
            row["images_per_s_real"] = total / statistics.mean(seconds_a_step(step, real, args))
        finally:
            iterator.close()
    return row, step


def losses(args: argparse.Namespace, total: int, step: Step) -> np.ndarray:
    step.begin_again()
    return np.array([float(step(batch)["loss"]) for batch in drawn(args, args.equal_patch, total)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, help="numbers of devices (default: powers of two)")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--model", default="MambaHoME", choices=list(MODEL_SIZES))
    parser.add_argument("--batch", type=int, default=2, help="patches on each device")
    parser.add_argument("--patch", nargs=3, type=int, default=[128, 128, 128])
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--use_checkpoint", action="store_true")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=4)
    parser.add_argument("--store", type=Path, help="a preprocessed folder: its patches too")
    parser.add_argument("--workers", type=int, default=8, help="of the real loader, in each process")
    parser.add_argument("--equal_patch", nargs=3, type=int, default=[64, 64, 64])
    parser.add_argument("--equal_steps", type=int, default=20, help="0: losses are not compared")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    join_processes()
    found = jax.devices()
    numbers = sorted(args.devices or [n for n in (1, 2, 4, 8) if n <= len(found)])
    say = print if is_first() else lambda *_, **__: None
    kind = found[0].device_kind
    say(f"{len(found)} x {kind}, JAX {jax.__version__}, {args.batch} x {args.patch} each, {args.precision}")
    say("strategy devices       ms (range)   images/s  efficiency  GiB each  collectives  compile s  equal losses")
    rows: list[dict[str, Any]] = []
    alone: dict[int, np.ndarray] = {}
    for strategy in args.strategies:
        for number in numbers:
            if number == 1 and rows:
                continue
            row, step = measure(args, found[:number], strategy)
            single = next((r["images_per_s"] for r in [*rows, row] if r["devices"] == 1), math.nan)
            row["efficiency"] = row["images_per_s"] / number / single
            if args.equal_steps and number > 1 and jax.process_count() == 1:
                total = args.batch * number
                first = next(drawn(args, args.equal_patch, total))
                if args.equal_patch != args.patch:
                    step = Step(args, found[:number], strategy, first)
                several = losses(args, total, step)
                if total not in alone:
                    alone[total] = losses(args, total, Step(args, found[:1], "ddp", first))
                row["equal_losses"] = float(np.max(np.abs(several - alone[total]) / np.abs(alone[total])))
            del step
            rows.append(row)
            say(
                f"{strategy:8s} {number:7d} {row['ms']:8.1f} ({row['fastest_ms']:.1f}-{row['slowest_ms']:.1f})"
                f" {row['images_per_s']:8.2f} {row['efficiency']:11.1%} {row['planned_gib']:9.1f}"
                f" {row['collectives']:12.1%} {row['compile_s']:10.1f} {row.get('equal_losses', float('nan')):13.1e}"
                + (f"   real loader {row['images_per_s_real']:.2f} images/s" if "images_per_s_real" in row else ""),
                flush=True,
            )
            if is_first():
                write_rows(args.json, args, rows)


if __name__ == "__main__":
    main()
