"""Callbacks and trackers of a training: what they are told, and that a tracker that fails stops nothing."""

import contextlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest

from mambahome_jax.errors import ConfigError
from mambahome_jax.training.callbacks import Callback, following, make_trackers, run_files
from mambahome_jax.training.validation import Validation

SCORES = Validation(0.5, {"left ventricle (LV)": 0.5, "aorta": float("nan")}, picture=np.zeros((8, 8, 3), np.uint8))
ROW = {"step": 1, "epoch": 1, "loss": 0.5, "lr": 1e-3, "images_per_second": None}


class Recorded(Callback):
    def __init__(self):
        self.told = []

    def run(self, folder, settings, step):
        self.told.append(("run", folder.name, settings["steps"], step))

    def step(self, row):
        self.told.append(("step", row["step"], row["loss"]))

    def validation(self, step, validation):
        self.told.append(("validation", step, validation.dice))

    def end(self, status):
        self.told.append(("end", status))


class Followed(Callback):
    """Tells others what it is told, and of a step again with its validation, as the loop does."""

    def __init__(self, followers):
        self.followers = followers

    def step(self, row, validation=None):
        for each in self.followers:
            each.step(row)
        if validation is not None:
            self.validation(row["step"], validation)

    def validation(self, step, validation):
        for each in self.followers:
            each.validation(step, validation)


@contextlib.contextmanager
def followed(folder, *callbacks, step=0):
    folder.mkdir(exist_ok=True)
    followers = [*run_files(("aorta",)), *callbacks]
    with following(followers, folder, {"steps": 2}, step, lambda: "finished"):
        yield Followed(followers)


def test_a_callback_is_told_what_the_files_are(tmp_path):
    one = Recorded()
    with followed(tmp_path / "run", one) as log:
        log.step(ROW)
        log.validation(1, SCORES)
        log.step(ROW | {"step": 2}, SCORES)
    start = ("run", "run", 2, 0)
    scored = [("validation", 1, 0.5), ("step", 2, 0.5), ("validation", 2, 0.5)]
    assert one.told == [start, ("step", 1, 0.5), *scored, ("end", "finished")]
    one.told.clear()
    with pytest.raises(KeyError), followed(tmp_path / "run", one, step=2):
        raise KeyError("case")
    assert one.told == [("run", "run", 2, 2), ("end", "KeyError: 'case'")]
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 3


class Wandb(types.ModuleType):
    """Its documented calls: init, Image, run.log, run.summary, run.finish."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.id, self.summary, self.Image = [], "abc", {}, lambda picture: picture.shape

    def init(self, **options):
        self.calls.append(("init", options["project"], options["name"], options.get("id"), options["config"]["steps"]))
        return self

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code, self.summary["status"]))


class Mlflow(types.ModuleType):
    """Its documented calls, each noted with its arguments."""

    def __init__(self):
        super().__init__("mlflow")
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, *args, *options.values()))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        return call


def stand_in(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return package


def test_wandb_goes_on_with_the_run_that_it_began(tmp_path, monkeypatch):
    package = stand_in(monkeypatch, Wandb())
    for step in (0, 1):
        with followed(tmp_path / "run", *make_trackers(("wandb", "wandb"), print), step=step) as log:
            log.step(ROW | {"step": step + 1}, SCORES)
    numbers = {"epoch": 1, "loss": 0.5, "lr": 1e-3}
    logged = [[(n, numbers), (n, {"val_dice": 0.5, "dice_left ventricle (LV)": 0.5})] for n in (1, 2)]
    pictures = [(n, {"validation": (8, 8, 3)}) for n in (1, 2)]
    starts = [("init", "mambahome", "run", known, 2) for known in (None, "abc")]
    end = ("finish", 0, "finished")
    assert package.calls == [starts[0], *logged[0], pictures[0], end, starts[1], *logged[1], pictures[1], end]
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"wandb": "abc"}


def test_mlflow_gets_names_that_it_takes(tmp_path, monkeypatch):
    package = stand_in(monkeypatch, Mlflow())
    with followed(tmp_path / "run", *make_trackers(["mlflow"], print)) as log:
        log.step(ROW, SCORES)
    names = [call[0] for call in package.calls]
    logs = ["log_metrics", "log_metrics", "log_image"]
    assert names == ["set_experiment", "start_run", "log_params", *logs, "set_tag", "end_run"]
    assert package.calls[4][1:] == ({"val_dice": 0.5, "dice_left ventricle _LV_": 0.5}, 1, False)
    assert package.calls[-1] == ("end_run", "FINISHED")


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    package, said = stand_in(monkeypatch, Wandb()), []
    monkeypatch.setattr(package, "log", lambda values, step: 1 / 0)
    with followed(tmp_path / "run", *make_trackers(["wandb"], said.append)) as log:
        for step in (1, 2):
            log.step(ROW | {"step": step})
    assert said == ["--tracker wandb failed, and the training goes on without it: division by zero"]
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 3


def test_a_package_that_is_missing_is_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'mlflow is not installed. .*"mambahome-jax\[mlflow\]"'):
        make_trackers(["mlflow"], print)


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with followed(tmp_path / "run", *make_trackers(["wandb"], pytest.fail)) as log:
        log.step(ROW, SCORES)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_on_the_disk(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for step in (0, 1):
        with followed(tmp_path / "run", *make_trackers(["mlflow"], pytest.fail), step=step) as log:
            log.step(ROW | {"step": step + 1}, SCORES)
    mlflow.flush_async_logging()
    name = json.loads((tmp_path / "run/trackers.json").read_text())["mlflow"]
    run = mlflow.get_run(name)
    assert run.info.status == "FINISHED" and run.data.metrics["dice_left ventricle _LV_"] == 0.5
    history = mlflow.MlflowClient().get_metric_history(name, "loss")
    assert [metric.step for metric in history] == [1, 2]
