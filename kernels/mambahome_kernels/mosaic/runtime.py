"""For which device Pallas Mosaic GPU kernels are traced, and whether they are interpreted in tests."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_CORES = 132  # of an H100 and an H200
_INTERPRETER: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar("params", default=None)


def default_device() -> jax.Device:
    """That of jax.default_device, else the first."""
    chosen = getattr(jax.config, "jax_default_device", None)
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]


def core_count() -> int:
    """Number of multiprocessors of the default device."""
    return getattr(default_device(), "core_count", None) or _CORES


def why_not_hopper(newer: bool) -> str | None:
    """Why kernels for Hopper GPUs (and newer ones, with `newer`) cannot run on the default device, else None."""
    if interpreting():
        return None
    device = default_device()
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    if major == "9" or (newer and major.isdigit() and int(major) > 9):
        return None
    return f"it needs a GPU of compute capability 9.0 (Hopper){' or newer' * newer}, and this one has {capability}"


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Run kernels traced within in Pallas' interpreter on the CPU: right values, far too slow for use."""
    token = _INTERPRETER.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _INTERPRETER.reset(token)


def interpreting() -> bool:
    return _INTERPRETER.get() is not None


def interpreter() -> plgpu.InterpretGPUParams | None:
    return _INTERPRETER.get()


def traced_once(*static: str) -> Callable:
    """Trace and lower once for each shape, whatever the number of layers: it takes seconds."""

    def decorate(function: Callable) -> Callable:
        jitted = jax.jit(function, static_argnames=static)

        def call(*args, **kwargs):
            # The kernels count in 32 bits. What the interpreter traces must not be taken for the kernel, or the other
            # way round.
            with jax.enable_x64(False):
                return (function if interpreting() else jitted)(*args, **kwargs)

        return call

    return decorate
