"""Backward kernels: `starts` runs the adjoint state of every chunk from zero, `gradients` again from its true end.

With dout the gradient of the output before the gate, the adjoint state g runs backward in time:
g_t = exp(delta_(t+1) A) g_(t+1) + C_t dout_t. The states it is multiplied with are recomputed from the one that the
forward pass kept before every tile, half a tile at a time, and stay in registers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.selective_scan.mosaic_gpu.lanes import (
    F32,
    LANES,
    LOG2E,
    TILE,
    Sizes,
    advance,
    dot,
    pipeline,
    place,
    row_scalars,
    sigmoid,
    slope,
    step_size,
    within,
    zeros,
)
from mambahome_kernels.selective_scan.mosaic_gpu.launch import Options, launch, tile_buffer

_HALF = TILE // 2
SUM_ROWS = 64  # rows of the tensor cores' register layout, in which sums over channels are cheap
_SUM_PITCH = LANES + 8  # floats from row to row: four rows that are read at once lie in different banks


def starts(sizes: Sizes, dt, z, dy, C, rates, bias, options: Options):
    """Adjoint of the state before each chunk from a zero end: (batch, chunks, d_state, channels)."""
    s, n, slots = sizes, sizes.d_state, options.slots
    wide = [dt, dy] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, (C, rates, bias, first), refs = refs[: len(wide)], refs[len(wide) : len(wide) + 4], refs[len(wide) + 4 :]
        buffers, (cs, full) = refs[: len(wide)], refs[len(wide) :]
        at = place()
        a = [rates[k, at.channels] for k in range(n)]
        dt_bias = bias[0, at.channels]

        def load(i, slot):
            rows, barrier = at.rows(s, s.tiles - 1 - i), full.at[slot]
            for source, buffer in zip(ins, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[at.batch, rows, at.channels], buffer.at[slot], barrier)
            plgpu.copy_gmem_to_smem(C.at[at.batch, rows], cs.at[slot], barrier)

        def compute(i, slot, g):
            plgpu.barrier_wait(full.at[slot])

            def step(k, g):
                t = TILE - 1 - k
                c = row_scalars(cs, slot, t, n)
                dtv, dout = (buffer[slot, t].astype(F32) for buffer in buffers[:2])
                if s.gated:
                    zv = buffers[2][slot, t].astype(F32)
                    dout = dout * (zv * sigmoid(zv))
                delta = step_size(dtv, dt_bias, s.softplus).delta
                return tuple(jnp.exp2(delta * r) * (v + dout * k) for r, v, k in zip(a, g, c, strict=True))

            return lax.fori_loop(0, TILE, step, g, unroll=options.unroll)

        g = pipeline(s.tiles, slots, load, compute, (zeros(),) * n)
        for k in range(n):
            first[at.batch, at.chunk, k, at.channels] = g[k]

    return launch(
        kernel,
        s,
        options,
        out_type=jax.ShapeDtypeStruct((s.batch, s.chunks, n, s.channels), F32),
        scratch_types=[
            *(tile_buffer(a, slots) for a in wide),
            tile_buffer(C, slots, n),
            plgpu.Barrier(num_arrivals=len(wide) + 1, num_barriers=slots),
        ],
    )(*wide, C, rates, bias)


def gradients(sizes: Sizes, x, dt, B, C, z, dy, rates, bias, skip, kept, ends, options: Options):
    """All gradients, from the adjoint state after each chunk (`ends`) and the states before each tile (`kept`).

    Returns dx, ddt and dz (None without gate) like x, dt and z; sums over a chunk's steps (batch, chunks, d_state + 2,
    channels): dA / log2(e) by state, then dD, then ddt_bias; and dB, dC by channel block: (batch, blocks, length padded
    to tiles / q, 2, q, d_state) with q = 64 / (2 d_state) steps summed together.
    """
    s, n, slots = sizes, sizes.d_state, options.slots
    per_sum = SUM_ROWS // (2 * n)
    wide = [x, dt, dy] + ([z] if s.gated else [])
    outs = [x, dt] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, refs = refs[: len(wide)], refs[len(wide) :]
        (B, C, rates, bias, skip, kept, ends), refs = refs[:7], refs[7:]
        results, (sums, thin), refs = refs[: len(outs)], refs[len(outs) : len(outs) + 2], refs[len(outs) + 2 :]
        buffers, refs = refs[: len(wide)], refs[len(wide) :]
        out_buffers, (bs, cs, before, products, full) = refs[: len(outs)], refs[len(outs) :]
        at = place()
        a = [rates[k, at.channels] for k in range(n)]
        dt_bias, d_skip = bias[0, at.channels], skip[0, at.channels]

        def load(i, slot):
            tile = s.tiles - 1 - i
            rows, barrier = at.rows(s, tile), full.at[slot]
            for source, buffer in zip(ins, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[at.batch, rows, at.channels], buffer.at[slot], barrier)
            plgpu.copy_gmem_to_smem(B.at[at.batch, rows], bs.at[slot], barrier)
            plgpu.copy_gmem_to_smem(C.at[at.batch, rows], cs.at[slot], barrier)
            source = kept.at[at.batch, at.chunk * s.tiles + tile, pl.ds(0, n), at.channels]
            plgpu.copy_gmem_to_smem(source, before.at[slot], barrier)

        def compute(i, slot, carry):
            tile = s.tiles - 1 - i
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def forward(t, h):
                b = row_scalars(bs, slot, t, n)
                xv, dtv = (buffer[slot, t].astype(F32) for buffer in buffers[:2])
                step = step_size(dtv, dt_bias, s.softplus)
                inside = within(s, at, tile, t)
                delta = step.delta * inside
                dx = delta * xv
                return advance(h, a, delta, dx, b), (step, inside, delta, xv, dx)

            def backward(t, row, carry, h_before, h, known):
                g, dA, dD, dbias = carry
                step, inside, delta, xv, dx = known
                b, c = row_scalars(bs, slot, t, n), row_scalars(cs, slot, t, n)
                dout = buffers[2][slot, t].astype(F32)
                if s.gated:
                    zv = buffers[3][slot, t].astype(F32)
                    gate = sigmoid(zv)
                    plain = dot(h, c, d_skip * xv)
                    out_buffers[2][t] = (dout * plain * gate * (1.0 + zv * (1.0 - gate))).astype(out_buffers[2].dtype)
                    dout = dout * (zv * gate)
                g = [v + dout * k for v, k in zip(g, c, strict=True)]
                for k in range(n):
                    products[row + k, pl.ds(0, LANES)] = g[k] * dx
                    products[SUM_ROWS // 2 + row + k, pl.ds(0, LANES)] = h[k] * dout
                du = dot(g, b)
                carried = [jnp.exp2(delta * r) * v for r, v in zip(a, g, strict=True)]
                pulled = [v * p for v, p in zip(carried, h_before, strict=True)]
                ddelta = dot(pulled, a) * (1.0 / LOG2E) + du * xv
                by_dt = slope(step)
                ddt = ddelta * inside if by_dt is None else ddelta * by_dt * inside
                out_buffers[0][t] = (du * delta + d_skip * dout).astype(out_buffers[0].dtype)
                out_buffers[1][t] = ddt.astype(out_buffers[1].dtype)
                dA = tuple(v + p * delta for v, p in zip(dA, pulled, strict=True))
                return tuple(carried), dA, dD + dout * xv, dbias + ddt

            def half(k, carry):
                first = (1 - k) * _HALF
                h = tuple(before[slot, m] for m in range(n))
                h = lax.fori_loop(0, first, lambda t, h: forward(t, h)[0], h)
                states, known = [h], []
                for j in range(_HALF):
                    h, step = forward(first + j, h)
                    states.append(h)
                    known.append(step)
                for j in reversed(range(_HALF)):
                    row = (j % per_sum) * n
                    carry = backward(first + j, row, carry, states[j], states[j + 1], known[j])
                    if j % per_sum == 0:
                        plgpu.commit_smem()
                        where = (at.chunk * s.chunk + tile * TILE + first + j) // per_sum
                        thin[at.batch, at.block, pl.ds(where * SUM_ROWS, SUM_ROWS)] = _sums_over_channels(products)
                        plgpu.commit_smem()
                return carry

            return lax.fori_loop(0, 2, half, carry)

        def store(i, slot):
            for buffer, result in zip(out_buffers, results, strict=True):
                plgpu.copy_smem_to_gmem(buffer, result.at[at.batch, at.rows(s, s.tiles - 1 - i), at.channels])

        g = tuple(ends[at.batch, at.chunk, k, at.channels] for k in range(n))
        _, dA, dD, dbias = pipeline(s.tiles, slots, load, compute, (g, (zeros(),) * n, zeros(), zeros()), store)
        for k, value in enumerate((*dA, dD, dbias)):
            sums[at.batch, at.chunk, k, at.channels] = value
        plgpu.wait_smem_to_gmem(0)

    padded = s.chunks * s.chunk
    *dwide, sums, thin = launch(
        kernel,
        s,
        options,
        out_type=[
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outs),
            jax.ShapeDtypeStruct((s.batch, s.chunks, n + 2, s.channels), F32),
            jax.ShapeDtypeStruct((s.batch, s.blocks, padded // per_sum * SUM_ROWS), F32),
        ],
        scratch_types=[
            *(tile_buffer(a, slots) for a in wide),
            *(plgpu.SMEM((TILE, LANES), a.dtype) for a in outs),
            tile_buffer(B, slots, n),
            tile_buffer(C, slots, n),
            plgpu.SMEM((slots, n, LANES), F32),
            plgpu.SMEM((SUM_ROWS, _SUM_PITCH), F32),
            plgpu.Barrier(num_arrivals=len(wide) + 3, num_barriers=slots),
        ],
    )(*wide, B, C, rates, bias, skip, kept, ends)
    dz = dwide[2] if s.gated else None
    return dwide[0], dwide[1], dz, sums, thin.reshape(s.batch, s.blocks, padded // per_sum, 2, per_sum, n)


def _sums_over_channels(products) -> jax.Array:
    """(64,) sums of rows; a quarter of the columns at a time, so that few registers hold them."""
    quarter = LANES // 4
    parts = [
        plgpu.load(
            products.at[pl.ds(0, SUM_ROWS), pl.ds(k * quarter, quarter)], layout=plgpu.Layout.WGMMA, optimized=False
        )
        for k in range(4)
    ]
    return jnp.sum((parts[0] + parts[1]) + (parts[2] + parts[3]), axis=1)
