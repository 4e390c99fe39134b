"""Peak memory of train.py and its loader's processes on volumes of clinical size, which this script makes.

python benchmarks/train_memory.py --volumes 4 --shape 512 512 1000 --workers 4 --json train_memory.json

Memory is the sum over the processes of what each alone holds plus its share of what they share (PSS), at its highest.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
from figures import tell
from loader import Usage, make_store

from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, write_prepared

ROOT = Path(__file__).resolve().parent.parent
SPACING = (0.8, 0.8, 3.0)


def make_dataset(
    folder: Path, volumes: int, shape: tuple[int, int, int], spacing: tuple[float, float, float] = SPACING
) -> None:
    """A folder as preprocess.py writes it, but for the images, which training does not read. spacing: mm."""
    make_store(folder / "store", volumes, shape)
    names = [f"volume{number}" for number in range(volumes)]
    cases = tuple(
        PreparedCase(name, f"images/{name}.nii.gz", f"labels/{name}.nii.gz", "train", "ct", shape, spacing, name)
        for name in names
    )
    write_prepared(Prepared(folder, "synthetic", spacing, "RAS", ("ct",), {1: "organ", 2: "lesion"}, cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MambaHoME_tiny", choices=list(MODEL_SIZES))
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 1000])
    parser.add_argument("--patch_size", nargs=3, type=int, default=[48, 48, 48])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process: what making it leaves behind is not training's memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(make_dataset, folder / "data", args.volumes, tuple(args.shape)).result()
        command = [sys.executable, str(ROOT / "train.py"), "--data_train", str(folder / "data")]
        command += ["--output_dir", str(folder / "run"), "--model", args.model, "--hold_out", "0"]
        command += ["--patch_size", *map(str, args.patch_size), "--batch_size", str(args.batch_size)]
        command += ["--num_workers", str(args.workers), "--steps", str(args.steps)]
        begun = time.perf_counter()
        with Usage() as usage:
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            sys.exit(f"train.py ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    seconds = round(time.perf_counter() - begun, 1)
    tell(args, peak_gib=round(usage.peak / 2**30, 2), seconds=seconds, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
