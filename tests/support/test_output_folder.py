"""Two processes and one output folder: the second is told who holds it, and a dead one holds nothing."""

import json
import os
import subprocess
import sys

import pytest

from mambahome_jax.commands import evaluate, infer, preprocess, train
from mambahome_jax.errors import OutputError
from mambahome_jax.flags import EvaluateConfig, InferConfig, PreprocessConfig, TrainConfig
from mambahome_jax.support.output_folder import LOCK, locked, open_output
from tests.commands.scans import scan, write

HOLD = """
import sys
from pathlib import Path
from mambahome_jax.support.output_folder import locked
with locked(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scans(tmp_path):
    image, label = scan()
    write(tmp_path / "in/images/a.nii.gz", image)
    write(tmp_path / "in/labels/a.nii.gz", label)
    return tmp_path / "in"


def test_every_command_that_writes_a_folder_is_kept_out_of_one_that_is_held(tmp_path, scans):
    out = tmp_path / "out"
    commands = (
        lambda: preprocess.run(PreprocessConfig(scans, out)),
        lambda: infer.run(InferConfig(scans, tmp_path / "model", out)),
        lambda: evaluate.run(EvaluateConfig(scans / "labels", scans / "labels", out)),
        lambda: train.run(TrainConfig(scans, output_dir=out)),
    )
    with locked(out, "preprocess"):
        before = (out / LOCK).read_bytes()
        for command in commands:
            with pytest.raises(OutputError) as caught:
                command()
            assert str(caught.value).startswith(f"{out}: `mambahome preprocess` (process {os.getpid()} on ")
            assert "is writing to it. Wait for its end, or name another --output_" in str(caught.value)
            assert [path.name for path in out.iterdir()] == [LOCK] and (out / LOCK).read_bytes() == before
    assert not out.exists()


def test_lock_of_a_process_that_was_killed_keeps_nobody_out(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"`mambahome train` \(process {process.pid} on "), locked(tmp_path, "x"):
            pass
        process.kill()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    (tmp_path / ".a.nii.gz.1-2.partial.gz").touch()
    with locked(tmp_path, "infer"):
        assert not list(tmp_path.glob("*.partial*"))
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "out", "infer"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_in_the_place_of_the_output_folder_is_named_as_what_it_is(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written.* Move the file that has its name or name another"):
        open_output(tmp_path / "out")
