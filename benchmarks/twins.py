"""Count what each twin of MambaHoME has and does: parameters, and multiplications and additions of a forward pass.

python benchmarks/twins.py --json twins.json

Prints the table of docs/explanation/mamba-and-home.md. Operations are those of convolutions and matrix products (see
flops.py); of what is left out, the selective scan takes about 9 a state, channel and token. No device is used.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from figures import write_rows
from flax import nnx
from flops import matrix_flops

from mambahome_jax.config import MODEL_SIZES, ExpertLayer, Mixer, ModelConfig
from mambahome_jax.model.networks import make_network

SIZES = [name for name, size in MODEL_SIZES.items() if isinstance(size.model, ModelConfig)]


def twins() -> Iterator[dict[str, str]]:
    """The published network first, then one part changed, then both."""
    pairs = itertools.product(get_args(Mixer), get_args(ExpertLayer))
    return ({"mixer": mixer, "experts": experts} for mixer, experts in sorted(pairs, key=_changed))


def _changed(pair: tuple[str, str]) -> int:
    return (pair[0] != ModelConfig.mixer) + (pair[1] != ModelConfig.experts)


def count(size: str, twin: dict[str, str], patch: tuple[int, ...]) -> dict[str, Any]:
    """Parameters of a twin, and operations for one patch of one channel."""
    model = nnx.eval_shape(lambda: make_network(MODEL_SIZES[size].model.replace(**twin), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, *patch, 1), jnp.float32)
    traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, x)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    return {"size": size} | twin | {"parameters": parameters, "flops": matrix_flops(traced.jaxpr)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", nargs=3, type=int, default=[96, 96, 96])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [count(size, twin, tuple(args.patch)) for size in SIZES for twin in twins()]
    print("| mixer | experts | " + " | ".join(f"{size}, 10^6 | GFLOP" for size in SIZES) + " |")
    print("|---|---|" + "---|---|" * len(SIZES))
    for twin in twins():
        own = [row for row in rows if twin.items() <= row.items()]
        cells = [f"{row['parameters'] / 1e6:.3f} | {row['flops'] / 1e9:.1f}" for row in own]
        print(f"| {twin['mixer']} | {twin['experts']} | {' | '.join(cells)} |")
    write_rows(args.json, args, rows)


if __name__ == "__main__":
    main()
