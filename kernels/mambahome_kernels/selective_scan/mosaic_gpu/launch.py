"""How every kernel is started: grid, semantics, interpretation on a CPU for tests."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.selective_scan.mosaic_gpu.lanes import LANES, TILE, Sizes

_INTERPRET: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar("interpret", default=None)


class Options(NamedTuple):
    """What tuning turns: buffers in flight, steps unrolled, the compiler's approximate exp2 and rsqrt."""

    slots: int = 2
    unroll: int = 2
    approx_math: bool = True


@contextlib.contextmanager
def interpreted(detect_races: bool = True) -> Iterator[None]:
    """Within, kernels that are traced run in Pallas' interpreter on the CPU: right values, far too slow for use."""
    token = _INTERPRET.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def interpreting() -> bool:
    return _INTERPRET.get() is not None


def tile_buffer(like: jax.Array, slots: int, width: int = LANES):
    return plgpu.SMEM((slots, TILE, width), like.dtype)


def launch(kernel, sizes: Sizes, options: Options, *, out_type, scratch_types, grid=None, grid_names=None):
    """The kernel as a function of arrays, over a grid of (chunk, block, batch) unless another is given."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid or (sizes.chunks, sizes.blocks, sizes.batch),
        grid_names=grid_names or ("chunk", "block", "batch"),
        interpret=_INTERPRET.get(),
        compiler_params=plgpu.CompilerParams(
            # Every access to shared memory that another thread made is ordered by an explicit barrier.
            unsafe_no_auto_barriers=True,
            approx_math=options.approx_math,
            # Warpgroup semantics searches layouts by backtracking and did not end within minutes for the backward kernel.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
