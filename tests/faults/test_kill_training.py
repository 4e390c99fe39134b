"""A training killed with -9 and resumed ends with the bits of one that was not; the script does it more often."""

import sys

import pytest

from tests.faults.kill_training import kill_training


@pytest.mark.slow
def test_killed_twice_and_resumed_ends_with_the_same_bits(tmp_path):
    program = (sys.executable, "-m", "tests.training.train_process")
    result = kill_training(tmp_path, kills=2, steps=60, program=program, seed=1)
    assert len(result["kills"]) == 2 and result["different"] == []
