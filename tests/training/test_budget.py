"""A run that has to end in time, on a clock that the test moves."""

import contextlib
import io

import numpy as np
import pytest
from rich.console import Console

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.callbacks import following, run_files
from mambahome_jax.training.progress import Display
from mambahome_jax.training.schedule import Schedule, TimeBudget, learning_rate
from mambahome_jax.training.train import TrainingRun, train
from mambahome_jax.training.validation import Validation
from mambahome_jax.weights.checkpoint import read_checkpoint_config
from tests.training.test_loop import CASES, CONFIG, MESH, STEP, Batches, _state


class Clock:
    """Seconds that pass only where the test says so."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def _run(
    folder,
    seconds,
    step=10.0,
    compile_time=0.0,
    validation=40.0,
    saving=0.0,
    spent_before=0.0,
    to_first_step=None,
    val_every=None,
    from_first_step=False,
):
    """A run in which each step, validation, saving takes so long: clock, rates, times of validations, progress.

    validation: None: no case to validate on; the times are then those of the checkpoints.
    """
    folder.mkdir(exist_ok=True)
    clock, rates, validated, saved = Clock(5.0), [], [], []

    def train_step(state, batch, rate):
        clock.now += step + (0 if rates else compile_time)
        state, metrics = STEP(state, batch, rate)
        rates.append(float(metrics["lr"]))
        return state, metrics

    def validate(params, stop):
        for _ in range(4):
            if stop():
                return None
            clock.now += validation / 4
        validated.append(clock.now - 5.0)
        return Validation(0.5, {"box": 0.5})

    class SlowDisk(TimeBudget):
        @contextlib.contextmanager
        def saving(self):
            with super().saving():
                yield
                clock.now += saving
                saved.append(clock.now - 5.0)

    budget = SlowDisk(seconds, 5.0, spent_before, to_first_step, from_first_step=from_first_step, clock=clock)
    schedule = Schedule(CONFIG, None, steps_per_epoch=2, val_every=val_every, budget=budget)
    display = Display(Console(file=io.StringIO()), schedule)
    run = TrainingRun(folder, {"model": {}, "training": {}}, schedule, display, MESH, CASES)
    run.validate = None if validation is None else validate
    run.callbacks = [*run_files(), display]
    with following(run.callbacks, folder, {}, 0, lambda: run.status), display:
        train(_state(), Batches(), train_step, run)
    return clock.now - 5.0, rates, saved if validation is None else validated, run


@pytest.mark.parametrize("earlier", [{}, {"spent_before": 700.0, "to_first_step": 0.0}], ids=["new", "resumed"])
def test_minutes_from_the_first_step_leave_compiling_out(tmp_path, earlier):
    ends, updates = [], []
    for seconds in (0, 300):
        given = {"seconds": 1000, "compile_time": seconds, "from_first_step": True} | earlier
        end, rates, _, _ = _run(tmp_path / str(seconds), **given)
        ends.append(end)
        updates.append(len(rates))
    assert ends[1] - ends[0] == 300 and updates[0] == updates[1] > 10
    assert read_checkpoint_config(tmp_path / "300" / "last")["seconds_spent"] <= 1000


def test_the_run_ends_in_time_with_a_validation_of_its_last_step(tmp_path):
    end, rates, validated, run = _run(tmp_path, seconds=1000, compile_time=100)
    assert 930 <= end <= 1000
    # The first one at a fifth of the time for training, the last at the end; 40 s each.
    assert len(validated) >= 2 and 300 <= validated[0] <= 360 and validated[-1] == end
    assert run.validated_until == run.step == len(rates)
    for name in ("best", "last"):
        config = read_checkpoint_config(tmp_path / name)
        assert config["seconds_spent"] <= 1000
    assert read_checkpoint_config(tmp_path / "last")["step"] == len(rates)


def test_checkpoints_that_take_longer_than_the_validations_leave_the_time_to_the_steps(tmp_path):
    """With ten cases to validate on, every step was once followed by a validation of 0.1 s and 1 s of saving."""
    end, rates, validated, _ = _run(tmp_path, seconds=1000, step=2.0, validation=0.4, saving=3.0)
    assert 960 <= end <= 1000
    assert len(rates) * 2.0 >= 0.9 * end
    assert len(validated) >= 6


def test_without_cases_to_validate_on_checkpoints_take_a_twentieth_of_the_time(tmp_path):
    """From a fifth of the time on, every step was once followed by a checkpoint."""
    end, rates, saved, run = _run(tmp_path, seconds=1000, step=5.0, validation=None, saving=2.0)
    assert 970 <= end <= 1000 and len(rates) > 176
    assert 190 <= saved[0] <= 215 and 10 <= len(saved) <= 22
    assert run.best == {"step": len(rates), "val_dice": None}


def test_the_rate_follows_the_time_that_compilation_leaves(tmp_path):
    """Half of three minutes went by before the first step, which then began with half of the learning rate."""
    _, rates, _, _ = _run(tmp_path, seconds=1000, compile_time=500, validation=20, val_every=10_000)
    # The rate of step n is set when the step before has been started, 10 s each; the first is seen to end after 520 s.
    times = np.array([0, 0, *(10 * np.arange(38))])
    expected = 1e-2 * (1 + np.cos(np.pi * times / 480)) / 2
    np.testing.assert_allclose(rates[:40], expected, rtol=1e-5)
    assert rates[-1] < 1e-2 * 0.03
    assert read_checkpoint_config(tmp_path / "last")["seconds_to_first_step"] == 520


def test_a_resumed_run_goes_on_with_the_time_already_spent(tmp_path):
    end, rates, validated, _ = _run(tmp_path, seconds=1000, spent_before=700, to_first_step=200)
    assert end <= 300 and validated[-1] == end
    np.testing.assert_allclose(rates[0], 1e-2 * (1 + np.cos(np.pi * 500 / 800)) / 2, rtol=1e-5)
    again, rates, _, _ = _run(tmp_path, seconds=1000, spent_before=1000, to_first_step=200)
    assert again == 0 and rates == []


def test_the_first_of_several_networks_takes_its_part_of_what_its_first_step_leaves():
    clock = Clock()
    budget = TimeBudget(480, 0.0, parts=3, clock=clock)
    clock.now = 90.0
    assert budget.fraction() == 0 and budget.left() == 390
    budget.step_ended()
    assert budget.seconds == 90 + 390 / 3 and budget.parts == 1
    clock.now = 155.0
    budget.step_ended()
    assert budget.fraction() == 0.5 and budget.seconds == 220


def test_no_time_is_left_for_training(tmp_path):
    end, rates, _, _ = _run(tmp_path, seconds=100, compile_time=200)
    assert end == 210 and len(rates) == 1 and read_checkpoint_config(tmp_path / "last")["step"] == len(rates)
    assert TimeBudget(100, 0.0, 150.0, 120.0, clock=Clock()).fraction() == 1


def test_a_validation_that_does_not_fit_is_given_up_and_checkpoints_are_there(tmp_path):
    end, _, validated, run = _run(tmp_path, seconds=100, compile_time=30, validation=4000)
    assert validated == [] and run.best == {"step": run.step, "val_dice": None}
    assert read_checkpoint_config(tmp_path / "best")["step"] == read_checkpoint_config(tmp_path / "last")["step"]
    assert end < 1100


def test_the_last_validation_may_be_slower_than_a_step(tmp_path):
    """One of 0.1 s was given up in a run on a GPU, where a step of 0.05 s took a little longer than those before it."""
    clock = Clock()
    budget = TimeBudget(240, 0.0, clock=clock)
    with budget.validating():
        clock.now += 0.1
    with budget.saving():
        clock.now += 2.0
    while not budget.decide().last:
        clock.now += 0.05
        budget.step_ended()
    clock.now += 0.8
    assert not budget.must_save() and budget.left() > 2.0


def test_validations_at_steps_that_the_user_asked_for(tmp_path):
    _, rates, validated, _ = _run(tmp_path, seconds=400, validation=10, val_every=10)
    assert validated[:2] == [110, 220] and len(rates) > 30


def test_the_time_left_counts_validations_and_held_out_scores_and_falls_evenly():
    clock, rng = Clock(), np.random.default_rng(0)
    budget = TimeBudget(clock=clock)
    budget.validation_steps, budget.held_out = 3.0, 2.0
    schedule = Schedule(CONFIG, 105, steps_per_epoch=5, val_every=10, budget=budget)
    clock.now += 240  # the first step compiles
    ends = []

    def expect(step, validated):
        left = schedule.seconds_left(step, validated)
        ends.append(clock.now + left if left is not None else np.nan)

    for step in range(1, 106):
        clock.now += rng.uniform(8, 12) + (15 if step % 7 == 0 else 0)  # data that come late
        budget.step_ended()
        expect(step, validated=False)
        if schedule.validates(step):
            with budget.validating():
                clock.now += 40 + (10 if step == 10 else 0)  # compiled beside the steps, but for small programs
            budget.expect_validation(40)
            with budget.saving():
                clock.now += 2
            expect(step, validated=True)
    clock.now += 2 * 2 * 40 + 5
    # Not known after the first step; soon within a tenth, and never more than a twentieth from one step to the next.
    assert np.isnan(ends[0]) and not np.isnan(ends[1])
    errors = np.array(ends[8:]) / clock.now - 1
    assert np.abs(errors).max() < 0.1 and np.abs(errors[-40:]).max() < 0.02
    assert np.abs(np.diff(errors)).max() < 0.05
    assert schedule.seconds_left(105, validated=True) == 2 * 2 * 40 + 5


def test_a_single_case_whose_first_validation_compiles_does_not_tell_how_long_the_others_take():
    clock = Clock()
    budget = TimeBudget(clock=clock)
    budget.validation_steps = 2.0
    for _ in range(3):
        clock.now += 10
        budget.step_ended()
    with budget.validating():
        clock.now += 500
    assert budget.expected(steps=5, validations=4) == 5 * 10 + 4 * 2 * 10
    with budget.validating():
        clock.now += 30
    assert budget.expected(steps=5, validations=4) == 5 * 10 + 4 * 30


def test_the_time_left_of_a_budget_is_what_is_left_of_it():
    clock = Clock()
    schedule = Schedule(CONFIG, None, steps_per_epoch=5, val_every=None, budget=TimeBudget(100.0, clock=clock))
    clock.now = 30.0
    assert schedule.seconds_left(7, validated=False) == 70
    # The bar tells it while the first step is compiled.
    with Display(Console(file=io.StringIO()), schedule) as display:
        assert 69 < display.seconds_left() <= 70
    clock.now = 130.0
    assert schedule.seconds_left(9, validated=True) == 0


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0, 1.2])
def test_cosine_over_the_fraction_with_warm_up_by_steps(fraction):
    config = OptimizerConfig(lr=2e-3, warmup_steps=4)
    cosine = 2e-3 * (1 + np.cos(np.pi * min(fraction, 1))) / 2
    for count, factor in ((0, 0.25), (1, 0.5), (3, 1.0), (90, 1.0)):
        rate = learning_rate(config, fraction, count)
        np.testing.assert_allclose(rate, cosine * factor, rtol=1e-5, atol=1e-10)
