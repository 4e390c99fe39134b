"""The demo is what the README tells a newcomer to type: every step of it, shortened."""

import csv
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mambahome_jax.cli import main
from mambahome_jax.commands import demo
from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.errors import OutputError
from mambahome_jax.flags import DemoConfig


def in_this_process(command, check):
    """In the place of subprocess.run: the command line of a step, without a start of Python and JAX for each."""
    assert command[:3] == [sys.executable, "-m", "mambahome_jax"] and not check
    with pytest.raises(SystemExit) as ended:
        main(command[3:])
    return subprocess.CompletedProcess(command, ended.value.code)


@pytest.mark.slow
def test_the_demo_goes_through(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=in_this_process))
    # Without the layers that take long to compile; the published network is trained in test_trajectory.
    size = MODEL_SIZES["MambaHoME_tiny"]
    plain = dataclasses.replace(size, model=size.model.replace(mixer="none", experts="ffn"))
    monkeypatch.setitem(MODEL_SIZES, "MambaHoME_tiny", plain)
    folder = tmp_path / "demo"
    assert demo.run(DemoConfig(folder, train_cases=3, test_cases=1, steps=2)) == 0
    printed = capfd.readouterr().out
    for step in ("preprocess", "train", "infer", "evaluate"):
        assert f"$ mambahome {step}" in printed
    (picture,) = (folder / "predictions" / "previews").glob("*.png")
    assert str(picture.resolve()) in printed.replace("\n", "")
    mean = json.loads((folder / "evaluation" / "summary.json").read_text())["mean"]["dice"]
    assert f"Mean Dice {mean:.3f} on 1 unseen scan" in printed
    with (folder / "evaluation" / "metrics.csv").open() as file:
        assert [row["structure"] for row in csv.DictReader(file)] == ["liver", "spleen", "kidneys", "aorta"]
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} >= {"best", "last"}


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="holds files that no demo wrote"):
        demo.run(DemoConfig(tmp_path))
    assert (tmp_path / "thesis.txt").exists()
