"""Time the convolution of few channels, forward and both gradients, by this package's kernels and by cuDNN through XLA.

python benchmarks/conv3d.py --json conv3d.json
python benchmarks/conv3d.py --shapes "thick slices" "thick slices, second stage"
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from figures import write_rows
from mambahome_kernels import conv3d
from mambahome_kernels.conv3d.api import why_not
from mambahome_kernels.shapes import CONV3D, CONV3D_CHANNELS

from mambahome_jax.support.devices import compiler_options

PASSES: dict[str, Callable] = {
    "forward": lambda f, x, kernel, dy: f(x, kernel),
    "input gradient": lambda f, x, kernel, dy: jax.vjp(lambda x: f(x, kernel), x)[1](dy)[0],
    "weight gradient": lambda f, x, kernel, dy: jax.vjp(lambda kernel: f(x, kernel), kernel)[1](dy)[0],
}


def by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As the model has it, with the gradients that XLA makes of it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def arrays(shape: tuple[int, ...], outputs: int, size: tuple[int, ...]) -> tuple[jax.Array, ...]:
    *grid, inputs = shape
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[1], (*size, inputs, outputs)) / (math.prod(size) * inputs) ** 0.5
    x, dy = (jax.random.normal(k, (*grid, n), jnp.bfloat16) for k, n in zip(keys[::2], (inputs, outputs), strict=True))
    return x, kernel.astype(jnp.bfloat16), dy


def median_ms(function: Callable, arguments: tuple[jax.Array, ...], runs: int, calls: int) -> float:
    samples = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(samples[1:])


def difference(got: jax.Array, expected: jax.Array) -> float:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def measure(args: argparse.Namespace, shape: tuple[int, ...], outputs: int, size: tuple[int, ...]) -> list[dict]:
    inputs = shape[-1]
    x, kernel, dy = arrays(shape, outputs, size)
    flops = 2 * math.prod(size) * outputs * x.size
    reason = why_not(x, kernel)
    print(f"x {shape}, kernel {size}" + f": {reason}" * bool(reason))
    rows: list[dict[str, Any]] = []
    for name, apply in PASSES.items():
        results = {}
        for backend, f in ({"xla": by_xla} | ({} if reason else {"mosaic_gpu": conv3d})).items():
            jitted = jax.jit(lambda *a, f=f, apply=apply: apply(f, *a), compiler_options=compiler_options())
            results[backend] = jax.block_until_ready(jitted(x, kernel, dy))
            ms = median_ms(jitted, (x, kernel, dy), args.runs, args.calls)
            row = {"x": shape, "kernel": size, "inputs": inputs, "outputs": outputs, "pass": name}
            row |= {"backend": backend, "ms": ms}
            row |= {"tflops": flops / ms / 1e9, "to_xla": difference(results[backend], results["xla"])}
            print(
                "{inputs:3d} -> {outputs:3d} {pass:16s} {backend:10s} {ms:8.3f} {tflops:8.0f} {to_xla:10.1e}".format(
                    **row
                )
            )
            rows.append(row)
    return rows


def main() -> None:
    published = CONV3D["published"][0]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--channels", nargs="+", default=[f"{i}x{o}" for i, o in CONV3D_CHANNELS], help="inputs x outputs"
    )
    parser.add_argument("--batch", type=int, default=published[0])
    parser.add_argument("--grid", nargs=3, type=int, default=published[1:4])
    parser.add_argument("--shapes", nargs="+", choices=list(CONV3D), default=[], help="in place of channels and grid")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20, help="in each run, one after another")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, Python {platform.python_version()}; bfloat16, medians")
    print("channels, pass, backend, ms, TFLOP/s, relative difference to xla", flush=True)
    pairs = [tuple(map(int, pair.split("x"))) for pair in args.channels]
    shapes = [CONV3D[name] for name in args.shapes]
    shapes = shapes or [((args.batch, *args.grid, inputs), outputs, (3, 3, 3)) for inputs, outputs in pairs]
    rows = [row for shape in shapes for row in measure(args, *shape)]
    write_rows(args.json, args, rows)


if __name__ == "__main__":
    main()
