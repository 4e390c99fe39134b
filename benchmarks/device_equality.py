"""Losses of one device against several (ddp and fsdp) with the same batches and each size's published learning rate.

python benchmarks/device_equality.py --model MambaHoME_small --steps 20 --json equality.json

In fp32, augmentation included.

Runs on a CPU split into host devices. Exit code 1 where a loss differs by more than --tolerance, relative.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

DEVICES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MambaHoME_tiny", choices=["MambaHoME", "MambaHoME_small", "MambaHoME_tiny"])
    parser.add_argument("--lr", type=float, help="learning rate (default: the size's)")
    parser.add_argument("--eps", type=float, help="epsilon of AdamW (default: the size's)")
    parser.add_argument("--one_program", action="store_true", help="not sample by sample, as on a GPU")
    parser.add_argument("--devices", type=int, default=8, choices=[2, 4, 8])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--patch", nargs=3, type=int, default=[32, 32, 32])
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Read when JAX starts.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} {os.environ.get('XLA_FLAGS', '')}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import numpy as np
    from flax import nnx

    from mambahome_jax.config import MODEL_SIZES, AugmentationConfig
    from mambahome_jax.model.network import MambaHoME
    from mambahome_jax.training.losses import dice_ce
    from mambahome_jax.training.optimizer import OptimizerConfig, make_optimizer
    from mambahome_jax.training.sharding import make_mesh, put_batch
    from mambahome_jax.training.step import init_state, make_train_step

    size = MODEL_SIZES[args.model]
    config = size.model.replace(out_chans=args.classes)
    shape = (DEVICES, *args.patch)

    def batch(step: int) -> dict[str, np.ndarray]:
        """Labels that the image shows, so that the loss falls and an error would grow."""
        rng = np.random.default_rng(step)
        label = np.repeat(
            np.repeat(rng.integers(0, args.classes, (DEVICES, *(n // 8 for n in args.patch))), 8, 1), 8, 2
        )
        label = np.repeat(label, 8, 3).astype(np.int32)
        return {"image": (label + rng.normal(0, 0.3, shape))[..., None].astype(np.float32), "label": label}

    def train(devices: int, strategy) -> tuple[list[float], float]:
        mesh = make_mesh(jax.devices()[:devices])
        optimizer = make_optimizer(OptimizerConfig(lr=args.lr or size.lr, eps=args.eps or size.eps, t_max=args.steps))
        graphdef, params = nnx.split(MambaHoME(config, rngs=nnx.Rngs(0), precision="fp32"))
        state = init_state(nnx.to_pure_dict(params), optimizer, mesh, strategy)
        more = {"dropout": args.dropout, "by_sample": not args.one_program}
        step = make_train_step(graphdef, optimizer, dice_ce, mesh, 0, AugmentationConfig(), strategy, **more)
        losses, begun = [], time.perf_counter()
        for number in range(args.steps):
            state, metrics = step(state, put_batch(batch(number), mesh))
            losses.append(float(metrics["loss"]))
        return losses, time.perf_counter() - begun

    one, seconds = train(1, "ddp")
    print(f"1 device: loss {one[0]:.6f} to {one[-1]:.6f}, {seconds:.0f} s", flush=True)
    rows = []
    for strategy in args.strategies:
        losses, seconds = train(args.devices, strategy)
        differences = [abs(a - b) / abs(b) for a, b in zip(losses, one, strict=True)]
        print(" ".join(f"{difference:.1e}" for difference in differences), flush=True)
        rows.append({"strategy": strategy, "devices": args.devices, "losses": losses, "largest": max(differences)})
        print(
            f"{args.devices} devices, {strategy}: largest relative difference {max(differences):.2e}, {seconds:.0f} s",
            flush=True,
        )
    if args.json:
        about = {"jax": jax.__version__, "python": platform.python_version(), **vars(args), "json": None}
        args.json.write_text(json.dumps({"about": about, "one": one, "rows": rows}, indent=1))
    return int(any(row["largest"] > args.tolerance for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
