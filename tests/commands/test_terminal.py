"""What commands show on a terminal of 80, 100 and 120 columns, recorded through a pseudo-terminal."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mambahome_jax.commands import check, evaluate, infer, plan, preprocess, report, train
from mambahome_jax.flags import (
    CheckConfig,
    EvaluateConfig,
    InferConfig,
    PlanConfig,
    PreprocessConfig,
    ReportConfig,
)
from mambahome_jax.inference import batch
from mambahome_jax.training import train as training
from tests.commands.scans import preprocess_config
from tests.commands.test_train import _config, _dataset, small_networks
from tests.faults.fuzz_worker import PROPERTIES
from tests.inference.models import Levels
from tests.terminal import Terminal

WIDTHS = (80, 100, 120)


def on_terminal(columns, run):
    """The screen on which `run` writes, after it, and what it returns."""
    terminal = Terminal(columns)
    with pytest.MonkeyPatch.context() as patch, os.fdopen(os.dup(terminal.slave), "w") as stream:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "stdout", stream)
        result = run()
    return terminal.close(), result


def assert_fits(screen):
    """Only command lines, which are to be pasted, go on in the next line."""
    wrapped = [line for line in screen.wrapped if "mambahome " not in line]
    assert not wrapped


def frames(screen):
    """The bar as it was drawn each time."""
    pieces = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.text))
    return [piece for piece in pieces if "━" in piece and " left " in piece]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))
    monkeypatch.chdir(tmp_path)
    preprocess_config(tmp_path)


@pytest.mark.parametrize("columns", WIDTHS)
def test_every_command_fits_and_ends_with_the_next_one(columns, home):
    data, ready, predicted, scored = map(Path, ("in", "ready", "predicted", "scored"))
    for run, config, bar, following in (
        (
            check.run,
            CheckConfig(data, num_workers=1),
            "Checking ━",
            "preprocess --input_path in --output_path READY --modality ct",
        ),
        (plan.run, PlanConfig(data, memory=0), "", "preprocess --input_path in --output_path READY"),
        (
            preprocess.run,
            PreprocessConfig(data, ready, num_workers=1),
            "Preprocessing ━",
            "train --data_train ready --model MambaHoME",
        ),
        (
            infer.run,
            InferConfig(data, Path("model"), predicted, previews=False),
            "windows ━",
            "evaluate --predictions predicted --references LABELS --output_dir EVAL",
        ),
        (
            evaluate.run,
            EvaluateConfig(predicted, data / "labels", scored),
            "Evaluating ━",
            "report --evaluation scored --predictions predicted --references in/labels",
        ),
        (report.run, ReportConfig(scored), "", ""),
    ):
        screen, code = on_terminal(columns, lambda run=run, config=config: run(config))
        assert code == 0
        assert_fits(screen)
        assert f"mambahome {following}" in screen.text or not following
        assert all(len(shown) <= columns - len("^C") for shown in frames(screen))
        assert (config.__class__ is InferConfig) == ("compiling" in screen.text)
        assert bar in str(screen) and ("left 0:00:00" in str(screen)) == bool(bar)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_training_says_what_it_does_and_how_long_it_goes_on(columns, tmp_path, monkeypatch):
    small_networks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    config = _config(_dataset(Path("data")), Path("run"), steps=4, val_every=2)
    screen, code = on_terminal(columns, lambda: train.run(config))
    assert code == 0
    assert_fits(screen)
    bars = frames(screen)
    assert all(
        len(bar) <= columns - len("^C") and bar.count("━") + bar.count("╸") + bar.count("╺") >= 10 for bar in bars
    )
    doing = [bar.split()[0] for bar in bars]
    changes = [word for word, before in zip(doing, ["", *doing], strict=False) if word != before]
    # Steps may be too fast to be drawn.
    expected = ["Starting", "Compiling", "Validating", "Validating", "Held-out"]
    assert [word for word in changes if word != "Training"] == expected
    last = [bar for bar in bars if "step 4/4" in bar][-1]
    assert re.search(r"step 4/4  loss \d\.\d{4}.* \d:\d\d:\d\d left \d+ s *$", last)
    assert ("lr " in last, "data wait" in last) == (columns > 80, columns == 120)
    assert "Compiling the training step" in str(screen) and "Held-out  " not in str(screen)
    *_, following = screen.text.strip().splitlines()
    assert following.startswith("Next: mambahome infer --data_path SCANS --model_path run/checkpoints/best")


def test_a_training_that_is_interrupted_says_how_to_go_on(tmp_path, monkeypatch):
    small_networks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    put, batches = training.put_batch, []

    def interrupted(batch, mesh):
        batches.append(batch)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return put(batch, mesh)

    monkeypatch.setattr(training, "put_batch", interrupted)
    config = _config(_dataset(Path("data")), Path("run"), steps=400, val_every=100)
    screen, code = on_terminal(80, lambda: train.run(config))
    assert code == 130
    assert_fits(screen)
    *_, following = screen.text.strip().splitlines()
    assert "\nSIGINT: " in str(screen) and "\nstopped by a signal: step 2 after " in str(screen)
    assert "mambahome train --data_train data --output_dir run" in following and " --resume" in following


def test_the_width_is_asked_of_the_terminal():
    lengths = {}
    for columns in WIDTHS:
        terminal = Terminal(columns)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        line = [sys.executable, "-m", "mambahome_jax", "train", "--help"]
        subprocess.run(line, stdin=terminal.slave, stdout=terminal.slave, env=environment, check=True)
        lengths[columns] = max(len(line) for line in str(terminal.close()).splitlines())
    assert 70 < lengths[80] <= 80 < lengths[100] <= 100 and lengths[120] == lengths[100]
