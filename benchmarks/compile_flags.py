"""Time what the first training step waits for, with XLA's flags one at a time, each in a fresh process without caches.

python benchmarks/compile_flags.py --model MambaHoME_small --batch 4 --patch 112 112 80 --json compile_flags.json
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.recipes import RECIPES

# Each pair: a name and flags; {0} is a folder that lasts as long as this program.
VARIANTS = {
    "default": "",
    "autotune 0": "--xla_gpu_autotune_level=0",
    "autotune 1": "--xla_gpu_autotune_level=1",
    "autotune 4": "--xla_gpu_autotune_level=4",
    "solutions 4": "--xla_gpu_autotune_max_solutions=4",
    "solutions 1": "--xla_gpu_autotune_max_solutions=1",
    "blas 4": "--xla_gpu_blas_max_algorithms=4",
    "blas 1": "--xla_gpu_blas_max_algorithms=1",
    "parallel": "--xla_gpu_force_compilation_parallelism={cores}",
    "no fusion autotuner": "--xla_gpu_experimental_enable_fusion_autotuner=false",
    "libnvptxcompiler": "--xla_gpu_enable_libnvptxcompiler=true",
    "no latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=false",
    "no redzones": "--xla_gpu_redzone_padding_bytes=0",
    "tuned first": "--xla_gpu_per_fusion_autotune_cache_dir={0}/tuned",
    "tuned again": "--xla_gpu_per_fusion_autotune_cache_dir={0}/tuned",
    "kept first": "--xla_gpu_kernel_cache_file={0}/kernels --xla_gpu_per_fusion_autotune_cache_dir={0}/kept",
    "kept again": "--xla_gpu_kernel_cache_file={0}/kernels --xla_gpu_per_fusion_autotune_cache_dir={0}/kept",
}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every stage, and the step's milliseconds, in this process."""
    started = time.perf_counter()
    from dataclasses import replace

    import jax
    from train_step import RATE, make_step, random_batch

    seconds, last = {}, [time.perf_counter()]
    seconds["import"] = last[0] - started

    def mark(name: str) -> None:
        now = time.perf_counter()
        seconds[name], last[0] = now - last[0], now

    config = replace(MODEL_SIZES[args.model].model, in_chans=1, out_chans=args.classes)
    step, state, mesh = make_step(config, RECIPES["published"], args.precision, 1, "ddp")
    batch = random_batch(mesh, args.batch, tuple(args.patch), 1, args.classes)
    jax.block_until_ready((state, batch))
    mark("init")
    traced = step.trace(state, batch, RATE)
    mark("trace")
    lowered = traced.lower()
    mark("lower")
    with tempfile.TemporaryDirectory() as folder:
        if args.profile:
            jax.profiler.start_trace(folder)
        compiled = lowered.compile()
        if args.profile:
            jax.profiler.stop_trace()
            print_host_times(Path(folder))
    mark("compile")
    samples = []
    for _ in range(args.runs + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, RATE)
        jax.block_until_ready(metrics)
        samples.append((time.perf_counter() - start) * 1e3)
    return seconds | {"first_step": samples[0] / 1e3, "ms": statistics.median(samples[2:])}


def print_host_times(folder: Path, most: int = 25) -> None:
    """Seconds by the name of XLA's own annotations: over all threads, nested ones counted in each; then of the thread
    that compiles, without what is nested in them."""
    import jax

    (path,) = folder.rglob("*.xplane.pb")
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    main_thread: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "CPU" not in plane.name:
            continue
        for line in plane.lines:
            events = [(event.name.split("#")[0][:70], event.start_ns, event.duration_ns) for event in line.events]
            for name, _, ns in events:
                times[name] += ns
                counts[name] += 1
            if any(name.startswith("backend_compile") for name, _, _ in events):
                main_thread = own_times(events)
    for name, ns in times.most_common(most):
        print(f"{ns / 1e9:9.2f} s {counts[name]:7d} x  {name}", flush=True)
    print("the thread that compiles:")
    for name, ns in main_thread.most_common(most):
        print(f"{ns / 1e9:9.2f} s            {name}", flush=True)


def own_times(events: list[tuple[str, float, float]]) -> collections.Counter[str]:
    """Nanoseconds by name without those of nested events, of one thread's (name, start, duration)."""
    times: collections.Counter[str] = collections.Counter()
    open_events: list[tuple[str, float]] = []
    for name, start, duration in sorted(events, key=lambda e: (e[1], -e[2])):
        while open_events and open_events[-1][1] <= start:
            open_events.pop()
        if open_events:
            times[open_events[-1][0]] -= duration
        times[name] += duration
        open_events.append((name, start + duration))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MambaHoME", choices=list(MODEL_SIZES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--patch", nargs=3, type=int, default=[128, 128, 128])
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--profile", action="store_true", help="list XLA's own annotations while it compiles")
    parser.add_argument("--max_seconds", type=float, default=540, help="start no variant after these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(child(args)))
        return
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.variants:
            if time.perf_counter() - started > args.max_seconds:
                print(f"{name}: not run, {args.max_seconds:.0f} s are over", flush=True)
                continue
            rows.append({"variant": name} | run(name, folder))
            print(" ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"arguments": sys.argv[1:], "rows": rows}, indent=1))


def run(name: str, folder: str) -> dict[str, Any]:
    """One variant in a process of its own."""
    flags = VARIANTS[name].format(folder, cores=os.cpu_count())
    for flag in flags.split():
        if "cache_dir" in flag:
            Path(flag.split("=")[1]).mkdir(exist_ok=True)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child"], env=environment, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300], "wall": wall}
    *listed, last = done.stdout.strip().splitlines()
    print("\n".join(listed), flush=True)
    return json.loads(last) | {"wall": wall}


if __name__ == "__main__":
    main()
