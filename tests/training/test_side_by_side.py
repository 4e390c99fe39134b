"""Folds on several GPUs of one host: a process and a GPU each, the same bits as one after the other."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import signal
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from mambahome_jax.commands import train as command
from mambahome_jax.flags import TrainConfig
from mambahome_jax.training import side_by_side
from tests.commands.test_train import _config, _dataset, _small  # noqa: F401
from tests.training.test_folds import arrays, rows
from tests.training.train_process import train_fold


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setattr(command, "visible_gpus", lambda: ["5", "GPU-7"])


@pytest.mark.slow
def test_folds_in_processes_of_their_own_have_the_bits_of_one_alone(tmp_path, monkeypatch, capsys):
    data = _dataset(tmp_path / "data")
    monkeypatch.setattr(side_by_side, "train_apart", train_fold)
    config = _config(data, tmp_path / "apart", folds=2, steps=2)
    (tmp_path / "apart").mkdir()
    assert command.run(config) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Fold 0 on GPU 5; see" in text and "Fold 1 ended with exit code 0" in text
    assert "Scores of 5 cases" in text and "All together: mambahome infer" in text
    assert [(tmp_path / "apart" / f"gpu_of_{fold}").read_text() for fold in range(2)] == ["5", "GPU-7"]
    assert (tmp_path / "apart" / "fold_1" / "log.txt").read_text().count("finished: step 2") == 1
    assert len(rows(tmp_path / "apart" / "cross_validation")) == 5
    assert command.run(dataclasses.replace(config, output_dir=tmp_path / "here", fold=1)) == 0
    pairs = zip(*(arrays(tmp_path / run / "fold_1") for run in ("apart", "here")), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
    assert json.loads((tmp_path / "apart" / "run.json").read_text())["status"] == "finished"


class Process:
    """Ends with the exit code that it is given, or at once where it is told to."""

    def __init__(self, job, slot, code):
        self.job, self.slot, self.exitcode, self.process = job, slot, code, self

    def message(self):
        return ""

    def terminate(self):
        self.exitcode = 143

    def join(self):
        pass


def started_with(monkeypatch, codes):
    """The processes that are started; codes: of each, None while it runs."""
    processes = []

    def start(job, slot, loud):
        processes.append(Process(job, slot, codes[len(processes)]))
        return processes[-1]

    monkeypatch.setattr(side_by_side, "_start", start)
    monkeypatch.setattr(side_by_side, "_PAUSE", 0.0)
    return processes


def test_a_signal_reaches_every_process_and_starts_no_more(tmp_path, monkeypatch):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", folds=4)
    looked, before = [], signal.getsignal(signal.SIGTERM)

    def sleep(_):
        if not looked:
            looked.append(1)
            signal.raise_signal(signal.SIGTERM)

    processes = started_with(monkeypatch, [None] * 4)
    monkeypatch.setattr(side_by_side.time, "sleep", sleep)
    assert command.run(config) == 143
    assert [process.exitcode for process in processes] == [143, 143]
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_a_fold_that_is_refused_no_other_is_begun(tmp_path, monkeypatch, capsys):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", folds=4)
    processes = started_with(monkeypatch, [2, None, 0, 0])
    monkeypatch.setattr(
        side_by_side.time, "sleep", lambda _: (len(looked) > 3 and processes[1].terminate()) or looked.append(1)
    )
    looked = []
    assert command.run(config) == 143 and len(processes) == 2
    assert "Next, to continue: mambahome train" in capsys.readouterr().out


class Result(NamedTuple):
    exit_code: int


@pytest.mark.parametrize("planned", [False, True])
def test_folds_at_the_same_time_have_the_same_minutes(tmp_path, monkeypatch, planned):
    data = _dataset(tmp_path / "data")
    if planned:
        (data / "plan.json").write_text(json.dumps({"version": 1, "length": {"value": {"minutes": 10}}}))
    minutes = None if planned else 30.0
    config = _config(data, tmp_path / "run", folds=5, steps=None, max_minutes=minutes)
    processes = started_with(monkeypatch, [0] * 5)
    calls = []
    monkeypatch.setattr(side_by_side, "run_training", lambda *arguments: calls.append(arguments) or Result(0))
    assert command.run(config, 1.0) == 0
    # Three rounds on two GPUs.
    assert [process.job.flags.max_minutes for process in processes] == [10.0] * 5
    assert [process.job.begun for process in processes] == [1.0, 1.0, None, None, None]
    ((flags, _, started, at_once),) = calls
    assert (flags.max_minutes, flags.resume, started, at_once) == (30.0, True, 1.0, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize(
    "changes",
    [
        {"folds": None},
        {"fold": 1},
        {"num_devices": 2},
        {"parallel": False},
        {"strategy": "fsdp"},
        {"data_train": "raw"},
    ],
)
def test_what_else_is_asked_for_is_done_in_turn(tmp_path, changes):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", folds=2)
    assert side_by_side.wants_side_by_side(config, ["0", "1"])
    assert not side_by_side.wants_side_by_side(config, ["0"])
    if "data_train" in changes:
        changes = {"data_train": tmp_path / "raw"}
    assert not side_by_side.wants_side_by_side(dataclasses.replace(config, **changes), ["0", "1"])


def test_a_fold_that_cannot_be_trained_says_so_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "end_with_parent", lambda: None)
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", folds=2, lr=-1.0)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit, match="2"):
        side_by_side.train_apart(dataclasses.replace(config, fold=1), 0.0, False, sender)
    message = receiver.recv()
    assert message.startswith("--lr -1; expected") and capsys.readouterr() == ("", "")
    started_with(monkeypatch, [2, 0])
    monkeypatch.setattr(Process, "message", lambda process: message if process.exitcode else "")
    assert command.run(config) == 2
    assert capsys.readouterr().err == f"Error: Fold 0: {message}\n"


def test_one_that_another_command_began_leaves_the_advice_to_that(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "end_with_parent", lambda: None)
    monkeypatch.setattr(side_by_side, "protect_output", lambda: None)
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", folds=2, fold=0, steps=1)
    _, sender = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit, match="0"):
        side_by_side.train_apart(config, 0.0, True, sender)
    said = capsys.readouterr().out
    assert "finished: step 1" in said and "mambahome train" not in said and "No cross_validation" not in said


ENVIRONMENT = """import os

def send(flags, begun, loud, sender):
    names = ("CUDA_VISIBLE_DEVICES", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    sender.send(" ".join(f"{os.environ.get(name)}" for name in names))
"""


@pytest.mark.parametrize("named", [None, "XLA_CLIENT_MEM_FRACTION"])
def test_each_has_its_share_of_the_memory_of_a_gpu(tmp_path, monkeypatch, named):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    (tmp_path / "variables_of_process.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(side_by_side, "train_apart", importlib.import_module("variables_of_process").send)
    if named:
        monkeypatch.setenv(named, "0.9")
    before, told = dict(os.environ), []
    jobs = deque(side_by_side.Job(name, name, TrainConfig(tmp_path), tmp_path) for name in "abcd")
    slots = side_by_side.slots_of(["5", "GPU-7"], 2)
    end = (lambda job, code, message: told.append((job.name, code, message)), time.monotonic())
    assert side_by_side.run_jobs(jobs, slots, Console(quiet=True), *end) is None and not jobs
    share = "0.450 None" if named else "None 0.375"
    names = {"a": "5", "b": "GPU-7", "c": "5", "d": "GPU-7"}
    assert sorted(told) == [(name, 0, f"{gpu} {share}") for name, gpu in names.items()]
    assert dict(os.environ) == before
