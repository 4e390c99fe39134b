"""Full, read-only and forbidden disks: one line, exit code 1 or 2, and what was there before stays."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.commands.scans import scan, write
from tests.conftest import ROOT, golden_path
from tests.faults.fuzz_files import digest
from tests.faults.kill_commands import commands, start

# Runs a command as a user who is not root, or with a limit for the size of a file, as a quota or a full disk has it.
_LIMITED = """
import os, resource, signal, sys
from mambahome_jax.cli import run_command
kind, value, out, name, *arguments = sys.argv[1:]
if kind == "user":
    # Once as root, elsewhere: another user may not be able to read the interpreter's own files, which are loaded then.
    devnull = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1)
    os.dup2(devnull, 1)
    run_command(name, [word.replace(out, out + "-warm") for word in arguments], "mambahome")
    sys.stdout.flush()
    os.dup2(kept, 1)
    os.setgid(int(value))
    os.setuid(int(value))
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
raise SystemExit(run_command(name, arguments, "mambahome"))
"""
NOBODY = "65534"


def command(name: str, folder: Path, out: Path) -> list[str]:
    """The arguments of a command with its inputs in `folder`."""
    data = folder / "in"
    return {
        "preprocess": ["--input_path", data, "--output_path", out, "--spacing", "1", "1", "3", "--num_workers", "1"],
        "infer": [
            "--data_path",
            data / "images",
            "--model_path",
            golden_path("mambahome_tiny.pth"),
            "--output_dir",
            out,
        ],
        "evaluate": ["--predictions", data / "labels", "--references", data / "labels", "--output_dir", out],
        "convert": [golden_path("mambahome_tiny.pth"), out / "w.npz", "--overwrite"],
        "check": [data, "--json", out / "check.json"],
    }[name]


def limited(kind: str, value: str, name: str, arguments: list, tmp_path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
        "HOME": "/nonexistent",
    }
    environment |= {"XDG_CACHE_HOME": "/nonexistent", "JAX_COMPILATION_CACHE_DIR": ""}
    program = [sys.executable, "-c", _LIMITED, kind, value, str(tmp_path / "out"), name]
    program += map(str, arguments)
    return subprocess.run(program, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)


@pytest.fixture
def inputs():
    """Two scans and a folder for results where another user may look: not below pytest's, which sessions close."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for number in range(2):
            for kind, array in zip(("images", "labels"), scan((32, 32, 16), seed=number), strict=True):
                write(folder / f"in/{kind}/{number}.nii.gz", array)
        out = folder / "out"
        out.mkdir()
        (out / "earlier.txt").write_text("a result")
        yield folder


def told(done: subprocess.CompletedProcess, out: Path, *words: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said[-2000:]
    assert "Traceback" not in said and any(word in said for word in words), said[-2000:]
    assert (out / "earlier.txt").read_text() == "a result"
    assert not [path for path in out.rglob("*") if ".partial" in path.name or path.name.startswith(".")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("name", ["preprocess", "evaluate", "check", "convert"])
def test_a_folder_that_belongs_to_somebody_else(inputs, name):
    out = inputs / "out"
    (inputs / "out-warm").mkdir()
    before = digest([inputs / "in", out])
    told(limited("user", NOBODY, name, command(name, inputs, out), inputs), out, "Permission denied")
    assert digest([inputs / "in", out]) == before


@pytest.mark.parametrize("name", ["preprocess", "evaluate", "convert"])
def test_a_disk_that_is_full(inputs, name):
    out = inputs / "out"
    done = limited("size", "200", name, command(name, inputs, out), inputs)
    told(done, out, "File too large")


@pytest.mark.faults  # mounts file systems
@pytest.mark.parametrize("kind", ["full", "read-only", "vanishing"])
@pytest.mark.parametrize("name", ["preprocess", "infer", "evaluate", "convert"])
def test_file_systems(inputs, name, kind):
    out = inputs / "mounted"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", out], check=True)
    programs = commands(inputs / "more")
    try:
        (out / "earlier.txt").write_text("a result")
        if kind == "full":
            with (out / "filling").open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        process = start(programs[name](out / "deeper" if kind == "vanishing" else out), inputs / "log")
        if kind == "vanishing":
            while not (out / "deeper").exists() and process.poll() is None:
                pass
            subprocess.run(["umount", "-l", out], check=True)
        code = process.wait(timeout=600)
        said = (inputs / "log").read_text()
        # A file system that goes while nobody looks leaves an empty folder, in which the rest is written.
        assert code in ((0, 1, 2) if kind == "vanishing" else (1, 2)), said[-3000:]
        assert "Traceback" not in said, said[-3000:]
        if kind != "vanishing":
            assert (out / "earlier.txt").read_text() == "a result"
            assert not [path for path in out.rglob("*") if ".partial" in path.name]
    finally:
        subprocess.run(["umount", "-l", out], check=False)
