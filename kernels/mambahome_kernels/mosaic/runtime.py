"""How Pallas Mosaic GPU kernels are traced, compiled ahead of XLA, and interpreted in tests."""

import contextlib
import contextvars
import io
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import func
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core
from jax.interpreters import mlir

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
        if interpreting():
            return kernel(*arrays)
        types, tree = jax.tree.flatten(arguments["out_type"])
        return jax.tree.unflatten(tree, _kernel_p.bind(*arrays, kernel=kernel, types=tuple(types)))

    return run


# A kernel as a primitive of its own: its lowering is where the kernel's code is complete and its compilation can begin.
_kernel_p = core.Primitive("mosaic_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_impl(lambda *arrays, kernel, types: jax.tree.leaves(jax.jit(kernel)(*arrays)))
_kernel_p.def_abstract_eval(lambda *_, kernel, types: [jax.core.ShapedArray(t.shape, t.dtype) for t in types])


def _lower(context, *arrays, kernel: Callable, types: tuple):
    block = ir.InsertionPoint.current.block
    already = len(block.operations)
    results = mlir.lower_fun(lambda *arrays: jax.tree.leaves(kernel(*arrays)), multiple_results=True)(context, *arrays)
    for operation in list(block.operations)[already:]:
        if operation.name == "stablehlo.custom_call":
            _compile_ahead(operation)
    return results


mlir.register_lowering(_kernel_p, _lower)
_AHEAD: dict[str, Future] = {}  # by kernel; what is compiled is kept as long as the process
_THREADS = ThreadPoolExecutor(os.cpu_count(), "mosaic")


def _compile_ahead(call: Any) -> None:
    """Start to compile the kernel of a custom call, where its device is here.

    XLA compiles the kernels of a program one after another, half a second each, but takes those that it has met in
    any program from a cache: a small program of the one call brings it there, while the rest is traced and lowered.
    """
    device = default_device()
    client = getattr(device, "client", None)
    key = str(call.attributes["mhlo.backend_config"]["kernel_hash"])
    if device.platform != "gpu" or client is None or key in _AHEAD:
        return
    function: Any = func.FuncOp
    with ir.Location.unknown(call.context):
        module = ir.Module.create()
        module.operation.attributes["sym_name"] = ir.StringAttr.get("kernel")
        with ir.InsertionPoint(module.body):

            @function.from_py_func(*(value.type for value in call.operands), name="main")
            def main(*arguments):
                copy = call.operation.clone().operation
                for index, argument in enumerate(arguments):
                    copy.operands[index] = argument
                return list(copy.results)

        code = io.BytesIO()
        module.operation.write_bytecode(code)
    _AHEAD[key] = _THREADS.submit(client.compile_and_load, code.getvalue(), [device])


def _name_module(label: str) -> None:
    """Give the module a name of its own: JAX would number it, and equal programs would differ in what caches see."""

    @plgpu.inline_mgpu()
    def rename(_):
        operation = ir.InsertionPoint.current.block.owner
        while operation.parent is not None:
            operation = operation.parent
        operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(label)

    rename()
