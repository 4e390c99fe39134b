"""The last line of a command is the next one, whole, and can be pasted, whatever the folders are called."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.commands import check, convert, evaluate, infer, preprocess, report
from mambahome_jax.flags import (
    CheckConfig,
    ConvertConfig,
    EvaluateConfig,
    InferConfig,
    PreprocessConfig,
    ReportConfig,
    TrainConfig,
)
from mambahome_jax.inference import batch
from mambahome_jax.training.progress import end_lines, ensemble_line
from tests.commands.scans import preprocess_config
from tests.conftest import golden_path
from tests.faults.fuzz_worker import PROPERTIES
from tests.inference.models import Levels


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))
    folder = tmp_path / "it's (my) $HOME; 漢字"
    folder.mkdir()
    preprocess_config(folder)
    return folder


def following(capsys):
    """Command and configuration of what the last lines say comes next."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Next", "All together"))]
    mambahome, command, *words = shlex.split(lines[-1][lines[-1].index("mambahome ") :])
    assert mambahome == "mambahome"
    return command, cli.parse(command, words)


def test_from_check_to_report(home, capsys):
    data, ready, predicted, scored = (home / name for name in ("in", "ready", "predicted", "scored"))
    assert check.run(CheckConfig(data, num_workers=1, modality="ct")) == 0
    command, config = following(capsys)
    assert (command, config.input_path, config.modality) == ("preprocess", data, "ct")
    assert config.spacing is None  # preprocess makes the same plan
    assert preprocess.run(PreprocessConfig(data, ready, spacing=(0, 0, 0), num_workers=1)) == 0
    command, config = following(capsys)
    assert (command, config.data_train) == ("train", ready)
    assert infer.run(InferConfig(data, Path("model"), predicted, previews=False)) == 0
    command, config = following(capsys)
    assert (command, config.predictions, config.references) == ("evaluate", predicted, Path("LABELS"))
    assert evaluate.run(EvaluateConfig(predicted, data / "labels", scored)) == 0
    command, config = following(capsys)
    assert command == "report"
    assert config == ReportConfig(scored, predictions=predicted, references=data / "labels")
    assert report.run(config) == 0
    assert "report.html" in capsys.readouterr().out


def test_scans_alone_and_converted_weights_lead_to_infer(home, capsys):
    scans, weights = home / "in" / "images", home / "my weights.npz"
    assert check.run(CheckConfig(scans, num_workers=1)) == 0
    command, config = following(capsys)
    assert (command, config.data_path, config.model_path) == ("infer", scans, Path("RUN/checkpoints/best"))
    assert convert.run(ConvertConfig(golden_path("mambahome_tiny.pth"), weights)) == 0
    command, config = following(capsys)
    assert (command, config.data_path, config.model_path) == ("infer", Path("SCANS"), weights)


def test_from_train_to_infer(tmp_path, capsys):
    folder = tmp_path / "my run"
    best = {"step": 3, "val_dice": None}
    ended = {"status": "finished", "exit_code": 0, "step": 3, "seconds": 1.0, "best": best}
    print("\n".join(end_lines(folder, ended, TrainConfig(tmp_path))))
    command, config = following(capsys)
    assert (command, config.model_path) == ("infer", folder / "checkpoints/best")
    print(ensemble_line(folder, 2, 2))
    command, config = following(capsys)
    assert (command, config.model_path) == ("infer", folder)


def test_a_training_that_mostly_compiled_says_so(tmp_path):
    """A network of one step is no result, though it is the best there is."""
    ended = {"status": "finished", "exit_code": 0, "step": 1, "seconds": 60.0, "best": None, "compile_seconds": 46.0}
    timed = TrainConfig(tmp_path, max_minutes=1)
    note = "Note: compiling took 46 s of it. Train longer by more --max_minutes; what was compiled is kept for"
    assert end_lines(tmp_path, ended, timed)[1:] == [f"{note} the next run"]
    assert end_lines(tmp_path, ended | {"seconds": 100.0}, timed)[1:] == []
    assert end_lines(tmp_path, ended, TrainConfig(tmp_path, steps=1))[1:] == []


def test_an_interrupted_training_names_the_command_that_continues_it(tmp_path, capsys):
    words = ["--data_train", str(tmp_path / "my scans"), "--recipe", "published", "--patch_size", "32", "32", "16"]
    words += ["--mirror", "LR", "AP", "--augment", "False", "--steps", "5", "--use_checkpoint", "--members", "2"]
    flags = cli.parse("train", words)
    ended = {"status": "stopped by a signal", "exit_code": 143, "step": 3, "seconds": 1.0, "best": None}
    print("\n".join(end_lines(tmp_path, ended, flags)))
    command, config = following(capsys)
    # Flags given at their default too, so that no plan decides instead.
    assert command == "train" and {*config.given} == {*flags.given, "resume"}
    assert dataclasses.replace(config, resume=False, given=flags.given) == flags
