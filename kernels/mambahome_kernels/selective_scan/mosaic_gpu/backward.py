"""Backward kernels: `starts` runs the adjoint state of every chunk from zero, `gradients` again from its true end.

With dout the gradient of the output before the gate, the adjoint state g runs backward in time:
g_t = exp(delta_(t+1) A) g_(t+1) + C_t dout_t. The states it is multiplied with are recomputed from the one that the
forward pass kept before every tile, half a tile at a time, and stay in registers.
"""

from typing import Any, NamedTuple

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
    WARP,
    WARPS,
    Options,
    Sizes,
    Worker,
    advance,
    barrier,
    copies,
    dot,
    each_of_block,
    fetch,
    launch_warps,
    pipeline,
    sigmoid,
    slope,
    step_size,
    tile_buffer,
    within,
    workers,
    zeros,
)

_HALF = TILE // 2
SUM_ROWS = 64  # rows of the tensor cores' register layout, in which sums over channels are cheap
_SUM_PITCH = LANES + 8  # floats from row to row: four rows that are read at once lie in different banks


def starts(sizes: Sizes, dt, z, dy, C, rates, bias, options: Options):
    """Adjoint of the state before each chunk from a zero end: (batch, chunks, d_state, channels).

    And the sum of delta (batch, chunks, channels): cheaper here than kept from the forward pass, whose chunks may
    differ.
    """
    s, n, slots = sizes, sizes.d_state, options.slots
    wide = [dt, dy] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, (C, rates, bias, first, total), refs = (
            refs[: len(wide)],
            refs[len(wide) : len(wide) + 5],
            refs[len(wide) + 5 :],
        )
        buffers, (cs, full) = refs[: len(wide)], refs[len(wide) :]
        team = workers(s.units)
        a = [[rates[k, at.channels] for k in range(n)] for at in team]
        dt_bias = [bias[0, at.channels] for at in team]

        def load(i, slot):
            def copy(at):
                rows, barrier = at.rows(s, s.tiles - 1 - i), full.at[slot]
                for source, buffer in zip(ins, buffers, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[at.batch, rows, at.columns], buffer.at[at.tile(slot)], barrier)
                plgpu.copy_gmem_to_smem(C.at[at.batch, rows], cs.at[at.tile(slot)], barrier)

            copies(team, copy)

        def compute(i, slot, carry):
            plgpu.barrier_wait(full.at[slot])

            def step(k, carry, w):
                at, t, (g, total) = team[w], TILE - 1 - k, carry
                c = at.scalars(cs, slot, t, n)
                dtv, dout = (at.row(buffer, slot, t) for buffer in buffers[:2])
                if s.gated:
                    zv = at.row(buffers[2], slot, t)
                    dout = dout * (zv * sigmoid(zv))
                delta = step_size(dtv, dt_bias[w], s.softplus).delta * within(s, at, s.tiles - 1 - i, t)
                g = tuple(jnp.exp2(delta * r) * (v + dout * k) for r, v, k in zip(a[w], g, c, strict=True))
                return g, total + delta

            return tuple(
                lax.fori_loop(0, TILE, lambda k, c, w=w: step(k, c, w), c, unroll=options.unroll)
                for w, c in enumerate(carry)
            )

        none = tuple(((zeros(),) * n, zeros()) for _ in team)
        for at, (g, sum_delta) in zip(team, pipeline(s.tiles, slots, load, compute, none), strict=True):
            for k in range(n):
                first[at.batch, at.chunk, k, at.channels] = g[k]
            total[at.batch, at.chunk, at.channels] = sum_delta

    return launch_warps(
        kernel,
        "scan_starts",
        s,
        options,
        s.chunks * s.units // WARPS,
        out_type=[
            jax.ShapeDtypeStruct((s.batch, s.chunks, n, s.channels), F32),
            jax.ShapeDtypeStruct((s.batch, s.chunks, s.channels), F32),
        ],
        scratch_types=[
            *(tile_buffer(a, slots) for a in wide),
            tile_buffer(C, slots, n),
            plgpu.Barrier(num_arrivals=(len(wide) + 1) * WARPS, num_barriers=slots),
        ],
    )(*wide, C, rates, bias)


class _Work(NamedTuple):
    """What the steps of a block read and write: buffers in shared memory, and constants of each worker's channels."""

    sizes: Sizes
    team: list[Worker]
    rates: list
    dt_bias: list
    skip: list
    inputs: tuple  # x, dt, dy and z
    B: Any
    C: Any
    before: Any  # states that the forward pass kept
    results: tuple  # dx, ddt and dz
    products: Any

    def recompute(self, w: int, slot, tile, t, h) -> tuple:
        """The states after step t."""
        at = self.team[w]
        b = at.scalars(self.B, slot, t, self.sizes.d_state)
        xv, dtv = (at.row(buffer, slot, t) for buffer in self.inputs[:2])
        step = step_size(dtv, self.dt_bias[w], self.sizes.softplus)
        inside = within(self.sizes, at, tile, t)
        delta = step.delta * inside
        return advance(h, self.rates[w], delta, delta * xv, b)

    def pull_back(self, w: int, slot, t, row, carry, h_before, h, tile):
        """Adjoint and sums before step t; its gradients by x, dt and z go to `results`, the terms of dB, dC to
        `products`."""
        s, at, a = self.sizes, self.team[w], self.rates[w]
        g, dA, dD, dbias = carry
        xv = at.row(self.inputs[0], slot, t)
        step = step_size(at.row(self.inputs[1], slot, t), self.dt_bias[w], s.softplus)
        inside = within(s, at, tile, t)
        delta, by_dt = step.delta * inside, slope(step, inside)
        dx = delta * xv
        b, c = at.scalars(self.B, slot, t, s.d_state), at.scalars(self.C, slot, t, s.d_state)
        dout = at.row(self.inputs[2], slot, t)
        if s.gated:
            zv = at.row(self.inputs[3], slot, t)
            gate = sigmoid(zv)
            plain = dot(h, c, self.skip[w] * xv)
            at.put(self.results[2], 0, t, dout * plain * gate * (1.0 + zv * (1.0 - gate)))
            dout = dout * (zv * gate)
        g = [v + dout * k for v, k in zip(g, c, strict=True)]
        pairs = ((v * dx, u * dout) for v, u in zip(g, h, strict=True))
        at.put_rows(self.products, (row, SUM_ROWS // 2 + row), pairs)
        du = dot(g, b)
        carried = [jnp.exp2(delta * r) * v for r, v in zip(a, g, strict=True)]
        pulled = [v * p for v, p in zip(carried, h_before, strict=True)]
        ddt = (dot(pulled, a) * (1.0 / LOG2E) + du * xv) * by_dt
        at.put(self.results[0], 0, t, du * delta + self.skip[w] * dout)
        at.put(self.results[1], 0, t, ddt)
        dA = tuple(v + p * delta for v, p in zip(dA, pulled, strict=True))
        return tuple(carried), dA, dD + dout * xv, dbias + ddt

    def write_sums(self, thin, tile, t) -> None:
        """Sum the products of some steps, from t on, over each unit's channels."""
        s = self.sizes
        for at in each_of_block(s.units):
            where = (at.chunk * s.chunk + tile * TILE + t) // _per_sum(s)
            own = self.products.at[pl.ds(0, SUM_ROWS), pl.ds(at.warp * WARP, WARP)]
            sums_of = jnp.sum(plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False), axis=1)
            thin[at.batch, at.unit, pl.ds(where * SUM_ROWS, SUM_ROWS)] = sums_of

    def tile(self, slot, tile, thin, carry):
        """Walk back through one tile, half of it at a time."""
        s = self.sizes

        def half(k, carry):
            first = (1 - k) * _HALF
            states = []
            for w, at in enumerate(self.team):
                h = tuple(at.row(self.before, slot, m) for m in range(s.d_state))
                h = lax.fori_loop(0, first, lambda t, h, w=w: self.recompute(w, slot, tile, t, h), h)
                path = [h]
                for j in range(_HALF):
                    path.append(self.recompute(w, slot, tile, first + j, path[-1]))
                states.append(path)
            for j in reversed(range(_HALF)):
                row = (j % _per_sum(s)) * s.d_state
                carry = tuple(
                    self.pull_back(w, slot, first + j, row, c, states[w][j], states[w][j + 1], tile)
                    for w, c in enumerate(carry)
                )
                if j % _per_sum(s) == 0:
                    barrier()
                    self.write_sums(thin, tile, first + j)
                    barrier()
            return carry

        return lax.fori_loop(0, 2, half, carry)


def _per_sum(s: Sizes) -> int:
    """Steps whose products are summed together."""
    return SUM_ROWS // (2 * s.d_state)


def gradients(sizes: Sizes, x, dt, B, C, z, dy, rates, bias, skip, kept, ends, options: Options):
    """All gradients, from the adjoint state after each chunk (`ends`) and the states before each tile (`kept`).

    Returns dx, ddt, dz (None without gate) as x, dt, z; sums over a chunk's steps (batch, chunks, d_state + 2,
    channels): dA by state, dD, ddt_bias; and dB, dC by unit (batch, units, length padded to chunks / q, 2, q, d_state),
    of q = 64 / (2 d_state) steps summed together.
    """
    s, n, slots = sizes, sizes.d_state, options.slots
    per_sum = _per_sum(s)
    wide = [x, dt, dy] + ([z] if s.gated else [])
    outs = [x, dt] + ([z] if s.gated else [])

    def kernel(*refs):
        ins, refs = refs[: len(wide)], refs[len(wide) :]
        (B, C, rates, bias, skip, kept, ends), refs = refs[:7], refs[7:]
        results, (sums, thin), refs = refs[: len(outs)], refs[len(outs) : len(outs) + 2], refs[len(outs) + 2 :]
        buffers, refs = refs[: len(wide)], refs[len(wide) :]
        out_buffers, (bs, cs, before, products, full) = refs[: len(outs)], refs[len(outs) :]
        team = workers(s.units)
        a = [[rates[k, at.channels] for k in range(n)] for at in team]
        dt_bias, d_skip = ([v[0, at.channels] for at in team] for v in (bias, skip))
        work = _Work(s, team, a, dt_bias, d_skip, buffers, bs, cs, before, out_buffers, products)

        def load(i, slot):
            def copy(at):
                tile = s.tiles - 1 - i
                rows, barrier = at.rows(s, tile), full.at[slot]
                fetch(at, slot, rows, barrier, (*ins, B, C), (*buffers, bs, cs))
                # Past the end of the sequence any state will do: no step there changes anything.
                source = kept.at[at.batch, jnp.minimum(at.chunk * s.tiles + tile, s.kept - 1), pl.ds(0, n), at.columns]
                plgpu.copy_gmem_to_smem(source, before.at[at.tile(slot)], barrier)

            copies(team, copy)

        def compute(i, slot, carry):
            tile = s.tiles - 1 - i
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return work.tile(slot, tile, thin, carry)

        def store(i, slot):
            def copy(at):
                rows = at.rows(s, s.tiles - 1 - i)
                for buffer, result in zip(out_buffers, results, strict=True):
                    plgpu.copy_smem_to_gmem(buffer.at[at.tile(0)], result.at[at.batch, rows, at.columns])

            copies(team, copy)

        none = ((zeros(),) * n, zeros(), zeros())
        carry = tuple((tuple(ends[at.batch, at.chunk, k, at.channels] for k in range(n)), *none) for at in team)
        carry = pipeline(s.tiles, slots, load, compute, carry, store)
        for at, (_, dA, dD, dbias) in zip(team, carry, strict=True):
            for k, value in enumerate((*dA, dD, dbias)):
                sums[at.batch, at.chunk, k, at.channels] = value
        plgpu.wait_smem_to_gmem(0)

    padded = s.chunks * s.chunk
    *dwide, sums, thin = launch_warps(
        kernel,
        "scan_gradients",
        s,
        options,
        s.chunks * s.units // WARPS,
        out_type=[
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outs),
            jax.ShapeDtypeStruct((s.batch, s.chunks, n + 2, s.channels), F32),
            jax.ShapeDtypeStruct((s.batch, s.units, padded // per_sum * SUM_ROWS), F32),
        ],
        scratch_types=[
            *(tile_buffer(a, slots) for a in wide),
            *(tile_buffer(a, 1) for a in outs),
            tile_buffer(B, slots, n),
            tile_buffer(C, slots, n),
            plgpu.SMEM((slots * WARPS, n, WARP), kept.dtype),
            plgpu.SMEM((SUM_ROWS, _SUM_PITCH), F32),
            plgpu.Barrier(num_arrivals=(len(wide) + 3) * WARPS, num_barriers=slots),
        ],
    )(*wide, B, C, rates, bias, skip, kept, ends)
    dz = dwide[2] if s.gated else None
    return dwide[0], dwide[1], dz, sums, thin.reshape(s.batch, s.units, padded // per_sum, 2, per_sum, n)
