"""Time the whole path of a synthetic CT through inference, file to file, by part, with the peaks of memory.

python benchmarks/infer_volume.py --model MambaHoME --precision bf16 --json infer_volume.json

Twice with the same programs: the first time compiles, which the second leaves out.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, label, to_network_grid
from mambahome_jax.model.networks import make_network
from mambahome_jax.support.devices import default_precision


def make_scan(path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], shear: float = 0) -> None:
    """A body of soft tissue with noise in air, int16 HU, axes L, P, S, as .nii.gz.

    shear: mm to the back that the last axis goes in a mm, as of a tilted gantry.
    """
    i, j, _ = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    body = np.where(i**2 + 2 * j**2 < 0.8, np.int16(40), np.int16(-1000))
    rng = np.random.default_rng(0)
    array = np.empty(shape, np.int16)
    for k in range(shape[2]):  # by slices, so that making it takes less memory than what is measured
        array[:, :, k] = body[:, :, 0] + rng.integers(-60, 60, shape[:2], np.int16)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 2] = -shear * spacing[2]
    write_volume(path, Volume(array, affine))


def scan_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Flags that say what is segmented by what; `defaults` in the place of those of this program."""
    parser.add_argument("--model", default="MambaHoME", choices=list(MODEL_SIZES))
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 400], help="of the scan, voxels")
    parser.add_argument("--voxel", nargs=3, type=float, default=[0.8, 0.8, 1.0], help="of the scan, mm")
    parser.add_argument("--spacing", nargs=3, type=float, default=[0.8, 0.8, 3.0], help="of the network, mm")
    parser.add_argument("--roi_size", nargs=3, type=int, default=[192, 192, 48])
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--sw_batch_size", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(**defaults)


def segment_file(model: Any, source: Path, result: Path, settings: Any) -> dict[str, float]:
    """Seconds of each part."""
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def done(part: str) -> None:
        seconds[part] = time.perf_counter() - begun - sum(seconds.values())

    volume = read_volume(source)
    done("read")
    image = to_network_grid(volume, settings, 1)
    done("prepare")
    labels = label(model, image)
    done("windows and back to the scan's grid")
    write_volume(result, labels)
    done("write")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scan_arguments(parser)
    parser.add_argument("--precision", default=None, choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    config = MODEL_SIZES[args.model].model.replace(in_chans=1, out_chans=args.classes)
    precision = args.precision or default_precision()
    model = make_network(config, rngs=nnx.Rngs(0), precision=precision)
    options = SegmentOptions(
        spacing=args.spacing,
        roi_size=args.roi_size,
        overlap=args.overlap,
        sw_batch_size=args.sw_batch_size,
        chain="trained",
    )
    settings = Segmenter.of(model, options).settings
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, Python {platform.python_version()}; {args.model}, {precision}")
    print(f"{args.shape} voxels of {args.voxel} mm, {args.classes} classes; seconds")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "scan.nii.gz"
        make_scan(source, tuple(args.shape), tuple(args.voxel))
        for _ in range(args.runs):
            seconds = segment_file(model, source, Path(folder) / "labels.nii.gz", settings)
            total = sum(seconds.values())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
            rows.append(seconds | {"total": total, "host_peak_gib": peak, "device_peak_gib": on_device})
            shares = ", ".join(f"{part} {value:.1f} ({value / total:.0%})" for part, value in seconds.items())
            print(f"{total:.1f}: {shares}; memory at most {peak:.1f} GiB, device {on_device:.1f} GiB", flush=True)
    if args.json:
        about = {"device": device, "jax": jax.__version__, **{k: str(v) for k, v in vars(args).items()}}
        args.json.write_text(json.dumps({"about": about, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
