"""From every chunk's state out of a zero start to the true state before it: one warp a state and 32 channels."""

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.selective_scan.mosaic_gpu.lanes import F32, WARPS, Sizes, workers, zeros
from mambahome_kernels.selective_scan.mosaic_gpu.launch import Options, launch

_GROUP = 8  # chunks read together, to hide the latency of memory


def carry_over(sizes: Sizes, total, local, edge, rates, options: Options, reverse: bool = False):
    """State entering each chunk (batch, chunks, d_state, channels), and the one that leaves the last.

    total (batch, chunks, channels): sum of delta; local, like the result: state after a chunk from zero; edge
    (batch, d_state, channels): state that enters the first chunk, None for zeros. In reverse, the last chunk is the
    first.
    """
    s = sizes
    given = [] if edge is None else [edge]

    def kernel(total, local, rates, *refs):
        *edge, before, after = refs
        for at in workers(s.units):
            state = at.major

            def group(first, count, h, at=at, state=state):
                where = [s.chunks - 1 - (first + j) if reverse else first + j for j in range(count)]
                deltas = [total[at.batch, k, at.channels] for k in where]
                own = [local[at.batch, k, state, at.channels] for k in where]
                rate = rates[state, at.channels]
                for k, delta, ends in zip(where, deltas, own, strict=True):
                    before[at.batch, k, state, at.channels] = h
                    h = jnp.exp2(delta * rate) * h + ends
                return h

            whole = s.chunks // _GROUP
            h = edge[0][at.batch, state, at.channels] if edge else zeros()
            h = lax.fori_loop(0, whole, lambda g, h, group=group: group(g * _GROUP, _GROUP, h), h)
            h = group(whole * _GROUP, s.chunks % _GROUP, h)
            after[at.batch, state, at.channels] = h

    return launch(
        kernel,
        options,
        groups=s.d_state * s.units // WARPS,
        batch=s.batch,
        out_type=[
            jax.ShapeDtypeStruct(local.shape, F32),
            jax.ShapeDtypeStruct((s.batch, s.d_state, s.channels), F32),
        ],
        scratch_types=[],
    )(total, local, rates, *given)
