"""From every chunk's state out of a zero start to the true state before it: one step a chunk, all states side by side."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mambahome_kernels.selective_scan.mosaic_gpu.lanes import F32, LANES, Sizes
from mambahome_kernels.selective_scan.mosaic_gpu.launch import Options, launch

_GROUP = 8  # chunks read together, to hide the latency of memory


def carry_over(sizes: Sizes, total, local, edge, rates, options: Options, reverse: bool = False):
    """State entering each chunk (batch, chunks, d_state, channels), and the one that leaves the last.

    total (batch, chunks, channels): sum of delta; local, like the result: state after a chunk from zero; edge
    (batch, d_state, channels): state that enters the first chunk. In reverse, the last chunk is the first.
    """
    s = sizes

    def kernel(total, local, edge, rates, before, after):
        state, block, batch = (lax.axis_index(name) for name in ("state", "block", "batch"))
        channels = pl.ds(block * LANES, LANES)
        rate = rates[state, channels]

        def group(first, count, h):
            where = [s.chunks - 1 - (first + j) if reverse else first + j for j in range(count)]
            decays = [total[batch, k, channels] for k in where]
            locals_ = [local[batch, k, state, channels] for k in where]
            for k, decay, own in zip(where, decays, locals_, strict=True):
                before[batch, k, state, channels] = h
                h = jnp.exp2(decay * rate) * h + own
            return h

        whole = s.chunks // _GROUP
        h = edge[batch, state, channels]
        h = lax.fori_loop(0, whole, lambda g, h: group(g * _GROUP, _GROUP, h), h)
        h = group(whole * _GROUP, s.chunks % _GROUP, h)
        after[batch, state, channels] = h

    return launch(
        kernel,
        s,
        options,
        out_type=[jax.ShapeDtypeStruct(local.shape, F32), jax.ShapeDtypeStruct(edge.shape, F32)],
        scratch_types=[],
        grid=(s.d_state, s.blocks, s.batch),
        grid_names=("state", "block", "batch"),
    )(total, local, edge, rates)
