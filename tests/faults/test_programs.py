"""Every fault: damaged files, kills, disks and growing memory, twenty minutes on two cores. `make faults` runs it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# The longest first.
PROGRAMS = [
    ["kill_commands", "--kills", "18"],
    ["kill_training", "--kills", "10"],
    ["fuzz_files", "--count", "1000"],
    ["fuzz_others", "--count", "50"],
    ["memory", "infer", "--count", "50"],
    ["memory", "train", "--count", "5000"],
]


@pytest.mark.faults
@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_no_fault_is_found(program):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = [sys.executable, "-m", f"tests.faults.{program[0]}", *program[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:], done.stderr[-3000:])
    assert done.returncode == 0
