"""How every kernel is started: grid, semantics, buffers."""

from typing import NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.mosaic.interpret import parameters
from mambahome_kernels.selective_scan.mosaic_gpu.lanes import TILE, WARP, WARPS


class Options(NamedTuple):
    """What tuning turns: tiles in flight, steps unrolled, the compiler's approximate exp2 and rsqrt."""

    slots: int = 2
    unroll: int = 2
    approx_math: bool = True


def tile_buffer(like: jax.Array, slots: int, width: int = WARP, span: int = 1):
    return plgpu.SMEM((slots * WARPS, span * TILE, width), like.dtype)


def launch(kernel, options: Options, *, groups: int, batch: int, out_type, scratch_types):
    """The kernel as a function of arrays, over blocks of four warps."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(groups, batch),
        grid_names=("group", "batch"),
        interpret=parameters(),
        compiler_params=plgpu.CompilerParams(
            # Every access to shared memory that another thread made is ordered by an explicit barrier.
            unsafe_no_auto_barriers=True,
            approx_math=options.approx_math,
            # Warpgroup semantics searches layouts by backtracking and takes minutes for the backward kernel.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
