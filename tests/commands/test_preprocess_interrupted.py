"""preprocess killed at any moment and run again: the same files as of one run, and nothing done twice."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.errors import DatasetError
from mambahome_jax.patches.store import Store
from tests.commands import interrupted
from tests.commands.scans import preprocess_config, scan, write

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def config(tmp_path):
    return replace(preprocess_config(tmp_path), spacing=interrupted.SPACING)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["FRESH", "STALE"])
def test_killed_before_each_change_of_the_file_system(config, tmp_path, state):
    for kind in ("images", "labels"):
        (config.input_path / f"{kind}/c.nii.gz").unlink()
    expected = {}
    for name, spacing in (("", interrupted.SPACING), ("back", interrupted.OTHER)):
        assert run(replace(config, output_path=tmp_path / f"whole{name}", spacing=spacing)) == 0
        expected[name] = files(tmp_path / f"whole{name}")
    command = [sys.executable, interrupted.__file__, config.input_path, tmp_path / "killed", state]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "killed").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    # Eight files, a folder of the store, and two descriptions: fewer changes than that would mean that none was seen.
    assert int(result.stdout) > 20
    for output in (tmp_path / "killed").iterdir():
        assert files(output) == expected["back" if output.name.startswith("back") else ""], output.name


def test_killed_with_two_processes_and_run_again_at_once(config, tmp_path):
    for i in range(12):
        for kind, array in zip(("images", "labels"), scan((48, 48, 24), seed=i), strict=True):
            write(config.input_path / f"{kind}/{i:02}.nii.gz", array)
    whole = replace(config, output_path=tmp_path / "whole")
    assert run(whole) == 0
    settings = ["--input_path", config.input_path, "--output_path", tmp_path / "out", "--num_workers", "2"]
    settings += ["--spacing", "1", "1", "3"]
    command = [sys.executable, ROOT / "preprocess.py", *map(str, settings)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while len(list((tmp_path / "out").glob("store/[!.]*/case.json"))) < 5 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    before = interrupted.done(tmp_path / "out")
    assert run(replace(config, output_path=tmp_path / "out")) == 0
    after = interrupted.done(tmp_path / "out")
    assert len(before) >= 5 and all(after[case] == time_ns for case, time_ns in before.items())
    assert files(tmp_path / "out") == files(whole.output_path)


def test_a_store_that_is_half_redone_is_not_read(config, monkeypatch):
    assert run(config) == 0
    monkeypatch.setattr(
        "mambahome_jax.preprocessing.dataset._work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(replace(config, spacing=interrupted.OTHER))
    with pytest.raises(DatasetError, match=r"index.json: no such file: .*Run preprocess.py again"):
        Store(config.output_path)
