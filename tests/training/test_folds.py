"""Cross-validation in one training command, or a fold on each of several machines."""

import csv
import dataclasses
import json
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from rich.console import Console

from mambahome_jax.commands import train as command
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.evaluation.results import Score
from mambahome_jax.patches.store import Store
from mambahome_jax.training import held_out, runs
from mambahome_jax.training import train as training
from mambahome_jax.training.folds import divide_cases, fold_lines, learn_largest, networks_of
from mambahome_jax.training.runs import TrainResult, run_training
from mambahome_jax.training.schedule import Clock
from mambahome_jax.weights.checkpoint import read_checkpoint_params
from mambahome_jax.weights.model_path import learned_largest
from tests.commands.test_train import _config, _dataset, _small  # noqa: F401

FOLDS = ("fold_0", "fold_1", "fold_2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _dataset(tmp_path_factory.mktemp("folds") / "data", val=("c4",))


def report(folder):
    return json.loads((folder / "run.json").read_text())


def summary(folder):
    return json.loads((folder / "cross_validation" / "summary.json").read_text())


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arrays(folder):
    return jax.tree.leaves(read_checkpoint_params(folder / "checkpoints" / "last"))


def test_every_case_is_scored_once_by_the_network_that_did_not_see_it(data, tmp_path, capsys, monkeypatch):
    made, make = [], training.make_train_step
    monkeypatch.setattr(training, "make_train_step", lambda *args, **named: made.append(1) or make(*args, **named))
    monkeypatch.setattr(held_out, "predict_case", lambda _, image, *__: (image[..., 0] > 30).astype(np.uint8))
    run = tmp_path / "run"
    assert command.run(_config(data, run, folds=3, steps=3)) == 0
    text = capsys.readouterr().out
    assert len(made) == 1, "a fold compiles the step of another again"
    pooled = rows(run / "cross_validation")
    assert [row["case"] for row in pooled] == ["c0", "c1", "c2", "c3", "c4"]
    assert len({row["dice"] for row in pooled}) == 5
    singles = []
    for name in FOLDS:
        own = report(run / name)["data"]
        assert sorted([*own["train"], *own["val"]]) == ["c0", "c1", "c2", "c3", "c4"]
        singles += rows(run / name / "validation")
        assert [row["case"] for row in rows(run / name / "validation")] == own["val"]
        # Chosen on nothing: the last weights, which are also those that infer takes.
        assert json.loads((run / name / "validation" / "summary.json").read_text())["checkpoint"]["name"] == "last"
        best = jax.tree.leaves(read_checkpoint_params(run / name / "checkpoints" / "best"))
        assert all(np.array_equal(*pair) for pair in zip(best, arrays(run / name), strict=True))
    assert sorted(singles, key=lambda row: row["case"]) == pooled
    content = summary(run)
    assert content["cases"] == 5 and content["provenance"]["unseen"] == 5
    assert content["mean"]["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in pooled]))
    assert (run / "cross_validation" / "report.html").is_file()
    assert report(run)["cross_validation"]["dice"] == content["mean"]["dice"]
    assert "Note: 1 case is marked val by the dataset, but in the folds like all others" in text
    assert "Scores of 5 cases, each by the network that was not trained on it" in text
    assert f"All together: mambahome infer --data_path SCANS --model_path {run} --output_dir PRED" in text


def test_folds_on_several_machines_are_those_of_one_and_the_last_one_pools(data, tmp_path, capsys):
    """Any order; the folder of a fold has the same bits."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    settings = {"folds": 2, "steps": 2, "seed": 3}
    assert command.run(_config(data, together, **settings)) == 0
    capsys.readouterr()
    assert command.run(_config(data, apart, **settings, fold=1)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "No cross_validation yet, without fold 0 (not begun): mambahome train" in text and "--folds 2 --fold 0" in text
    )
    assert not (apart / "cross_validation").exists() and not (apart / "run.json").exists()
    assert command.run(_config(data, apart, **settings, fold=0)) == 0
    assert "Scores of 5 cases" in capsys.readouterr().out
    for name in FOLDS[:2]:
        assert report(together / name)["data"]["val"] == report(apart / name)["data"]["val"]
        assert all(np.array_equal(*pair) for pair in zip(arrays(together / name), arrays(apart / name), strict=True))
    assert rows(together / "cross_validation") == rows(apart / "cross_validation")
    assert report(apart)["networks"] == [*FOLDS[:2]] and report(apart)["configuration"]["fold"] is None
    # A fold that is said once more is left as it is.
    assert command.run(_config(data, apart, **settings, fold=0, resume=True)) == 0
    assert "finished already" in capsys.readouterr().out
    # One that was trained with other settings is told, one that held out other cases is not counted.
    content = report(apart / "fold_1")
    content["training"]["lr"] = 1
    (apart / "fold_1" / "run.json").write_text(json.dumps(content))
    assert command.run(_config(data, apart, **settings, fold=0, resume=True)) == 0
    assert "Note: fold_1 was trained with lr 1 instead of 0.01" in " ".join(capsys.readouterr().out.split())
    content = report(apart / "fold_1")
    content["data"]["digests"]["val"] = {"c0": "1:"}
    (apart / "fold_1" / "run.json").write_text(json.dumps(content))
    assert command.run(_config(data, apart, **settings, fold=0, resume=True)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"without fold 1 (it holds out other cases; remove {apart / 'fold_1'} first): mambahome train" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"folds": 1}, "--folds 1; expected 2 or more"),
        ({"folds": 6}, "--folds 6; expected at most 5, the number of patients with labels"),
        ({"fold": 1}, "--fold 1 without --folds; expected both"),
        ({"folds": 2, "fold": 2}, "--fold 2; expected 0 to 1 with --folds 2"),
        ({"folds": 2, "members": 2}, "--members with --folds; the folds say which cases are held out"),
        ({"folds": 2, "hold_out": 4}, "--hold_out with --folds"),
        ({"folds": 2, "given": ("hold_out",)}, "--hold_out with --folds"),
        ({"folds": 2, "steps": None, "max_minutes": 0.0}, "--max_minutes 0; expected"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(data, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        command.run(_config(data, tmp_path / "run", **flags))
    with pytest.raises(ConfigError, match="--data_val with --folds"):
        command.run(_config(data, tmp_path / "run", folds=2, data_val=data))


def test_networks_of_several_seeds_hold_out_the_same_cases(data, tmp_path):
    prepared = read_prepared(data)

    def divided(**seeds):
        return divide_cases(prepared, _config(data, tmp_path / "run", folds=3, **seeds))

    assert divided(seed=0) != divided(seed=1)
    assert divided(seed=0) == divided(seed=1, fold_seed=0)
    assert "from seed 0" in fold_lines(prepared, divided(), _config(data, tmp_path, folds=3, seed=1, fold_seed=0))[0]


def test_a_folder_of_folds_takes_no_other_run(data, tmp_path):
    config = _config(data, tmp_path / "run", folds=2, steps=1, val_every=1)
    assert command.run(config) == 0
    for changes, message in (
        ({}, "fold_0 holds a run already. Continue all with --resume"),
        ({"folds": None}, "holds several networks. Say --folds"),
        ({"folds": None, "members": 2}, "holds several networks. Say --folds"),
        ({"folds": 3, "resume": True}, "was trained on other data: cases to train on changed"),
        ({"seed": 1, "resume": True}, "was trained on other data: cases to train on changed"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.run(dataclasses.replace(config, **changes))
    (tmp_path / "run" / "fold_2" / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(ConfigError, match="run holds more than --folds 2"):
        command.run(dataclasses.replace(config, resume=True))


def test_a_case_that_failed_is_told_and_the_others_are_scored(data, tmp_path, capsys, monkeypatch):
    original = held_out.predict_case

    def predict_case(network, image, entry, settings):
        if entry.id == "c3":
            raise DatasetError("damaged", file=entry.id)
        return original(network, image, entry, settings)

    monkeypatch.setattr(held_out, "predict_case", predict_case)
    result = run_training(_config(data, tmp_path / "run", folds=2, steps=1, val_every=1), Console(quiet=True))
    assert result.exit_code == 1 and result.failures == {"c3": "c3: damaged"}
    assert [row["case"] for row in rows(tmp_path / "run" / "cross_validation")] == ["c0", "c1", "c2", "c4"]
    assert [each.exit_code for each in result.networks].count(1) == 1
    assert report(tmp_path / "run")["exit_code"] == 1


def test_a_command_stopped_while_it_pools_goes_on_to_the_same_scores(data, tmp_path, monkeypatch):
    config = _config(data, tmp_path / "run", folds=2, steps=1, val_every=1)
    assert command.run(config) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "run" / "cross_validation").iterdir()}
    (tmp_path / "run" / "cross_validation" / "summary.json").unlink()
    # Not raised as a signal, which a shell has its background ignore.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(held_out, "write_json", Mock(side_effect=KeyboardInterrupt))
        command.run(dataclasses.replace(config, resume=True))
    assert not (tmp_path / "run" / "cross_validation" / "summary.json").exists()
    assert command.run(dataclasses.replace(config, resume=True)) == 0
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run" / "cross_validation").iterdir()}


def test_scores_of_earlier_folds_are_not_kept_beside_new_ones(data, tmp_path):
    """What infer does by them would be learned from other networks."""
    output = tmp_path / "run" / "cross_validation"
    output.mkdir(parents=True)
    (output / "summary.json").write_text("{}")
    assert command.run(_config(data, tmp_path / "run", folds=2, fold=1, steps=1, val_every=1)) == 0
    assert not (output / "summary.json").exists()


def test_a_fold_without_scores_is_told(data, tmp_path):
    config = _config(data, tmp_path / "run", folds=2, steps=1, val_every=1)
    assert command.run(config) == 0
    (tmp_path / "run" / "fold_1" / "validation" / "summary.json").unlink()
    result = run_training(dataclasses.replace(config, resume=True), Console(quiet=True))
    missing = report(tmp_path / "run" / "fold_1")["data"]["val"]
    assert result.exit_code == 1 and sorted(result.failures) == missing
    assert all("fold_1 has no scores: " in reason for reason in result.failures.values())
    (tmp_path / "run" / "fold_0" / "validation" / "summary.json").unlink()
    assert (tmp_path / "run" / "cross_validation" / "report.html").is_file()
    assert len(run_training(dataclasses.replace(config, resume=True), Console(quiet=True)).failures) == 5
    assert not (tmp_path / "run" / "cross_validation" / "report.html").exists(), "a report of earlier scores"


def test_the_largest_part_is_kept_where_it_is_better_and_only_there():
    scores = [
        Score(case, label, name, dice, *[float("nan")] * 5)
        for case in ("a", "b")
        for label, name, dice in ((1, "worse", 0.9), (2, "better", 0.5), (3, "same", 0.123456), (4, "absent", np.nan))
    ]
    parts = {"worse": 0.8, "better": 0.6, "same": 0.1234564, "absent": None}
    learned = learn_largest(scores, [{name: {case: part} for name, part in parts.items()} for case in ("a", "b")])
    assert [name for name, entry in learned.items() if entry["kept"]] == ["better"]
    assert learned["worse"]["dice"] == pytest.approx(0.9) and learned["worse"]["dice_of_largest_part"] == 0.8


def test_the_largest_part_is_scored_of_the_label_map_that_is_written(data, tmp_path, monkeypatch):
    """A prediction with a speck: without it the label map is right."""

    def predict_case(network, image, entry, settings):
        labels = Store(data / "store").read_label(entry.id).copy()
        labels[0, 0, 0] = 1
        return labels

    monkeypatch.setattr(held_out, "predict_case", predict_case)
    config = _config(data, tmp_path / "run", folds=2, steps=1, val_every=1)
    assert command.run(config) == 0
    entry = summary(tmp_path / "run")["largest_part"]["box"]
    assert entry["kept"] and entry["dice_of_largest_part"] == 1 and 0.99 < entry["dice"] < 1
    assert learned_largest(tmp_path / "run") == ("box",)


def test_folds_keep_the_minutes_with_which_they_began_on_other_gpus(tmp_path, monkeypatch):
    """Of 30 minutes a fold has 10 where two of five are trained at once, and 6 where one is."""
    config = _config(tmp_path, tmp_path / "run", steps=None, max_minutes=30.0, folds=5, resume=True)

    def minutes(at_once, **changes):
        networks = networks_of(dataclasses.replace(config, **changes), tmp_path / "run", at_once)
        return [network.flags.max_minutes for network in networks]

    assert minutes(2) == [10.0] * 5 and minutes(1) == [6.0] * 5
    begun = tmp_path / "run" / "fold_1"
    (begun / "checkpoints" / "last" / "model").mkdir(parents=True)
    (begun / "run.json").write_text(json.dumps({"configuration": {"max_minutes": 10.0}}))
    assert minutes(1) == [6.0, 10.0, 6.0, 6.0, 6.0] and minutes(2) == [10.0] * 5
    # Of what is left to the others it takes no more than a fold that begins now.
    (begun / "checkpoints" / "last" / "config.json").write_text(json.dumps({"model": {}, "seconds_spent": 600.0}))
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: 5.0))
    assert runs._after(Clock(5.0, 1800.0), networks_of(config, tmp_path / "run")[1]).seconds == 1440
    # No share of other minutes: the run then says that they differ.
    assert minutes(1, max_minutes=35.0) == [7.0] * 5


def test_folds_share_the_time_and_leave_some_for_their_report(tmp_path, monkeypatch):
    now, calls = [100.0], []

    def one(training, folder, config, clock, skip_finished):
        calls.append((folder.name, config.max_minutes, config.fold, *clock))
        now[0] += 150.0
        return TrainResult(folder, "ended", (0, 143)[len(calls) - 1])

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.Training, "_train_one", one)
    config = _config(tmp_path, tmp_path / "run", steps=None, max_minutes=8.0, folds=4)
    assert command.run(config, 95.0) == 143
    assert calls == [("fold_0", 2.0, 0, 95.0, 475.0, 4, False), ("fold_1", 2.0, 1, 250.0, 320.0, 3, False)]
