"""A network small enough to train in a test, with the shapes of the real one, and a clock that the steps move."""

import functools
import time
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from mambahome_jax.model.layers import ChannelDropout
from mambahome_jax.training import runs, schedule, train


class SmallNet(nnx.Module):
    """(b, D, H, W, 1) -> (b, D, H, W, classes)."""

    def __init__(self, classes: int = 2, width: int = 16, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Conv(1, width, (3, 3, 3), rngs=rngs)
        self.middle = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)])
        self.last = nnx.Conv(width, classes, (1, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> jax.Array:
        x = jax.nn.relu(self.first(x))
        if dropout is not None:
            x = dropout(x, 0)
        for layer in self.middle:
            x = jax.nn.relu(layer(x))
        return self.last(x)


def steps_take(monkeypatch: pytest.MonkeyPatch, seconds: float) -> float:
    """Let time pass in steps alone, so many seconds each, whatever the machine does; the time at the start."""
    # A whole number, as sums of others are rounded, which decides where times are compared.
    start, put_batch = float(int(time.monotonic())), train.put_batch
    now = [start]

    def timed(batch, mesh):
        now[0] += seconds
        return put_batch(batch, mesh)

    monkeypatch.setattr(train, "put_batch", timed)
    monkeypatch.setattr(schedule, "TimeBudget", functools.partial(schedule.TimeBudget, clock=lambda: now[0]))
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    return start


def log_steps(log, folder, losses, validation=None, start=0):
    """Tell a callback of a run: step -> loss, and a validation of the last step."""
    log.run(folder, {}, start)
    for step, loss in losses.items():
        log.step({"step": step, "loss": loss})
    if validation:
        log.validation(step, validation)
    log.end("finished")
