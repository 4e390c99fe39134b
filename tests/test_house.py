"""The laws of the house: imports run one way, what starts at once imports no jax, files and functions stay short."""

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mambahome_jax import version

ROOT = Path(__file__).resolve().parent.parent
# What the house may grow to with cross-validation, the paper's other systems and what they need, and with exported
# models and folders for hubs (4 files, 800 lines), nnU-Net's overlapping regions and damaged plans (130), duels that
# share GPUs (140), convolutions of thick slices and of one channel (210), and what strangers' data and runs taught
# (60), arguments that are refused by name (50), what a duel says of chance, kills and damage (110), seconds of
# lowering (35), label maps that are stored another way than their scans (20), words that follow the number, batches of
# windows beyond the scan's and full disks (75), voxels of references without a label (20), `__init__`s apart.
MOST_FILES, MOST_LINES = 157, 34_310
LONGEST_FILE, LONGEST_FUNCTION = 500, 80
# Belong to no room: the public names, the version, errors, configuration and what that is read by.
LEAVES = {"config", "errors", "flags", "forms", "keywords", "ranges", "recipes", "version"}
# room -> rooms that it may import, beside itself and the leaves
ALLOWED = {
    "mambahome_kernels": set(),
    "support": set(),
    "imaging": {"support"},
    "datasets": {"support", "imaging"},
    "patches": {"support", "imaging", "datasets"},
    "preprocessing": {"support", "imaging", "datasets", "patches"},
    "model": {"mambahome_kernels"},
    "weights": {"support", "model", "mambahome_kernels"},
    "inference": {"support", "imaging", "datasets", "model", "weights"},
    "training": {
        *("support", "imaging", "datasets", "patches", "preprocessing"),
        *("model", "weights", "inference", "evaluation", "reporting"),
    },
    "evaluation": {"support", "imaging", "datasets"},
    "reporting": {"support", "imaging", "datasets", "evaluation"},
}
ALLOWED["commands"] = {*ALLOWED} - {"mambahome_kernels"}
# Rooms and modules that start without jax, and those that start without what extras install too.
WITHOUT_JAX = ("support", "imaging", "datasets", "preprocessing", "evaluation", "reporting")
WITHOUT_JAX_TOO = (
    *("cli", "config", "flags", "forms", "ranges", "recipes", "usage"),
    *("commands.check", "commands.evaluate", "commands.report"),
)
EXTRAS = ("SimpleITK", "highdicom")
# Exported models run without the networks and flax; in Python also without what the command line needs.
NETWORKS = ("flax", "orbax", "mambahome_kernels", "mambahome_jax.model")
OF_THE_COMMAND_LINE = ("rich", "tyro", "PIL", "filelock", "safetensors", "isal")


def sources() -> list[Path]:
    files = [path for folder in ("mambahome_jax", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    folder = ROOT / "kernels" / package if package == "mambahome_kernels" else ROOT / "mambahome_jax" / package
    files = list(folder.rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top == "mambahome_jax":
                part = rest.split(".")[0]
                assert part in ALLOWED[package] | {package} | LEAVES, f"{path} imports {name}"
            if top == "mambahome_kernels" and package != top:
                assert top in ALLOWED[package], f"{path} imports {name}"


def test_what_must_start_at_once_imports_no_jax_and_no_extra():
    """Each module in turn in one process: the first one after which jax is there is the one that imports it."""
    rooms = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources()
        if path.relative_to(ROOT).parts[1] in WITHOUT_JAX
    ]
    modules = [f"mambahome_jax.{name}" for name in WITHOUT_JAX_TOO] + rooms
    code = f"""
import importlib, json, sys
late = {{}}
for name in {modules}:
    importlib.import_module(name)
    for package in {("jax", *EXTRAS)}:
        if package in sys.modules:
            late.setdefault(package, name)
print(json.dumps(late))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {}


def test_exported_models_run_without_the_networks():
    commands, python = (
        "mambahome_jax.commands.infer",
        "mambahome_jax.inference.segment mambahome_jax.weights.model_path",
    )
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({(*NETWORKS, *OF_THE_COMMAND_LINE)}))
for name in {python!r}.split():
    importlib.import_module(name)
for name in {OF_THE_COMMAND_LINE}:
    del sys.modules[name]
importlib.import_module({commands!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_completion_offers_the_public_names_which_no_module_hides():
    import mambahome_kernels as kernels

    import mambahome_jax as mh

    for name in WITHOUT_JAX_TOO:
        importlib.import_module(f"mambahome_jax.{name}")
    for name in mh.__all__:
        assert not isinstance(getattr(mh, name), types.ModuleType | None)
    importlib.import_module("mambahome_kernels.selective_scan.xla")
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)  # each also a folder of that name
    assert dir(mh) == sorted(mh.__all__)
    assert not {module.name for module in pkgutil.iter_modules(mh.__path__)} & {*mh.__all__}
    assert mh.__version__ == version.__version__


def test_no_file_and_no_function_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long


def test_the_house_stays_small():
    files = sources()
    lines = sum(len(path.read_text().splitlines()) for path in files)
    print(f"{len(files)} files of at most {MOST_FILES}, {lines} lines of at most {MOST_LINES}")
    assert len(files) <= MOST_FILES and lines <= MOST_LINES, f"{len(files)} files, {lines} lines"
