"""One training process with a small network: python -m tests.training.train_process FLAGS OF train.py."""

import os
import sys

from mambahome_jax.config import MODEL_SIZES, ModelSize
from tests.commands.test_train import StandIn


def main() -> int:
    """Exit code of the run. The process sends itself signal DIE_BY when it fetches its batch number DIE_AT."""
    from mambahome_jax.cli import run_command
    from mambahome_jax.training import train as training

    training.MambaHoME = StandIn
    MODEL_SIZES["MambaHoME_tiny"] = ModelSize(
        MODEL_SIZES["MambaHoME_tiny"].model, lr=1e-2, eps=1e-8, strong_lr=1e-2, patch_size=(32, 16, 16)
    )
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
