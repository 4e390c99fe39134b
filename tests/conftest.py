"""What every test shares: settings of JAX, and where the goldens and the real scans lie."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Compiling takes longer than all that the tests compute, so they compile with little optimisation. A flag that a
# version does not know ends the process, hence the check.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# oneDNN's kernels for AVX-512 miss a float32 gradient of the network by 0.004. Open: users of such CPUs have them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Programs that one test compiled serve the others, in all workers of pytest-xdist and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.mkdtemp(prefix="mambahome-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": PROGRAMS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)

import numpy as np
import pytest
from hypothesis import settings

# The same examples at every run, and as much time as a busy machine needs for each.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
FULL = Path(os.environ.get("MAMBAHOME_GOLDENS", SHARED / "parity"))
REDUCED = Path(__file__).parent / "goldens"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first, so that no core waits for one at the end; no warnings of scans.

    Small arrays of a few values are no CT; what is said of scans is tested by itself.

    Not in pyproject.toml, as the kernels' tests run without what mambahome_jax imports.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if "kernels" not in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore::mambahome_jax.errors.ScanWarning"))


def golden_path(name: str) -> Path:
    """File of the golden set: the full one beside the checkout where it is there, else the part kept here."""
    for folder in (FULL, REDUCED):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is only in the full set of goldens, ../shared/parity")


def load_golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of a golden .npz."""
    with np.load(golden_path(name), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """Folder of the real MRI cases."""
    folder = SHARED / "data" / "hippocampus"
    if not folder.exists():
        pytest.skip("the real MRI cases are not there: ../shared/data/hippocampus")
    return folder


@pytest.fixture
def x64():
    """Runs a test in double precision."""
    import jax

    with jax.enable_x64(True):
        yield
