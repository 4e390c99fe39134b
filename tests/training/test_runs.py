"""A training as a function, and what it says of the code that made it."""

import json
import re
import shutil
import subprocess
import time
from dataclasses import asdict, replace

import pytest

import mambahome_jax as mh
from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.devices import git_state
from mambahome_jax.support.files import jsonable, read_json
from mambahome_jax.training.run_report import is_finished
from mambahome_jax.weights.checkpoint import find_checkpoint
from tests.commands.test_train import _dataset, _small  # noqa: F401


def test_train_is_a_function_without_a_console(tmp_path, capsys):
    data = _dataset(tmp_path / "data")
    flags = {
        "data_train": data,
        "model": "MambaHoME_tiny",
        "steps": 1,
        "optimizer": "SGD",
        "output_dir": tmp_path / "run",
    }
    ended, begun = [], time.monotonic()

    class Last(mh.Callback):
        def validation(self, step, validation):
            ended.append((step, validation.dice))

        def end(self, status):
            ended.append(status)

    result = mh.train(**flags, callbacks=[Last()])
    assert capsys.readouterr() == ("", "")
    assert (result.status, result.exit_code, result.step) == ("finished", 0, 1)
    assert result.best == tmp_path / "run/checkpoints/best" and result.best.is_dir()
    assert list(result.structures) == ["box"] and result.dice == result.structures["box"] and not result.failures
    assert ended == [(1, result.dice), "finished"]
    timeline = read_json(tmp_path / "run/run.json")["timeline"]
    assert [*timeline] == ["start", "compile", "training", "validation", "checkpoints", "held_out", "report"]
    assert (
        min(timeline["compile"], timeline["validation"]) > 0 and sum(timeline.values()) <= time.monotonic() - begun + 1
    )
    with pytest.raises(mh.ConfigError, match="holds a run already"):
        mh.train(**flags)
    # As one that was killed after its checkpoint: run.json does not say what it took.
    report, config = tmp_path / "run/run.json", find_checkpoint(tmp_path / "run/checkpoints/last") / "config.json"
    content, checkpoint = read_json(report), read_json(config)
    assert 0 < checkpoint["seconds"] <= sum(timeline.values())
    del content["seconds"]
    report.write_text(json.dumps(content | {"status": "running"}))
    config.write_text(json.dumps(checkpoint | {"seconds": 1000.0}))
    mh.train(**flags, resume=True)
    assert 1000 < read_json(report)["seconds"] < 1500
    with pytest.raises(mh.TrainingError, match="cases of this batch"):
        mh.train(**flags | {"output_dir": tmp_path / "wrong", "lr": 1e38, "steps": 4, "max_val_cases": 1})


def test_the_commit_of_the_code_and_what_differs_from_it(tmp_path):
    assert git_state(tmp_path) is None
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *words], check=True)
    state = git_state(tmp_path)
    assert state is not None and re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["changed"] == []
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == state | {"changed": ["code.py"]}


def test_a_run_of_a_version_without_a_flag_is_finished_unless_that_flag_is_given(tmp_path):
    flags = TrainConfig(tmp_path / "data", keep_last=2)
    report = {"status": "finished", "configuration": jsonable(asdict(flags))}
    assert is_finished(report, flags) and not is_finished(report, replace(flags, keep_last=3))
    del report["configuration"]["overlap"]
    assert is_finished(report, flags) and not is_finished(report, replace(flags, overlap=0.25))
