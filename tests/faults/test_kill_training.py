"""A training killed with -9 and resumed ends with the bits of one that was not; the script does it more often."""

import sys

import pytest

from tests.faults.kill_duel import kill_duel
from tests.faults.kill_training import kill_training

PROGRAM = (sys.executable, "-m", "tests.training.train_process")


@pytest.mark.faults
def test_killed_twice_and_resumed_ends_with_the_same_bits(tmp_path):
    result = kill_training(tmp_path, kills=2, steps=60, program=PROGRAM, seed=1)
    assert len(result["kills"]) == 2 and result["different"] == []


@pytest.mark.slow
def test_a_cross_validation_killed_twice_ends_with_the_same_bits(tmp_path):
    result = kill_training(tmp_path, kills=2, steps=24, program=PROGRAM, seed=2, folds=2)
    assert len(result["kills"]) == 2 and result["different"] == []


@pytest.mark.faults
def test_a_cross_validation_killed_thirty_times_ends_with_the_same_bits(tmp_path):
    result = kill_training(tmp_path, kills=30, steps=60, program=PROGRAM, folds=3)
    assert len(result["kills"]) == 30 and result["different"] == []


@pytest.mark.faults
def test_a_duel_killed_ten_times_ends_with_the_same_scores(tmp_path):
    result = kill_duel(tmp_path, kills=10, steps=8)
    assert len(result["kills"]) == 10 and result["different"] == []
