"""Time inference of the published network on a batch of windows: forward pass with the logits left on the device.

python benchmarks/infer_window.py --precision bf16 --json infer_window.json
"""

import argparse
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from figures import planned_gib, write_rows
from flax import nnx
from flops import matrix_flops, peak_tflops
from profiling import print_kernel_times

from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.inference.ensemble import compiled_network
from mambahome_jax.model.networks import make_network

MULTIPLE = 16  # of the published network's windows

# (windows, size, published ms by precision): patched published code on one H200.
CASES = (
    (4, (192, 192, 48), {"fp32": 427, "tf32": 210, "bf16": 182}),
    (1, (128, 128, 128), {"fp32": 228, "tf32": 163, "bf16": 161}),
)


def measure(args: argparse.Namespace, precision: str, windows: int, size: tuple[int, ...]) -> dict[str, Any]:
    config = replace(MODEL_SIZES[args.model].model, in_chans=1, out_chans=args.classes)
    graphdef, params = nnx.split(make_network(config, rngs=nnx.Rngs(0), precision=precision))
    shape = tuple(max(n // args.shrink // MULTIPLE, min(2, n // MULTIPLE)) * MULTIPLE for n in size)
    x = jax.device_put(np.random.default_rng(0).standard_normal((windows, *shape, 1), dtype=np.float32))
    start = time.perf_counter()
    traced = compiled_network().trace(graphdef, params, x)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    samples = []
    for k in range(args.runs + 3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, x))
        if k >= 3:
            samples.append((time.perf_counter() - start) * 1e3)
    samples.sort()
    if args.profile:
        print_kernel_times(lambda: compiled(params, x))
    ms = statistics.median(samples)
    tflops = matrix_flops(traced.jaxpr) / ms / 1e9
    return {
        "precision": precision,
        "windows": windows,
        "size": shape,
        "windows_per_s": windows / ms * 1e3,
        "ms": ms,
        "tflops": tflops,
        "of_peak": tflops / peak_tflops(precision),
        "fastest": samples[0],
        "slowest": samples[-1],
        "planned_gib": planned_gib(compiled),
        "compile_s": compile_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "tf32", "fp32"], choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--model", default="MambaHoME", choices=list(MODEL_SIZES))
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide the windows (to multiples of 16, at least 32), for a try on a CPU"
    )
    parser.add_argument("--profile", action="store_true", help="list the kernels that take the time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, Python {platform.python_version()}, {args.model}")
    print(
        "precision  windows                  ms (range)  windows/s  published  planned GiB  compile s  TFLOP/s  of peak"
    )
    rows = []
    for precision in args.precision:
        for windows, size, published in CASES:
            row = measure(args, precision, windows, size)
            rows.append(row | {"published_ms": published[precision]})
            spread = f"({row['fastest']:.1f}-{row['slowest']:.1f})"
            print(
                f"{precision:9s} {windows} x {row['size']!s:16s} {row['ms']:9.1f} {spread} {row['windows_per_s']:10.1f}"
                f" {published[precision]:7d} ms {row['planned_gib']:9.1f} {row['compile_s']:9.1f}"
                f" {row['tflops']:8.0f} {row['of_peak']:8.0%}",
                flush=True,
            )
    write_rows(args.json, args, rows)


if __name__ == "__main__":
    main()
