"""One training process with a small network: python -m tests.training.train_process FLAGS OF train.py."""

import os
import sys
from typing import Any

import pytest

from mambahome_jax.flags import TrainConfig
from tests.commands.test_train import small_networks
from tests.training.stand_in import steps_take


def train_fold(flags: TrainConfig, *others: Any) -> None:
    """A fold in a process of its own, which leaves behind which GPU it was given."""
    from mambahome_jax.training.side_by_side import train_apart

    small_networks(pytest.MonkeyPatch())
    (flags.output_dir / f"gpu_of_{flags.fold}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    train_apart(flags, *others)


def main() -> int:
    """Exit code of the run. The process sends itself signal DIE_BY when it fetches its batch number DIE_AT.

    STEPS_TAKE: seconds of each step on the clock that it then has; see `steps_take`.
    """
    from mambahome_jax.cli import run_command
    from mambahome_jax.training import train as training

    small_networks(pytest.MonkeyPatch())
    if "STEPS_TAKE" in os.environ:
        steps_take(pytest.MonkeyPatch(), float(os.environ["STEPS_TAKE"]))
    put, count = training.put_batch, [0]

    def counted(batch, mesh):
        count[0] += 1
        if count[0] == int(os.environ.get("DIE_AT", "0")):
            os.kill(os.getpid(), int(os.environ["DIE_BY"]))
        return put(batch, mesh)

    training.put_batch = counted
    return run_command("train", sys.argv[1:], "train.py")


if __name__ == "__main__":
    raise SystemExit(main())
