"""How Pallas Mosaic GPU kernels are traced and started, and interpreted in tests."""

import contextlib
import contextvars
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.lib.mlir import ir
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


def launch(body: Callable, name: str, sizes: Any, *, approx_math: bool = False, **arguments: Any) -> Callable:
    """`plgpu.kernel` with the settings that all kernels share; `sizes` and the arrays' types decide the body."""

    def run(*arrays: jax.Array):
        label = (
            f"{name}_{zlib.crc32(repr((sizes, approx_math, [(a.shape, a.dtype.name) for a in arrays])).encode()):08x}"
        )

        def named(*refs):
            if not interpreting():
                _name_module(label)
            body(*refs)

        named.__name__ = named.__qualname__ = name  # what profilers show
        kernel = plgpu.kernel(
            named,
            interpret=_INTERPRETER.get(),
            compiler_params=plgpu.CompilerParams(
                # Every access to shared memory that another thread made is ordered by an explicit barrier.
                unsafe_no_auto_barriers=True,
                approx_math=approx_math,
                # Warpgroup semantics searches layouts by backtracking and takes minutes for the scan's backward kernel.
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            **arguments,
        )
        return kernel(*arrays)

    return run


def _name_module(label: str) -> None:
    """Give the module a name of its own: JAX would number it, and equal programs would differ in what caches see."""

    @plgpu.inline_mgpu()
    def rename(_):
        operation = ir.InsertionPoint.current.block.owner
        while operation.parent is not None:
            operation = operation.parent
        operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(label)

    rename()
