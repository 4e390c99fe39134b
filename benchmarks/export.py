"""Export MambaHoME_tiny, and segment a scan with it where little is installed: seconds, size, equality of labels.

    python -m benchmarks.export           # makes a virtual environment; needs a package index
    python -m benchmarks.export --here    # blocks the other packages in this environment instead
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.export --here    # on a GPU: the program for cuda

Writes one JSON object with versions and hardware.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import MODEL_SIZES, DataProperties
from mambahome_jax.model.networks import make_network
from mambahome_jax.support.devices import device_line
from mambahome_jax.weights.weights import Weights, flat_params, write_weights

ROOT = Path(__file__).parents[1]
INSTALLED = ("jax", "numpy", "nibabel", "flatbuffers")
BLOCKED = (
    "flax",
    "orbax",
    "mambahome_kernels",
    "mambahome_jax.model",
    "rich",
    "tyro",
    "PIL",
    "filelock",
    "safetensors",
)
SEGMENT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[4].split()))
import mambahome_jax as mh
model, scan, result = sys.argv[1:4]
mh.write_volume(result, mh.segment(mh.load_model(model), mh.read_volume(scan)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), here=arguments.here), indent=1))


def measure(home: Path, *, here: bool) -> dict:
    size = MODEL_SIZES["MambaHoME_tiny"]
    network = make_network(size.model.replace(out_chans=3), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)  # noise, for labels of all classes
    values = flat_params(network)
    params = {name: a + rng.normal(0, 0.05, a.shape).astype(np.float32) for name, a in values.items()}
    data = DataProperties(spacing=None, modality="mr", patch_size=size.patch_size, labels=((1, "liver"), (2, "spleen")))
    write_weights(home / "run", Weights(params, network.config, data))
    scan = rng.normal(size=(64, 56, 60)).astype(np.float32)
    mh.write_volume(home / "scan.nii.gz", mh.Volume(scan, np.eye(4)))

    begun, used = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "mambahome_jax", "export", home / "run", home / "model.mh"], check=True, cwd=ROOT
    )
    seconds, after = time.perf_counter() - begun, os.times()

    expected = mh.segment(mh.load_model(home / "run"), mh.read_volume(home / "scan.nii.gz")).array
    python = Path(sys.executable) if here else environment(home)
    command = [python, "-c", SEGMENT, home / "model.mh", home / "scan.nii.gz", home / "labels.nii.gz"]
    # Only this package, not what lies beside it where it is installed.
    (home / "package").mkdir()
    (home / "package" / "mambahome_jax").symlink_to(ROOT / "mambahome_jax")
    paths = os.environ | {"PYTHONPATH": str(home / "package")}
    subprocess.run([*command, " ".join(BLOCKED) if here else ""], check=True, cwd=home, env=paths)
    labels = mh.read_labels(home / "labels.nii.gz").array
    return {
        "export_seconds": round(seconds, 2),
        "export_cpu_seconds": round(
            after.children_user + after.children_system - used.children_user - used.children_system, 2
        ),
        "megabytes": round((home / "model.mh").stat().st_size / 1e6, 2),
        "differing_voxels": int((labels != expected).sum()),
        "labels": [int(value) for value in np.unique(expected)],
        "installed": None if here else packages(python),
        "device": device_line(),
        "processor": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def environment(home: Path) -> Path:
    """A virtual environment with what an exported model needs; of JAX this version."""
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    wanted = [f"jax=={jax.__version__}" if name == "jax" else name for name in INSTALLED]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def packages(python: Path) -> list[str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    return [f"{entry['name']} {entry['version']}" for entry in json.loads(listed.stdout)]


if __name__ == "__main__":
    main()
