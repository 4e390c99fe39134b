"""Why the xla backend is written as it is: three ways to write the scan in plain XLA, timed with their scratch memory.

python benchmarks/scan_variants.py --stages 0 1 2 3 --json scan_variants.json

(1) `associative_scan` over the whole length, which the backend takes for short sequences on a GPU; (2) `lax.scan` over
chunks with `associative_scan` within, each chunk recomputed in the backward pass; (3) the backend for all others: its
chunks side by side with a loop over the steps within, `associative_scan` over the chunks, a backward pass of its own.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from mambahome_kernels.selective_scan import xla
from mambahome_kernels.selective_scan.api import ScanInputs
from mambahome_kernels.selective_scan.reference import discretise, gate
from selective_scan import STAGES, forward, make_inputs, measure


def _terms(inputs: ScanInputs, delta, x, B):
    return jnp.exp(delta[..., None] * inputs.A), (delta * x)[..., None] * B[:, :, None]


def _finish(inputs: ScanInputs, states, x, z, C):
    return (jnp.einsum("blds,bls->bld", states, C) + inputs.D * x) * gate(z)[0]


def whole(inputs: ScanInputs) -> jax.Array:
    return xla.short_forward(inputs, True)[0]


def within_chunks(inputs: ScanInputs, steps: int) -> jax.Array:
    batch, length, d_inner = inputs.x.shape
    steps = min(steps, length)

    def cut(a):
        return a.reshape(batch, length // steps, steps, a.shape[-1]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk(h, cuts):
        x, dt, B, C, z = cuts
        delta = discretise(dt, inputs.dt_bias, True)[0]
        decay, states = lax.associative_scan(xla.combine, _terms(inputs, delta, x, B), axis=1)
        states = states + decay * h[:, None]
        return states[:, -1], _finish(inputs, states, x, z, C)

    first = jnp.zeros((batch, d_inner, inputs.A.shape[1]), jnp.float32)
    _, y = lax.scan(chunk, first, tuple(cut(a) for a in (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)))
    return y.swapaxes(0, 1).reshape(batch, length, d_inner)


VARIANTS = {
    "associative_scan, whole length": whole,
    "scan of chunks of 256": functools.partial(within_chunks, steps=256),
    "scan of chunks of 2048": functools.partial(within_chunks, steps=2048),
    "chunks side by side (xla)": functools.partial(forward, backend="xla"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divide the lengths, for a try on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    xla.is_short = lambda inputs: False
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, batch {args.batch}, float32; median ms and scratch")
    rows = []
    for stage in args.stages:
        d_inner, length = STAGES[stage][0], STAGES[stage][1] // args.shrink
        inputs, dy = make_inputs(args.batch, d_inner, length, "float32")
        for name, variant in VARIANTS.items():

            def both(inputs, dy, variant=variant):
                y, vjp = jax.vjp(variant, inputs)
                return y, vjp(dy)[0]

            row = {"stage": stage, "d_inner": d_inner, "length": length, "variant": name}
            for what, call, arguments in (("forward", variant, (inputs,)), ("both", both, (inputs, dy))):
                program = jax.jit(call).lower(*arguments).compile()
                row[f"{what}_scratch_mib"] = program.memory_analysis().temp_size_in_bytes / 2**20
                try:
                    row[f"{what}_ms"] = measure(program, arguments, 1, args.runs)["ms"]
                except jax.errors.JaxRuntimeError as error:  # not enough memory
                    row[f"{what}_ms"] = float("nan")
                    print(f"{stage} {name}: {str(error).splitlines()[0]}")
            rows.append(row)
            print(
                f"{stage} ({d_inner}, {length}) {name:32s} forward {row['forward_ms']:9.2f} ms"
                f" {row['forward_scratch_mib']:8.0f} MiB   and backward {row['both_ms']:9.2f} ms"
                f" {row['both_scratch_mib']:8.0f} MiB",
                flush=True,
            )
    if args.json:
        about = {"device": device, "jax": jax.__version__, "batch": args.batch}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
