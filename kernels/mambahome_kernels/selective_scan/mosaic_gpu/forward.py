"""Forward kernels: `ends` runs every chunk from a zero state, `outputs` again from its true start and writes y.

Between them, and in the backward pass, `carry_over` turns the ends into true starts: a warp for a state of 32 channels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.selective_scan.mosaic_gpu.lanes import (
    F32,
    TILE,
    WARPS,
    Options,
    Sizes,
    Worker,
    advance,
    copies,
    dot,
    fetch,
    launch_warps,
    pipeline,
    sigmoid,
    step_size,
    tile_buffer,
    within,
    workers,
    zeros,
)

_GROUP = 8  # chunks that carry_over reads together, to hide the latency of memory


def ends(sizes: Sizes, x, dt, B, rates, bias, options: Options):
    """From a zero start, state after each chunk (batch, chunks, d_state, channels).

    And the sum of delta (batch, chunks, channels), from which the decay over a chunk follows.
    """
    s, n, slots, span = sizes, sizes.d_state, options.slots, sizes.span

    def kernel(x, dt, B, rates, bias, end, total, xs, dts, bs, full):
        team = workers(s.units)
        a = [[rates[k, at.channels] for k in range(n)] for at in team]
        dt_bias = [bias[0, at.channels] for at in team]

        def load(i, slot):
            def copy(at):
                rows, barrier = at.rows(s, i * span, span), full.at[slot]
                plgpu.copy_gmem_to_smem(x.at[at.batch, rows, at.columns], xs.at[at.tile(slot)], barrier)
                plgpu.copy_gmem_to_smem(dt.at[at.batch, rows, at.columns], dts.at[at.tile(slot)], barrier)
                plgpu.copy_gmem_to_smem(B.at[at.batch, rows], bs.at[at.tile(slot)], barrier)

            copies(team, copy)

        def compute(i, slot, carry):
            plgpu.barrier_wait(full.at[slot])

            def step(t, carry, w):
                at, (h, total) = team[w], carry
                b = at.scalars(bs, slot, t, n)
                xv, dtv = at.row(xs, slot, t), at.row(dts, slot, t)
                delta = step_size(dtv, dt_bias[w], s.softplus).delta * within(s, at, i * span, t)
                return advance(h, a[w], delta, delta * xv, b), total + delta

            return tuple(
                lax.fori_loop(0, span * TILE, lambda t, c, w=w: step(t, c, w), c, unroll=options.unroll)
                for w, c in enumerate(carry)
            )

        none = tuple(((zeros(),) * n, zeros()) for _ in team)
        for at, (h, sum_delta) in zip(team, pipeline(s.tiles // span, slots, load, compute, none), strict=True):
            for k in range(n):
                end[at.batch, at.chunk, k, at.channels] = h[k]
            total[at.batch, at.chunk, at.channels] = sum_delta

    return launch_warps(
        kernel,
        "scan_ends",
        s,
        options,
        s.chunks * s.units // WARPS,
        out_type=[
            jax.ShapeDtypeStruct((s.batch, s.chunks, n, s.channels), F32),
            jax.ShapeDtypeStruct((s.batch, s.chunks, s.channels), F32),
        ],
        scratch_types=[
            tile_buffer(x, slots, span=span),
            tile_buffer(dt, slots, span=span),
            tile_buffer(B, slots, n, span),
            plgpu.Barrier(num_arrivals=3 * WARPS, num_barriers=slots),
        ],
    )(x, dt, B, rates, bias)


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

    return launch_warps(
        kernel,
        "scan_carry_over_reverse" if reverse else "scan_carry_over",
        s,
        options,
        s.d_state * s.units // WARPS,
        out_type=[jax.ShapeDtypeStruct(local.shape, F32), jax.ShapeDtypeStruct((s.batch, s.d_state, s.channels), F32)],
        scratch_types=[],
    )(total, local, rates, *given)


def outputs(sizes: Sizes, x, dt, B, C, z, rates, bias, skip, starts, options: Options, keep: bool):
    """y as x, and with `keep` the state before every tile (batch, tiles of the sequence, d_state, channels).

    Those states are bfloat16 where x, dt and z are: only the gradients see them, most of which are rounded to bfloat16
    as well (that of a float32 C is then as exact as bfloat16). The state that runs through the sequence is float32.
    """
    s, n, slots, span = sizes, sizes.d_state, options.slots, sizes.span
    wide = [x, dt] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, refs = refs[: len(wide)], refs[len(wide) :]
        (B, C, rates, bias, skip, starts, y), refs = refs[:7], refs[7:]
        kept, refs = (refs[0], refs[1:]) if keep else (None, refs)
        buffers, (bs, cs, ys, full) = refs[: len(wide)], refs[len(wide) :]
        team = workers(s.units)
        a = [[rates[k, at.channels] for k in range(n)] for at in team]
        dt_bias, d_skip = ([v[0, at.channels] for at in team] for v in (bias, skip))

        def load(i, slot):
            def copy(at):
                fetch(at, slot, at.rows(s, i * span, span), full.at[slot], (*ins, B, C), (*buffers, bs, cs))

            copies(team, copy)

        def compute(i, slot, carry):
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)

            def step(t, h, w):
                at = team[w]
                b, c = at.scalars(bs, slot, t, n), at.scalars(cs, slot, t, n)
                xv, dtv = (at.row(buffer, slot, t) for buffer in buffers[:2])
                delta = step_size(dtv, dt_bias[w], s.softplus).delta
                h = advance(h, a[w], delta, delta * xv, b)
                out = dot(h, c, d_skip[w] * xv)
                if s.gated:
                    zv = at.row(buffers[2], slot, t)
                    out = out * (zv * sigmoid(zv))
                at.put(ys, slot, t, out)
                return h

            for part in range(span):
                if kept is not None:
                    _keep_states(s, team, kept, i * span + part, carry)
                first = part * TILE
                carry = tuple(
                    lax.fori_loop(first, first + TILE, lambda t, h, w=w: step(t, h, w), h, unroll=options.unroll)
                    for w, h in enumerate(carry)
                )
            return carry

        def store(i, slot):
            def copy(at):
                plgpu.copy_smem_to_gmem(ys.at[at.tile(slot)], y.at[at.batch, at.rows(s, i * span, span), at.columns])

            copies(team, copy)

        first = tuple(tuple(starts[at.batch, at.chunk, k, at.channels] for k in range(n)) for at in team)
        pipeline(s.tiles // span, slots, load, compute, first, store)
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if keep:
        out_type.append(jax.ShapeDtypeStruct((s.batch, s.kept, n, s.channels), jnp.result_type(*wide)))
    return launch_warps(
        kernel,
        "scan_outputs",
        s,
        options,
        s.chunks * s.units // WARPS,
        out_type=out_type,
        scratch_types=[
            *(tile_buffer(a, slots, span=span) for a in wide),
            tile_buffer(B, slots, n, span),
            tile_buffer(C, slots, n, span),
            tile_buffer(x, slots, span=span),
            plgpu.Barrier(num_arrivals=(len(wide) + 2) * WARPS, num_barriers=slots),
        ],
    )(*wide, B, C, rates, bias, skip, starts)


def _keep_states(s: Sizes, team: list[Worker], kept, i, carry) -> None:
    for at, h in zip(team, carry, strict=True):
        tile = at.chunk * s.tiles + i

        @pl.when(tile < s.kept)
        def _(at=at, tile=tile, h=h):
            for k in range(s.d_state):
                kept[at.batch, tile, k, at.channels] = h[k].astype(kept.dtype)
