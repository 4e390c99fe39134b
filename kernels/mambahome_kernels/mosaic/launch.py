"""How Pallas Mosaic GPU kernels are started: compiled while the rest of a program is lowered, and lowered only once."""

import contextlib
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import func
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core
from jax.interpreters import mlir

from mambahome_kernels.mosaic.runtime import default_device, interpreter, interpreting


def launch(body: Callable, name: str, sizes: Any, *, approx_math: bool = False, **arguments: Any) -> Callable:
    """`plgpu.kernel` with the settings that all kernels share.

    The body may depend on nothing but name, `sizes`, and the types of the arrays and results.
    """
    results, tree = jax.tree.flatten(arguments["out_type"])

    def run(*arrays: jax.Array):
        capability = getattr(default_device(), "compute_capability", None)
        types = [[(a.shape, a.dtype.name) for a in side] for side in (arrays, results)]
        decided_by = repr((_sources(), capability, name, sizes, approx_math, types))
        label = f"{name}_{hashlib.sha256(decided_by.encode()).hexdigest()[:32]}"

        def named(*refs):
            if not interpreting():
                _name_module(label)
            body(*refs)

        named.__name__ = named.__qualname__ = name  # what profilers show
        kernel = plgpu.kernel(
            named,
            interpret=interpreter(),
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
        return jax.tree.unflatten(tree, _kernel_p.bind(*arrays, kernel=kernel, label=label, types=tuple(results)))

    return run


@functools.cache
def _sources() -> str:
    """Digest of what kernels are made of: this package and the versions of JAX."""
    digest = hashlib.sha256(f"{jax.__version__} {jaxlib.__version__}".encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _name_module(label: str) -> None:
    """Give the module a name of its own: JAX would number it, and equal programs would differ in what caches see."""

    @plgpu.inline_mgpu()
    def rename(_):
        operation = ir.InsertionPoint.current.block.owner
        while operation.parent is not None:
            operation = operation.parent
        operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(label)

    rename()


# A kernel as a primitive of its own: its lowering is where the kernel's code is complete and its compilation can begin.
_kernel_p = core.Primitive("mosaic_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_impl(lambda *arrays, kernel, **_: jax.tree.leaves(jax.jit(kernel)(*arrays)))
_kernel_p.def_abstract_eval(lambda *_, types, **__: [jax.core.ShapedArray(t.shape, t.dtype) for t in types])
_AHEAD: dict[str, Future] = {}  # by label; what is compiled is kept as long as the process
_THREADS = ThreadPoolExecutor(os.cpu_count(), "mosaic")


def _lower(context, *arrays, kernel: Callable, label: str, types: tuple):
    """Lower by Pallas, or take what an earlier process lowered: it takes some 0.3 s a kernel."""
    device = default_device()
    file = _file(label)
    program, module = _read(file)
    if module is None:
        block = ir.InsertionPoint.current.block
        already = len(block.operations)
        with jax.enable_x64(False), _ptxas_asked_once():  # indices are of 32 bits
            lower = mlir.lower_fun(lambda *arrays: jax.tree.leaves(kernel(*arrays)), multiple_results=True)
            results = lower(context, *arrays)
        calls = [o for o in list(block.operations)[already:] if o.name == "stablehlo.custom_call"]
        if len(calls) != 1:  # a later JAX lowers in a way of its own
            return results
        program = _program_of(calls[0])
        if file:
            _save(file, program)
    else:
        (main,) = module.body.operations
        results = _copy_call(main.regions[0].blocks[0].operations[0], arrays)
    client = getattr(device, "client", None)
    if device.platform == "gpu" and client is not None and label not in _AHEAD:
        # XLA compiles the kernels of a program one after another, half a second each, but takes those that it has met
        # in any program from a cache.
        _AHEAD[label] = _THREADS.submit(client.compile_and_load, program, [device])
    return results


mlir.register_lowering(_kernel_p, _lower)


@contextlib.contextmanager
def _ptxas_asked_once() -> Iterator[None]:
    """Pallas starts the assembler at each branch to ask for its version, which took more than a quarter of lowering."""
    bindings = getattr(getattr(fragmented_array, "mgpu_lib", None), "_mosaic_gpu_ext", None)
    asked = getattr(bindings, "_get_ptxas_isa_version", None)
    if bindings is None or asked is None:  # a later JAX may ask in a way of its own
        yield
        return
    bindings._get_ptxas_isa_version = _remembered(asked)
    try:
        yield
    finally:
        bindings._get_ptxas_isa_version = asked


_remembered = functools.cache(functools.cache)


def _program_of(call: Any) -> bytes:
    """A program of nothing but this call, as bytecode."""
    function: Any = func.FuncOp
    with ir.Location.unknown(call.context):
        module = ir.Module.create()
        module.operation.attributes["sym_name"] = ir.StringAttr.get("kernel")
        with ir.InsertionPoint(module.body):

            @function.from_py_func(*(value.type for value in call.operands), name="main")
            def main(*arguments):
                return _copy_call(call, arguments)

        code = io.BytesIO()
        module.operation.write_bytecode(code)
    return code.getvalue()


def _copy_call(call: Any, arguments: Any) -> list:
    copy = call.operation.clone().operation
    for index, argument in enumerate(arguments):
        copy.operands[index] = argument
    return list(copy.results)


def _file(label: str) -> Path | None:
    """Where the kernel is kept, beside JAX's compilation cache; None without one."""
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) / "mosaic" / f"{label}.mlirbc" if folder and "://" not in folder else None


def _read(file: Path | None) -> tuple[bytes, Any]:
    """The program in a file, as bytes and as a module: None where there is none or it is damaged."""
    if file is not None and file.is_file():
        with contextlib.suppress(OSError, ValueError, ir.MLIRError):
            program = file.read_bytes()
            return program, ir.Module.parse(program)
    return b"", None


def _save(file: Path, program: bytes) -> None:
    """Whole or not at all; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(program)
        Path(part.name).replace(file)
