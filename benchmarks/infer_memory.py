"""Peak memory of infer.py on a synthetic CT of any size, int16 in .nii.gz, with random weights.

python benchmarks/infer_memory.py --shape 512 512 1000 --spacing 1.5 1.5 2 --overlap 0.25

Host: VmHWM of the process, the most that it ever had in memory. GPU, where nvidia-smi is there: the most that the first
one ever had in use, sampled twice a second without JAX's allocation ahead, so that it must be idle otherwise.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import tell
from flax import nnx
from infer_volume import make_scan, scan_arguments

from mambahome_jax.config import MODEL_SIZES, DataProperties
from mambahome_jax.model.networks import make_network
from mambahome_jax.weights.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def write_model(
    folder: Path, size: str, classes: int, spacing: tuple[float, ...], roi: tuple[int, ...], channels: int = 1
) -> None:
    """A checkpoint folder of random weights; its logits say nothing, but take the time and memory of any."""
    config = MODEL_SIZES[size].model.replace(in_chans=channels, out_chans=classes)
    data = DataProperties(spacing=(spacing[0], spacing[1], spacing[2]), patch_size=(roi[0], roi[1], roi[2]))
    params = nnx.to_pure_dict(nnx.state(make_network(config, rngs=nnx.Rngs(0), precision="fp32"), nnx.Param))
    write_checkpoint(folder, params, {"model": config.to_json(), "data": data.to_json()})


def peak_host_gib(process: int) -> float:
    """VmHWM so far; 0 where the process is gone."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 2**20 if found else 0.0


def used_gpu_gib() -> float:
    """In use on the first GPU; 0 without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 1024


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a program to its end: seconds, and the peaks of its memory. Exits with its output where it fails."""
    begun, host, gpu = time.perf_counter(), 0.0, 0.0
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            host, gpu = max(host, peak_host_gib(process.pid)), max(gpu, used_gpu_gib())
            time.sleep(0.5)
        log.seek(0)
        if process.returncode:
            sys.exit(f"{command[0]} ended with {process.returncode}\n{log.read()}")
    seconds = round(time.perf_counter() - begun, 1)
    return {"host_peak_gib": round(host, 2), "gpu_peak_gib": round(gpu, 2), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = {"spacing": [1.5, 1.5, 2.0], "roi_size": [96, 96, 96]}
    scan_arguments(parser, model="MambaHoME_tiny", shape=[512, 512, 1000], **small)
    parser.add_argument(
        "--shear", type=float, default=0, help="of the scan: mm to the back in a mm along the last axis"
    )
    parser.add_argument("--channels", type=int, default=1, help="of the scan, above 1 each in a file of its own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = folder / "scans"
        names = ["scan.nii.gz"] if args.channels == 1 else [f"scan_{n:04}.nii.gz" for n in range(args.channels)]
        make_scan(scans / names[0], tuple(args.shape), tuple(args.voxel), args.shear)
        for name in names[1:]:
            shutil.copy(scans / names[0], scans / name)
        write_model(folder / "model", args.model, args.classes, args.spacing, args.roi_size, args.channels)
        command = [sys.executable, str(ROOT / "infer.py"), "--data_path", str(scans)]
        command += ["--model_path", str(folder / "model"), "--output_dir", str(folder / "out")]
        command += ["--overlap", str(args.overlap), "--sw_batch_size", str(args.sw_batch_size)]
        measured = run_measured(command)
    tell(args, **measured)


if __name__ == "__main__":
    main()
