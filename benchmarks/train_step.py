"""Time one training step of a network on random patches: forward, loss, backward and update of a recipe.

Augmentation and dropout are left out.

python benchmarks/train_step.py --precision bf16 tf32 fp32 --json train_step.json
python benchmarks/train_step.py --model SegMamba --channels 4 --classes 4 --precision bf16 --json segmamba_step.json
python benchmarks/train_step.py --model ResEncUNet_L --recipe nnunet --patch 320 256 56 --spacing 0.7 0.7 5 \
    --precision bf16 --json resenc_step.json
"""

import argparse
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from figures import planned_gib, write_rows
from flax import nnx
from flops import matrix_flops, peak_tflops
from profiling import print_kernel_times

from mambahome_jax.config import MODEL_SIZES, ExpertLayer, Mixer, ModelConfig, NetworkConfig, UNetConfig
from mambahome_jax.model.networks import make_network
from mambahome_jax.preprocessing.grids import grids_for
from mambahome_jax.recipes import RECIPES, Recipe
from mambahome_jax.training.distributed import batch_sharding, make_mesh
from mambahome_jax.training.losses import DeepSupervision, recipe_loss
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.step import init_state, make_train_step

# Learning rate, an argument of the step.
RATE = np.float32(1e-4)
# Patched published code on one H200, torch 2.11, cuDNN benchmark, mamba_ssm kernels: ms and GiB for 2 x 128^3.
PUBLISHED = {"fp32": (1300, 25.9), "tf32": (590, 25.9), "bf16": (501, 16.1)}


def make_step(config: NetworkConfig, recipe: Recipe, precision, devices: int, strategy):
    """The compiled step's ingredients: (step, state, mesh)."""
    model: nnx.Module = make_network(config, rngs=nnx.Rngs(0), precision=precision)
    if recipe.deep_supervision:
        model = DeepSupervision(model, rngs=nnx.Rngs(1), precision=precision)
    graphdef, params = nnx.split(model)
    mesh = make_mesh(jax.devices()[:devices])
    optimizer, average = make_optimizer(recipe.optimizer), recipe.ema_decay
    state = init_state(nnx.to_pure_dict(params), optimizer, mesh, strategy, average > 0)
    loss = recipe_loss(recipe)
    step = make_train_step(graphdef, optimizer, loss, mesh, seed=0, strategy=strategy, ema_decay=average)
    return step, state, mesh


def random_batch(mesh, batch: int, patch: tuple[int, ...], channels: int, classes: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, *patch, channels), dtype=np.float32)
    label = rng.integers(0, classes, (batch, *patch)).astype(np.int32)
    return jax.device_put({"image": image, "label": label}, batch_sharding(mesh))


def measure(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    config = MODEL_SIZES[args.model].model.replace(
        in_chans=args.channels, out_chans=args.classes, use_checkpoint=args.use_checkpoint
    )
    if isinstance(config, ModelConfig):
        config = config.replace(mixer=args.mixer, experts=args.experts)
    if args.spacing is not None or isinstance(config, UNetConfig):
        grids = grids_for(args.spacing or (1, 1, 1), args.patch, isinstance(config, UNetConfig))
        config = config.with_grids(grids.strides, grids.kernel_sizes)
    as_published = args.model == "MambaHoME" and not config.twin and args.recipe == "published" and not args.spacing
    published_ms, published_gib = PUBLISHED[precision] if as_published else (math.nan, math.nan)
    recipe = RECIPES[args.recipe]
    step, state, mesh = make_step(config, recipe, precision, args.num_devices, args.strategy)
    batch = random_batch(mesh, args.batch * args.num_devices, tuple(args.patch), args.channels, args.classes)
    start = time.perf_counter()
    traced = step.trace(state, batch, RATE)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    for _ in range(args.warm_up):
        state, metrics = compiled(state, batch, RATE)
    jax.block_until_ready(metrics)
    samples = []
    for _ in range(args.runs):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, RATE)
        jax.block_until_ready(metrics)
        samples.append((time.perf_counter() - start) * 1e3)
    samples.sort()
    ms = statistics.median(samples)
    stats = jax.devices()[0].memory_stats() or {}
    row = {
        "precision": precision,
        "ms": ms,
        "fastest": samples[0],
        "slowest": samples[-1],
        "images_per_s": args.batch * args.num_devices / ms * 1e3,
        "peak_gib": stats.get("peak_bytes_in_use", float("nan")) / 2**30,
        "planned_gib": planned_gib(compiled),
        "compile_s": compile_s,
        "tflops": matrix_flops(traced.jaxpr) / args.num_devices / ms / 1e9,
        "loss": float(metrics["loss"]),
        "published_ms": published_ms,
        "published_gib": published_gib,
    }
    row["of_peak"] = row["tflops"] / peak_tflops(precision)
    if args.profile:
        held = [state]

        def call():
            held[0], metrics = compiled(held[0], batch, RATE)
            return metrics

        print_kernel_times(call)
    return row


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['precision']:9s} {row['ms']:8.1f} ({row['fastest']:.1f}-{row['slowest']:.1f}) {row['images_per_s']:8.2f}"
        f" {row['peak_gib']:9.1f} {row['planned_gib']:9.1f} {row['compile_s']:9.1f} {row['tflops']:8.0f}"
        f" {row['of_peak']:6.0%}   {row['published_ms']:6.0f} ms {row['published_gib']:5.1f} GiB"
        f"   loss {row['loss']:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["bf16", "tf32", "fp32"], choices=list(PUBLISHED))
    parser.add_argument("--model", default="MambaHoME", choices=list(MODEL_SIZES))
    parser.add_argument("--mixer", default=ModelConfig.mixer, choices=get_args(Mixer), help="of MambaHoME")
    parser.add_argument("--experts", default=ModelConfig.experts, choices=get_args(ExpertLayer), help="of MambaHoME")
    parser.add_argument("--recipe", default="published", choices=list(RECIPES))
    parser.add_argument("--batch", type=int, default=2, help="patches on each device")
    parser.add_argument("--patch", nargs=3, type=int, default=[128, 128, 128])
    parser.add_argument("--spacing", nargs=3, type=float, help="of the voxels, which the grids follow, in mm")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--use_checkpoint", action="store_true")
    parser.add_argument("--num_devices", type=int, default=1)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="list the kernels that take the time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{args.num_devices} x {device.device_kind}, JAX {jax.__version__}, Python {platform.python_version()}")
    print(f"{args.model}, mixer {args.mixer}, experts {args.experts}")
    print(
        f"recipe {args.recipe}, {args.batch} x {args.patch} each, {args.classes} classes, {args.strategy}; "
        "ms are medians"
    )
    print("precision       ms (range)   images/s  peak GiB  planned  compile s  TFLOP/s  of peak   published")
    # From the least memory to the most: the highest use of a process is not forgotten.
    rows = [measure(args, precision) for precision in sorted(args.precision, key=["bf16", "tf32", "fp32"].index)]
    for row in rows:
        print_row(row)
    write_rows(args.json, args, rows)


if __name__ == "__main__":
    main()
