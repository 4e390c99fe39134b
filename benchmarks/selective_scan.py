"""Time the selective scan's backends over the published network's four stages, and mamba_ssm where installed.

python benchmarks/selective_scan.py --backends mosaic_gpu xla --dtypes float32 bfloat16 --json scan.json
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mambahome_kernels import Unsupported, choose_backend, selective_scan
from mambahome_kernels.selective_scan.api import ScanInputs
from mambahome_kernels.shapes import SCAN_STAGES

STAGES = tuple(SCAN_STAGES.values())  # d_inner, length
D_STATE = 16
# mamba_ssm's CUDA kernel on one H200, torch 2.11, batch 2: forward, forward + backward, in ms.
PUBLISHED = {
    "float32": ((3.10, 9.98), (0.577, 1.705), (0.195, 0.683), (0.109, 0.565)),
    "bfloat16": ((2.70, 8.89), (0.442, 1.540), (0.145, 0.631), (0.114, 0.528)),
}


def make_inputs(batch: int, d_inner: int, length: int, dtype: str) -> tuple[ScanInputs, jax.Array]:
    """As a Mamba layer makes them, steps between 1e-3 and 1e-1 and rates -1 to -16; and a gradient of y."""
    rng = np.random.default_rng(0)
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), d_inner))

    def per_step(features):
        return jnp.asarray(rng.standard_normal((batch, length, features), dtype=np.float32), dtype)

    inputs = ScanInputs(
        x=per_step(d_inner),
        dt=per_step(d_inner),
        A=-jnp.tile(jnp.arange(1.0, D_STATE + 1), (d_inner, 1)),
        B=per_step(D_STATE),
        C=per_step(D_STATE),
        D=jnp.asarray(rng.standard_normal(d_inner), jnp.float32),
        z=per_step(d_inner),
        dt_bias=jnp.asarray(np.log(np.expm1(step)), jnp.float32),
    )
    return inputs, per_step(d_inner)


def forward(inputs: ScanInputs, backend: str):
    arrays = {k: v for k, v in inputs._asdict().items() if v is not None}
    return selective_scan(**arrays, softplus=True, backend=backend)[0]


def forward_backward(inputs: ScanInputs, dy: jax.Array, backend: str):
    y, vjp = jax.vjp(lambda i: forward(i, backend), inputs)
    return y, vjp(dy)[0]


def _first_elements(tree) -> jax.Array:
    """A number that needs every result, so that the compiler leaves none out."""
    return functools.reduce(jnp.add, [a.ravel()[0].astype(jnp.float32) for a in jax.tree.leaves(tree)])


def repeated(call: Callable, times: int) -> Callable:
    """`times` calls, each of which waits for the one before, as one compiled program: no launch from Python between."""

    def run(inputs: ScanInputs, *rest):
        def body(_, x):
            results = call(inputs._replace(x=x), *rest)
            return x.at[0, 0, 0].set((_first_elements(results) * 1e-9).astype(x.dtype))

        return jax.lax.fori_loop(0, times, body, inputs.x)

    return jax.jit(run)


def programs(stage: int, dtype: str, backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that one row of the table runs, compiled."""
    d_inner, length = STAGES[stage]
    inputs, dy = make_inputs(args.batch, d_inner, length // args.shrink, dtype)
    # Some 0.1 s a program where a call moves its inputs a few times.
    times = max(1, min(100, int(args.calls * 2e10 / nbytes(inputs)))) if jax.default_backend() == "gpu" else 1
    fwd = functools.partial(forward, backend=backend)
    both = functools.partial(forward_backward, backend=backend)
    return {
        "times": times,
        "fwd": repeated(fwd, times).lower(inputs).compile(),
        "both": repeated(both, times).lower(inputs, dy).compile(),
        # Memory beyond arguments and results, residuals included, as the compiler planned it.
        "scratch": jax.jit(both).lower(inputs, dy).compile().memory_analysis(),
    }


def measure(program, args: tuple, times: int, runs: int) -> dict[str, float]:
    """Median and spread in ms of one call, over `runs` runs of a program of `times` calls."""
    for _ in range(2):
        jax.block_until_ready(program(*args))
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        samples.append((time.perf_counter() - start) / times * 1e3)
    samples.sort()
    return {"ms": statistics.median(samples), "fastest": samples[0], "slowest": samples[-1]}


def nbytes(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy far larger than any cache (on a CPU: 256 MiB)."""
    mib = 4096 if jax.default_backend() == "gpu" else 256
    a = jnp.zeros((mib * 2**18,), jnp.float32)
    copy = jax.jit(lambda v: v + 1)
    jax.block_until_ready(copy(a))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(copy(a))
        samples.append(time.perf_counter() - start)
    return 2 * nbytes(a) / statistics.median(samples)


def measure_mamba_ssm(inputs: ScanInputs, runs: int) -> dict[str, float]:
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def to_torch(name, a):
        t = torch.tensor(np.asarray(a, np.float32), device="cuda")
        if a.dtype == jnp.bfloat16:
            t = t.to(torch.bfloat16)
        if t.ndim == 3:
            t = t.transpose(1, 2).contiguous()
        return t.requires_grad_()

    t = {k: to_torch(k, v) for k, v in inputs._asdict().items() if v is not None}

    def call():
        return selective_scan_fn(
            t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], delta_softplus=True
        )

    def timed(f):
        samples = []
        for k in range(runs + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            f()
            end.record()
            torch.cuda.synchronize()
            if k >= 3:
                samples.append(begin.elapsed_time(end))
        return statistics.median(samples)

    dy = torch.randn_like(t["x"])
    with torch.no_grad():
        ms = timed(call)
    leaves = list(t.values())
    return {"forward": ms, "both": timed(lambda: torch.autograd.grad(call(), leaves, dy))}


def measure_stage(stage: int, dtype: str, backend: str, args: argparse.Namespace, bandwidth: float, compiled):
    d_inner, length = STAGES[stage][0], STAGES[stage][1] // args.shrink
    inputs, dy = make_inputs(args.batch, d_inner, length, dtype)
    row: dict[str, Any] = {"stage": stage, "d_inner": d_inner, "length": length, "dtype": dtype, "backend": backend}
    if backend == "mamba_ssm":
        timed = measure_mamba_ssm(inputs, args.runs)
        return row | {"forward_ms": timed["forward"], "both_ms": timed["both"]}
    a = measure(compiled["fwd"], (inputs,), compiled["times"], args.runs)
    b = measure(compiled["both"], (inputs, dy), compiled["times"], args.runs)
    least = nbytes(inputs) + nbytes(inputs.x)  # every input read, y written
    row |= {"forward_ms": a["ms"], "both_ms": b["ms"], "forward": a, "both": b, "times": compiled["times"]}
    row["bandwidth_share"] = least / (a["ms"] * 1e-3) / bandwidth
    scratch = compiled["scratch"].temp_size_in_bytes if compiled["scratch"] else float("nan")
    row["scratch_mib"] = scratch / 2**20
    row["scratch_of_inputs"] = scratch / nbytes(inputs)
    return row


def print_row(row: dict[str, Any]) -> None:
    published = PUBLISHED[row["dtype"]][row["stage"]]
    text = f"{row['stage']} ({row['d_inner']}, {row['length']}) {row['dtype']:9s} {row['backend']:11s}"
    text += f"{row['forward_ms']:9.3f} {row['both_ms']:9.3f}   {published[0]:6.3f} {published[1]:6.3f}"
    if "scratch_mib" in row:
        text += f" {row['bandwidth_share']:8.0%} {row['scratch_mib']:8.0f} MiB {row['scratch_of_inputs']:5.2f} x inputs"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["mosaic_gpu", "xla"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(PUBLISHED))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=11, help="programs timed for each figure")
    parser.add_argument("--calls", type=float, default=1.0, help="multiplies the calls in each program")
    parser.add_argument("--shrink", type=int, default=1, help="divide the lengths, for a try on a CPU")
    parser.add_argument("--compile_threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    backends = list(args.backends)
    theirs = all(importlib.util.find_spec(name) for name in ("torch", "mamba_ssm"))
    if theirs and "mamba_ssm" not in backends:
        backends.append("mamba_ssm")
    if "mamba_ssm" in backends and not theirs:
        parser.error("--backends mamba_ssm needs torch and mamba_ssm, which are not both installed")
    device = jax.devices()[0]
    bandwidth = copy_bandwidth()
    print(f"{device.device_kind}, JAX {jax.__version__}, Python {platform.python_version()}, batch {args.batch}")
    print(f"copy {bandwidth / 1e12:.2f} TB/s (read + written); ms are medians; mamba_ssm's figures are of an H200")
    print("stage (d_inner, length) dtype  backend        fwd  fwd+bwd   mamba_ssm fwd, both  of copy  scratch")
    cases = []
    for dtype, stage, backend in itertools.product(args.dtypes, args.stages, backends):
        try:
            if backend != "mamba_ssm":
                choose_backend(make_inputs(1, 8, 8, dtype)[0], backend)
            cases.append((stage, dtype, backend))
        except Unsupported as reason:
            print(f"{stage} {dtype} {backend}: {reason}")
    rows = []
    about = {"device": device.device_kind, "jax": jax.__version__, "copy_bytes_per_s": bandwidth}
    # Compiling takes far longer than measuring, and the compiler leaves most of the host's cores idle.
    with concurrent.futures.ThreadPoolExecutor(args.compile_threads) as pool:
        compiled = [None if case[2] == "mamba_ssm" else pool.submit(programs, *case, args) for case in cases]
        concurrent.futures.wait([c for c in compiled if c])
    for case, made in zip(cases, compiled, strict=True):
        rows.append(measure_stage(*case, args, bandwidth, made.result() if made else None))
        print_row(rows[-1])
        if args.json:
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
