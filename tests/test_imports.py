"""Imports run one way, and what must start at once imports no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Belong to no room: the public names, the version, errors and configuration.
LEAVES = {"config", "errors", "flags", "recipes", "version"}
# room -> rooms that it may import, beside itself and the leaves
ALLOWED = {
    "mambahome_kernels": set(),
    "support": set(),
    "imaging": {"support"},
    "datasets": {"support", "imaging"},
    "patches": {"support", "imaging", "datasets"},
    "preprocessing": {"support", "imaging", "datasets", "patches"},
    "model": {"mambahome_kernels"},
    "weights": {"support", "model"},
    "inference": {"support", "imaging", "datasets", "model", "weights"},
    "training": {
        *("support", "imaging", "datasets", "patches", "preprocessing"),
        *("model", "weights", "inference", "evaluation"),
    },
    "evaluation": {"support", "imaging", "datasets"},
    "report": {"support", "imaging", "evaluation"},
}
ALLOWED["commands"] = {*ALLOWED} - {"mambahome_kernels"}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_one_way(package):
    folder = ROOT / "kernels" / package if package == "mambahome_kernels" else ROOT / "mambahome_jax" / package
    files = list(folder.rglob("*.py"))
    assert files
    for path in files:
        for name in _imported(path):
            top, _, rest = name.partition(".")
            if top == "mambahome_jax":
                part = rest.split(".")[0]
                assert part in ALLOWED[package] | {package} | LEAVES, f"{path} imports {name}"
            if top == "mambahome_kernels" and package != top:
                assert top in ALLOWED[package], f"{path} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config",
        "imaging",
        "datasets.registry",
        "evaluation.evaluate",
        "datasets.phantom",
        "commands.check",
        "preprocessing.case",
        "commands.report",
        "report.page",
    ],
)
def test_without_jax(module):
    code = f"import sys, mambahome_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_load():
    import mambahome_jax as mh

    for name in mh.__all__:
        assert getattr(mh, name) is not None


def test_imaging_starts_without_what_extras_install():
    code = (
        "import sys, mambahome_jax.imaging.dicomseg; sys.exit(bool({'SimpleITK', 'highdicom', 'jax'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
