"""Training over several real processes: the losses of one process, one stop for all, and no hang when one dies."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from mambahome_jax.commands import train as command
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.training.distributed import gather, join_processes, launched_as_several, require_same
from mambahome_jax.weights.checkpoint import read_checkpoint_config
from tests.commands.test_train import _dataset, _small  # noqa: F401
from tests.conftest import ROOT

SETTINGS = {"model": "MambaHoME_tiny", "steps": 6, "val_every": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _dataset(tmp_path_factory.mktemp("processes") / "data", val=("c3", "c4"))


@pytest.fixture
def two_processes(data, tmp_path):
    """Function that trains into tmp_path/two with two processes of one device each: their (exit code, output)."""
    started = []

    def run(*flags, first=None, second=None, settings=SETTINGS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = os.environ | {"XLA_FLAGS": xla, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
        arguments = [sys.executable, "-m", "tests.training.train_process", "--data_train", data]
        arguments += ["--output_dir", tmp_path / "two", "--coordinator_address", address, "--num_processes", 2, *flags]
        arguments += [word for name, value in settings.items() for word in (f"--{name}", value)]
        for number, extra in enumerate((first or {}, second or {})):
            started.append(
                subprocess.Popen(
                    [*map(str, arguments), "--process_id", str(number)],
                    env=environment | extra,
                    cwd=ROOT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        outputs = [process.communicate(timeout=900)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, outputs, strict=True)]

    yield run
    for process in started:
        process.kill()


def _rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _assert_same_training(run, other):
    a, b = _rows(run), _rows(other)
    assert [row["step"] for row in a] == [row["step"] for row in b] == [str(n) for n in range(1, 7)]
    np.testing.assert_allclose(*([float(row["loss"]) for row in rows] for rows in (a, b)), rtol=1e-5)
    # Of a validation that a stop interrupted metrics.csv has nothing, but it is made up for.
    best = [json.loads((out / "run.json").read_text())["best"] for out in (run, other)]
    assert best[0]["step"] == best[1]["step"] and best[0]["val_dice"] == pytest.approx(best[1]["val_dice"], abs=1e-5)


@pytest.mark.slow
def test_a_second_start_compiles_nothing(data, tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    # As the command line sets it, which comes too late here: the stand-in has imported JAX before.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    cached = []
    for seed, name in enumerate(("first", "second")):
        # The seed is no part of the program: that of the second network of an ensemble is not compiled again.
        command_line = [sys.executable, "-m", "tests.training.train_process", "--data_train", str(data), "--steps", "1"]
        command_line += ["--model", "MambaHoME_tiny", "--batch_size", "2", "--output_dir", str(tmp_path / name)]
        command_line += ["--seed", str(seed)]
        subprocess.run(command_line, env=environment, cwd=ROOT, check=True, capture_output=True, timeout=900)
        cached.append(sorted(path.name for path in (tmp_path / "xla").rglob("*-cache")))
    assert any("train_step" in name for name in cached[0])
    assert cached[1] == cached[0]


@pytest.mark.slow
def test_two_processes_train_as_one(data, two_processes, tmp_path):
    (code, text), (other_code, other_text) = two_processes()
    assert (code, other_code) == (0, 0), text + other_text
    assert "on 2 x cpu of 2 processes" in text and "step 6: validation Dice" in text
    # The second process joins, and says nothing of its own.
    assert "step" not in other_text
    assert command.run(TrainConfig(data, output_dir=tmp_path / "one", num_devices=2, **SETTINGS)) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "finished"
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["best", "last"]


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all_and_one_process_can_go_on(data, two_processes, tmp_path):
    ended = two_processes("--strategy", "fsdp", second={"DIE_AT": "4", "DIE_BY": str(int(signal.SIGTERM))})
    assert [code for code, _ in ended] == [143, 143], ended
    assert 3 <= read_checkpoint_config(tmp_path / "two" / "checkpoints" / "last")["step"] < 6
    settings = SETTINGS | {"num_devices": 2, "strategy": "fsdp"}
    assert command.run(TrainConfig(data, output_dir=tmp_path / "two", resume=True, **settings)) == 0
    assert command.run(TrainConfig(data, output_dir=tmp_path / "one", **settings)) == 0
    _assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_end_in_the_time_given(two_processes, tmp_path):
    """Process 0 decides by its clock after which step both end, and neither waits for the other for ever."""
    settings = {"model": "MambaHoME_tiny", "max_minutes": 5, "batch_size": 2}
    ended = two_processes(first={"STEPS_TAKE": "30"}, second={"STEPS_TAKE": "1"}, settings=settings)
    (code, text), (other_code, other_text) = ended
    assert (code, other_code) == (0, 0), text + other_text
    steps = [int(row["step"]) for row in _rows(tmp_path / "two")]
    assert steps == list(range(1, len(steps) + 1)) and 4 < len(steps) < 10
    assert read_checkpoint_config(tmp_path / "two" / "checkpoints" / "last")["step"] == len(steps)


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_other_with_a_message(two_processes):
    (code, text), (other_code, _) = two_processes(second={"DIE_AT": "3", "DIE_BY": str(int(signal.SIGKILL))})
    assert other_code == -signal.SIGKILL
    # Through the broken connection, or through the service's missing heartbeat.
    assert code == 1 and "another process may have died" in text, text


def test_where_the_processes_come_from():
    with pytest.raises(ConfigError, match="--num_processes, --process_id missing"):
        join_processes("host:1", environment={})
    with pytest.raises(ConfigError, match="--process_id 2; expected"):
        join_processes("host:1", 2, 2, environment={})
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID=x; expected a whole number"):
        join_processes(environment={"JAX_PROCESS_ID": "x"})
    # A job of one process, and none at all: nothing is joined, or the test's own devices would be refused.
    join_processes(environment={"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
    join_processes(environment={"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"})
    assert launched_as_several({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"})
    assert not launched_as_several({"SLURM_NTASKS": "2"})
    assert launched_as_several({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "4"})


def test_one_process_agrees_with_itself():
    assert gather({"a": (1, None)}) == [{"a": (1, None)}]
    require_same("The configuration", {"a": (1, 2)})
