"""What is installed: the two packages and nothing else, which work without the repository."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

TYPES = ("__init__.pyi", "keywords.pyi", "py.typed")
IMPORT = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import mambahome_jax, mambahome_kernels
for package in (mambahome_jax, mambahome_kernels):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for module in pkgutil.walk_packages(mambahome_jax.__path__, "mambahome_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert mambahome_jax.load_model and mambahome_kernels.selective_scan
"""


@pytest.mark.slow
def test_the_wheel_holds_the_packages_alone_and_works_without_the_repository(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mambahome_jax", "kernels", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, source)
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path / "out",
        source,
    ]
    if subprocess.run([sys.executable, *map(str, build)], check=False, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("setuptools, which builds it, could not be had")
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    others = [name for name in names if name.split("/")[0] not in ("mambahome_jax", "mambahome_kernels")]
    assert {name.split("/")[0].partition("-")[2] for name in others} == {"0.1.0.dist-info"}
    beside = {name for name in names if name not in others and not name.endswith(".py")}
    pages = {f"mambahome_jax/reporting/page.{ending}" for ending in ("css", "html.jinja", "js")}
    assert beside == pages | {f"mambahome_jax/{name}" for name in TYPES} | {"mambahome_kernels/py.typed"}
    command = [sys.executable, "-I", "-c", IMPORT, str(tmp_path / "installed")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
