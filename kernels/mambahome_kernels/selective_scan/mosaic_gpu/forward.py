"""Forward kernels: `ends` runs every chunk from a zero state, `outputs` again from its true start and writes y."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.selective_scan.mosaic_gpu.launch import Options, launch, tile_buffer
from mambahome_kernels.selective_scan.mosaic_gpu.lanes import (
    F32,
    TILE,
    Sizes,
    advance,
    dot,
    pipeline,
    place,
    row_scalars,
    sigmoid,
    step_size,
    within,
    zeros,
)


def ends(sizes: Sizes, x, dt, B, rates, bias, options: Options):
    """State after each chunk from a zero start (batch, chunks, d_state, channels), sum of delta (batch, chunks, channels)."""
    s, n, slots = sizes, sizes.d_state, options.slots

    def kernel(x, dt, B, rates, bias, end, total, xs, dts, bs, full):
        at = place()
        a = [rates[k, at.channels] for k in range(n)]
        dt_bias = bias[0, at.channels]

        def load(i, slot):
            rows, barrier = at.rows(s, i), full.at[slot]
            plgpu.copy_gmem_to_smem(x.at[at.batch, rows, at.channels], xs.at[slot], barrier)
            plgpu.copy_gmem_to_smem(dt.at[at.batch, rows, at.channels], dts.at[slot], barrier)
            plgpu.copy_gmem_to_smem(B.at[at.batch, rows], bs.at[slot], barrier)

        def compute(i, slot, carry):
            plgpu.barrier_wait(full.at[slot])

            def step(t, carry):
                h, total = carry
                b = row_scalars(bs, slot, t, n)
                xv, dtv = xs[slot, t].astype(F32), dts[slot, t].astype(F32)
                delta = step_size(dtv, dt_bias, s.softplus).delta * within(s, at, i, t)
                return advance(h, a, delta, delta * xv, b), total + delta

            return lax.fori_loop(0, TILE, step, carry, unroll=options.unroll)

        h, sum_delta = pipeline(s.tiles, slots, load, compute, ((zeros(),) * n, zeros()))
        for k in range(n):
            end[at.batch, at.chunk, k, at.channels] = h[k]
        total[at.batch, at.chunk, at.channels] = sum_delta

    return launch(
        kernel,
        s,
        options,
        out_type=[
            jax.ShapeDtypeStruct((s.batch, s.chunks, n, s.channels), F32),
            jax.ShapeDtypeStruct((s.batch, s.chunks, s.channels), F32),
        ],
        scratch_types=[
            tile_buffer(x, slots),
            tile_buffer(dt, slots),
            tile_buffer(B, slots, n),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        ],
    )(x, dt, B, rates, bias)


def outputs(sizes: Sizes, x, dt, B, C, z, rates, bias, skip, starts, options: Options, keep: bool):
    """y as x, and with `keep` the state before every tile (batch, chunks * tiles, d_state, channels)."""
    s, n, slots = sizes, sizes.d_state, options.slots
    wide = [x, dt] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, refs = refs[: len(wide)], refs[len(wide) :]
        (B, C, rates, bias, skip, starts, y), refs = refs[:7], refs[7:]
        kept, refs = (refs[0], refs[1:]) if keep else (None, refs)
        buffers, (bs, cs, ys, full) = refs[: len(wide)], refs[len(wide) :]
        at = place()
        a = [rates[k, at.channels] for k in range(n)]
        dt_bias, d_skip = bias[0, at.channels], skip[0, at.channels]

        def load(i, slot):
            rows, barrier = at.rows(s, i), full.at[slot]
            for source, buffer in zip(ins, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[at.batch, rows, at.channels], buffer.at[slot], barrier)
            plgpu.copy_gmem_to_smem(B.at[at.batch, rows], bs.at[slot], barrier)
            plgpu.copy_gmem_to_smem(C.at[at.batch, rows], cs.at[slot], barrier)

        def compute(i, slot, h):
            plgpu.barrier_wait(full.at[slot])
            if kept is not None:
                for k in range(n):
                    kept[at.batch, at.chunk * s.tiles + i, k, at.channels] = h[k]
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)

            def step(t, h):
                b, c = row_scalars(bs, slot, t, n), row_scalars(cs, slot, t, n)
                xv, dtv = (buffer[slot, t].astype(F32) for buffer in buffers[:2])
                delta = step_size(dtv, dt_bias, s.softplus).delta
                h = advance(h, a, delta, delta * xv, b)
                out = dot(h, c, d_skip * xv)
                if s.gated:
                    zv = buffers[2][slot, t].astype(F32)
                    out = out * (zv * sigmoid(zv))
                ys[slot, t] = out.astype(ys.dtype)
                return h

            return lax.fori_loop(0, TILE, step, h, unroll=options.unroll)

        def store(i, slot):
            plgpu.copy_smem_to_gmem(ys.at[slot], y.at[at.batch, at.rows(s, i), at.channels])

        h = tuple(starts[at.batch, at.chunk, k, at.channels] for k in range(n))
        pipeline(s.tiles, slots, load, compute, h, store)
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if keep:
        out_type.append(jax.ShapeDtypeStruct((s.batch, s.chunks * s.tiles, n, s.channels), jnp.float32))
    return launch(
        kernel,
        s,
        options,
        out_type=out_type,
        scratch_types=[
            *(tile_buffer(a, slots) for a in wide),
            tile_buffer(B, slots, n),
            tile_buffer(C, slots, n),
            tile_buffer(x, slots),
            plgpu.Barrier(num_arrivals=len(wide) + 2, num_barriers=slots),
        ],
    )(*wide, B, C, rates, bias, skip, starts)
