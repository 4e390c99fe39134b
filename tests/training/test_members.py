"""Several networks in one training command."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from mambahome_jax.commands import train as command
from mambahome_jax.datasets.prepared import read_prepared, write_prepared
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.volume import Volume, write_volume
from mambahome_jax.support.files import jsonable
from mambahome_jax.training import runs
from mambahome_jax.training import train as training
from mambahome_jax.training.runs import TrainResult
from mambahome_jax.weights.checkpoint import read_checkpoint_params
from tests.commands.test_train import SHAPE, _config, _dataset, _scan, _small  # noqa: F401
from tests.training.stand_in import steps_take


@pytest.fixture
def made(monkeypatch):
    """One entry for each training step that was made anew."""
    made, make = [], training.make_train_step
    monkeypatch.setattr(training, "make_train_step", lambda *args, **named: made.append(1) or make(*args, **named))
    return made


def _report(folder):
    return json.loads((folder / "run.json").read_text())


def test_members_are_runs_of_their_own_that_infer_takes_together(tmp_path, capsys, made):
    data, out = _dataset(tmp_path / "data", val=()), tmp_path / "run"
    config = _config(data, out, steps=2, members=2, seed=5)
    assert command.run(config) == 0
    text = capsys.readouterr().out
    homes = [out / "member_0", out / "member_1"]
    best = [home / "checkpoints" / "best" for home in homes]
    assert "Network 2 of 2, seed 6" in text
    assert f"All together: mambahome infer --data_path SCANS --model_path {out} --output_dir PRED" in text
    assert [_report(home)["seed"] for home in homes] == [5, 6]
    assert {_report(home)["status"] for home in (out, *homes)} == {"finished"}
    assert len(made) == 1 and text.count("Compiling") == 1, "the second network compiles its step again"
    # Each by itself is what the same flags give without the other.
    assert command.run(_config(data, tmp_path / "alone", steps=2, seed=6)) == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        read_checkpoint_params(best[1]),
        read_checkpoint_params(tmp_path / "alone" / "checkpoints" / "best"),
    )
    assert _report(out)["configuration"] == jsonable(dataclasses.asdict(config))


def test_resume_leaves_finished_networks_as_they_are(tmp_path, capsys):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=2, members=1)
    first = dataclasses.replace(config, output_dir=tmp_path / "run" / "member_0")
    assert command.run(first) == 0
    before = (tmp_path / "run" / "member_0" / "run.json").read_bytes()
    config = dataclasses.replace(config, members=2)
    with pytest.raises(ConfigError, match=r"member_0 holds a run already. Continue all with --resume"):
        command.run(config)
    capsys.readouterr()
    assert command.run(dataclasses.replace(config, resume=True)) == 0
    text = capsys.readouterr().out
    assert "member_0: finished already" in text and text.count("to train on") == 1 and "Compiling" in text
    assert (tmp_path / "run" / "member_0" / "run.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"lr was 0\.01, now 0\.1"):
        command.run(dataclasses.replace(config, resume=True, lr=0.1))
    # Without the flag it would begin a network beside them.
    with pytest.raises(ConfigError, match=r"holds several networks\. Say --members"):
        command.run(dataclasses.replace(config, members=1, resume=True))
    (tmp_path / "plain").mkdir()
    assert command.run(dataclasses.replace(config, members=1, output_dir=tmp_path / "plain")) == 0
    with pytest.raises(ConfigError, match="plain holds the run of one network already"):
        command.run(dataclasses.replace(config, output_dir=tmp_path / "plain"))
    with pytest.raises(ConfigError, match="--members 0; expected 1 or more"):
        command.run(dataclasses.replace(config, members=0))


def test_a_network_with_another_schedule_follows_its_own_with_the_same_step(tmp_path, made):
    """With patients of several scans the seed decides how many cases an epoch has."""
    root = _dataset(tmp_path / "data", val=())
    prepared = read_prepared(root)
    cases = [dataclasses.replace(case, patient="A" if n < 3 else case.id) for n, case in enumerate(prepared.cases)]
    write_prepared(dataclasses.replace(prepared, cases=tuple(cases)))
    config = _config(root, tmp_path / "run", steps=None, val_every=None, epochs=2, hold_out=3, members=4)
    assert command.run(dataclasses.replace(config, batch_size=1)) == 0
    assert len(made) == 1, "the schedule is no part of the program"
    schedules = set()
    for number in range(4):
        report = _report(tmp_path / "run" / f"member_{number}")["training"]
        steps, periods = report["steps_per_period"], report["t_max"]
        with (tmp_path / "run" / f"member_{number}" / "metrics.csv").open() as file:
            rates = [float(row["lr"]) for row in csv.DictReader(file)]
        passed = np.arange(len(rates)) // steps / periods
        np.testing.assert_allclose(rates, report["lr"] * (1 + np.cos(np.pi * passed)) / 2, rtol=1e-6)
        schedules.add((steps, periods, len(rates)))
    assert len(schedules) > 1


def test_data_that_is_not_preprocessed_is_stored_once(tmp_path):
    for number in range(3):
        image, label = _scan(number)
        folder = tmp_path / "raw" / f"case{number}"
        folder.mkdir(parents=True)
        write_volume(folder / "ct.nii.gz", Volume(image, np.eye(4)))
        write_volume(folder / "labels.nii.gz", Volume(label, np.eye(4)))
    assert command.run(_config(tmp_path / "raw", tmp_path / "run", steps=1, members=2)) == 0
    assert (tmp_path / "run" / "data" / "store").is_dir() and not (tmp_path / "run" / "member_0" / "data").exists()


def test_networks_without_a_checkpoint_are_not_named(tmp_path, capsys):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", lr=1e38, members=2)
    assert command.run(config) == 1
    text = capsys.readouterr().out
    assert "Of 2 networks, 0 have a checkpoint" in text and "infer.py" not in text
    assert _report(tmp_path / "run")["exit_code"] == 1


def test_networks_share_what_is_left_and_a_signal_ends_them_all(tmp_path, monkeypatch, capsys):
    now, calls = [100.0], []

    def one(training, folder, config, clock, skip_finished):
        calls.append((folder.name, config.max_minutes, config.seed, *clock[:3]))
        now[0] += 150.0
        return TrainResult(folder, "ended", (0, 1, 143)[len(calls) - 1])

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.Training, "_train_one", one)
    config = _config(tmp_path, tmp_path / "run", steps=None, max_minutes=8.0, members=4)
    assert command.run(config, 95.0) == 143
    assert calls == [
        ("member_0", 2.0, 0, 95.0, 480.0, 4),
        ("member_1", 2.0, 1, 250.0, 325.0, 3),
        ("member_2", 2.0, 2, 400.0, 175.0, 2),
    ]
    assert "infer.py" not in capsys.readouterr().out
    assert _report(tmp_path / "run")["status"] == "stopped by a signal"


def test_a_timed_ensemble_that_is_resumed_after_its_end_trains_nothing(tmp_path, capsys, monkeypatch):
    started = steps_take(monkeypatch, seconds=10)
    alone = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=None, val_every=None, max_minutes=2.0)
    for config in (alone, dataclasses.replace(alone, members=2, output_dir=tmp_path / "both")):
        assert command.run(config, started) == 0
        files = {path: path.read_bytes() for path in config.output_dir.rglob("metrics.csv")}
        assert files
        capsys.readouterr()
        assert command.run(dataclasses.replace(config, resume=True), started) == 0
        assert "finished already" in capsys.readouterr().out
        assert files == {path: path.read_bytes() for path in files}
