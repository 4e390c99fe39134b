"""Whether kernels are traced for Pallas' interpreter on the CPU, as the tests do."""

import contextlib
import contextvars
from collections.abc import Iterator

from jax.experimental.pallas import mosaic_gpu as plgpu

_PARAMS: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar("params", default=None)


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Within, kernels that are traced run in the interpreter: right values, far too slow for use."""
    token = _PARAMS.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _PARAMS.reset(token)


def interpreting() -> bool:
    return _PARAMS.get() is not None


def parameters() -> plgpu.InterpretGPUParams | None:
    return _PARAMS.get()
