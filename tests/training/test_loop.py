"""The loop on a small network: what it writes, how it stops, and that a resumed run is the same run, bit by bit."""

import csv
import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from mambahome_jax.errors import TrainingError
from mambahome_jax.recipes import AugmentationConfig, OptimizerConfig
from mambahome_jax.training.callbacks import following, run_files
from mambahome_jax.training.checkpoints import CheckpointWriter, restore_state
from mambahome_jax.training.distributed import make_mesh
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.progress import Display
from mambahome_jax.training.schedule import Schedule
from mambahome_jax.training.step import abstract_state, init_state, make_train_step
from mambahome_jax.training.train import TrainingRun, train
from mambahome_jax.training.validation import Validation
from mambahome_jax.weights.checkpoint import read_checkpoint_config, read_checkpoint_params
from tests.training.stand_in import SmallNet

CASES = ("anna", "bert", "carl")
MESH = make_mesh(jax.devices()[:1])
GRAPHDEF, _ = nnx.split(nnx.eval_shape(SmallNet))
CONFIG = OptimizerConfig(lr=1e-2, steps_per_period=2, t_max=3)
OPTIMIZER = make_optimizer(CONFIG)
STEP = make_train_step(GRAPHDEF, OPTIMIZER, dice_ce, MESH, 0, AugmentationConfig(noise_probability=1.0))


class Batches:
    """As the loader's iterator: position n gives the same batch whenever it is asked for."""

    def __init__(self, at=0, poison=None, signal_at=None, number=signal.SIGTERM):
        self.at, self.poison, self.signal_at, self.number = at, poison, signal_at, number

    def __next__(self):
        rng = np.random.default_rng(self.at)
        image = rng.normal(size=(2, 6, 6, 4, 1)).astype(np.float32)
        if self.at == self.poison:
            image[1] = np.nan
        if self.at == self.signal_at:
            os.kill(os.getpid(), self.number)
        self.at += 1
        return {
            "image": image,
            "label": (image[..., 0] > 0).astype(np.int32),
            "case": np.array([self.at % 3, 2], np.int32),
        }

    def get_state(self):
        return {"at": self.at}


def _state():
    params = nnx.to_pure_dict(nnx.state(SmallNet()))
    return init_state(params, OPTIMIZER, MESH)


def _train(folder, steps=6, state=None, batches=None, validate=None, config=None, **plan):
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    schedule = Schedule(CONFIG, steps, steps_per_epoch=2, val_every=plan.pop("val_every", steps), **plan)
    display = Display(Console(file=text), schedule)
    run = TrainingRun.resumed(
        config or {},
        folder=folder,
        settings={"model": {}, "training": {}},
        schedule=schedule,
        display=display,
        mesh=MESH,
        case_ids=CASES,
        validate=validate,
        callbacks=[*run_files(), display],
    )
    with following(run.callbacks, folder, {}, run.step, lambda: run.status), run.display:
        state = train(state or _state(), batches or Batches(), STEP, run)
    return state, run, text.getvalue()


def _resume(folder, **settings):
    state, data = restore_state(
        folder / "last", abstract_state(nnx.to_pure_dict(nnx.state(SmallNet())), OPTIMIZER), MESH
    )
    config = read_checkpoint_config(folder / "last")
    return _train(folder, state=state, batches=Batches(**data), config=config, **settings)


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(("number", "stopped_after"), [(signal.SIGTERM, 3), (signal.SIGINT, 3)])
def test_stopped_and_resumed_is_bit_equal_to_straight(tmp_path, number, stopped_after):
    straight, _, _ = _train(tmp_path / "straight")
    before = signal.getsignal(number)
    # The batch at position 3 is fetched while step 3 runs.
    stopped, run, text = _train(tmp_path / "run", batches=Batches(signal_at=3, number=number))
    assert run.signal == number and run.step == stopped_after == int(stopped.step)
    assert "writing a checkpoint" in text and signal.getsignal(number) is before
    assert read_checkpoint_config(tmp_path / "run" / "last")["step"] == 3
    resumed, run, _ = _resume(tmp_path / "run")
    assert run.signal is None
    _assert_equal(resumed, straight)
    a, b = _rows(tmp_path / "straight"), _rows(tmp_path / "run")
    assert [row["step"] for row in b] == [str(n) for n in range(1, 7)]
    for name in ("step", "epoch", "loss", "lr", "grad_norm", "update_norm"):
        assert [row[name] for row in a] == [row[name] for row in b]


def test_resume_from_a_checkpoint_that_is_behind_the_metrics(tmp_path):
    straight, _, _ = _train(tmp_path / "straight")
    # As after kill -9 in step 5: metrics of step 5 are there, the last checkpoint is of step 4.
    with pytest.raises(TrainingError):
        _train(tmp_path / "run", batches=Batches(poison=5), checkpoint_every=2)
    resumed, _, _ = _resume(tmp_path / "run")
    _assert_equal(resumed, straight)
    assert [row["step"] for row in _rows(tmp_path / "run")] == [str(n) for n in range(1, 7)]


def test_metrics_are_on_the_disk_before_the_checkpoint_that_a_killed_run_resumes_from(tmp_path, monkeypatch):
    seen, save = [], CheckpointWriter.save

    def watched(writer, folder, state, config, *rest):
        if folder.name == "last":
            seen.append((config["step"], len(_rows(tmp_path / "run"))))
        save(writer, folder, state, config, *rest)

    monkeypatch.setattr(CheckpointWriter, "save", watched)
    _train(tmp_path / "run", checkpoint_every=2)
    assert seen == [(2, 2), (4, 4), (6, 6)]


def test_numbers_that_are_not_finite_stop_with_step_and_cases(tmp_path):
    with pytest.raises(TrainingError, match=r"step 4: .*loss is nan.*cases of this batch: bert, carl"):
        _train(tmp_path / "run", batches=Batches(poison=3), checkpoint_every=1)
    assert read_checkpoint_config(tmp_path / "run" / "last")["step"] == 3
    for leaf in jax.tree.leaves(read_checkpoint_params(tmp_path / "run" / "last")):
        assert np.isfinite(leaf).all()


def test_best_follows_the_score_and_validation_joins_the_metrics(tmp_path):
    scores = iter([0.3, 0.7, 0.5])
    seen = []

    def validate(params, stop):
        seen.append(jax.device_get(params))
        score = next(scores)
        picture = np.full((8, 12, 3), 255 * len(seen) // 3, np.uint8)
        return Validation(score, {"liver": score, "spleen": float("nan")}, (("dora", "damaged"),), picture=picture)

    _, run, text = _train(tmp_path / "run", validate=validate, val_every=2)
    assert run.best == {"step": 4, "val_dice": 0.7}
    assert run.failures == {"dora": "damaged"}
    _assert_equal(read_checkpoint_params(tmp_path / "run" / "best"), seen[1])
    assert read_checkpoint_config(tmp_path / "run" / "best")["step"] == 4
    config = read_checkpoint_config(tmp_path / "run" / "last")
    assert config["step"] == 6 and config["epoch"] == 3 and config["best"] == {"step": 4, "val_dice": 0.7}
    assert [row["val_dice"] for row in _rows(tmp_path / "run")] == ["", "0.3", "", "0.7", "", "0.5"]
    assert "step 4: validation Dice 0.7000 in " in text and "  liver   0.700  +0.400\n  spleen  nan\n" in text
    (board,) = (tmp_path / "run" / "tensorboard").iterdir()
    # PNG pictures inside, one a validation.
    assert board.read_bytes().count(b"\x89PNG") == 3
    assert not (tmp_path / "run" / "last" / "optimizer").is_symlink() and not list(tmp_path.rglob("*.partial*"))


def test_validation_is_made_up_for_when_a_stop_prevented_it(tmp_path):
    calls = []

    def stopping(params, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return None if stop() else pytest.fail("the stop was not seen")

    def validate(params, stop):
        calls.append(1)
        return Validation(0.5, {})

    _, run, _ = _train(tmp_path / "run", validate=stopping, val_every=2)
    assert run.step == 2 and run.best is None
    _, run, _ = _resume(tmp_path / "run", validate=validate, val_every=2)
    assert len(calls) == 3 and run.best == {"step": 2, "val_dice": 0.5}
    rows = _rows(tmp_path / "run")
    assert [row["val_dice"] for row in rows] == ["", "0.5", "", "0.5", "", "0.5"]
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 7)] and all(row["loss"] for row in rows)


def test_validation_happens_at_the_end_and_best_is_written_without_cases(tmp_path):
    calls = []
    _train(tmp_path / "a", steps=3, validate=lambda *_: calls.append(1) or Validation(float("nan"), {}), val_every=2)
    assert len(calls) == 2
    assert read_checkpoint_config(tmp_path / "a" / "best")["best"] == {"step": 3, "val_dice": None}
    _train(tmp_path / "b", steps=3)
    assert read_checkpoint_config(tmp_path / "b" / "best")["step"] == 3


def test_a_finished_run_resumes_to_nothing(tmp_path):
    state, _, _ = _train(tmp_path / "run", steps=2)
    again, _, _ = _resume(tmp_path / "run", steps=2)
    _assert_equal(state, again)


def test_config_of_a_checkpoint_is_json_with_the_run_in_it(tmp_path):
    _train(tmp_path / "run", steps=2)
    content = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert content["step"] == 2 and content["validated_until"] == 2 and content["model"] == {}
