"""What the kernels share: one lane a channel, tiles of time brought to shared memory, arithmetic on 128 lanes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.mosaic.launch import launch
from mambahome_kernels.mosaic.runtime import interpreting

WARP = 32  # channels of a unit: one for each thread of a warp
WARPS = 4  # in a block
LANES = WARP * WARPS
TILE = 8  # steps that travel to shared memory together; the forward pass keeps the state before every tile
LOG2E = math.log2(math.e)
F32 = jnp.float32

# log1p(e) / e on [0, 1], relative error 1.4e-7 in float32: the GPU computes 16 exponentials a clock and no log1p, and
# these few multiplications run beside them.
_LOG1P = (
    1.0,
    -0.499999046,
    0.333300054,
    -0.249545589,
    0.196781173,
    -0.153118625,
    0.106142648,
    -0.0570642017,
    0.0199071616,
    -0.00325637846,
)


class Options(NamedTuple):
    """What tuning turns: tiles in flight, steps unrolled, the compiler's approximate exp2 and rsqrt."""

    slots: int = 2
    unroll: int = 2
    approx_math: bool = True


class Sizes(NamedTuple):
    """Static sizes of one call. Rows past `length` and channels past `d_inner` are read as zeros and never written.

    A unit is what one warp works on: 32 channels of one chunk. Units are numbered chunk by chunk, four make a block.
    """

    batch: int
    length: int
    d_inner: int
    d_state: int  # 8 or 16
    tiles: int  # in each chunk
    chunks: int  # chunks * units is a multiple of 4
    softplus: bool
    gated: bool  # z is there
    span: int = 1  # tiles that the forward pass copies together; `tiles` is a multiple of it

    @property
    def chunk(self) -> int:
        return self.tiles * TILE

    @property
    def kept(self) -> int:
        """Tiles before which the forward pass keeps the state: those of the sequence, however it is cut into chunks."""
        return pl.cdiv(self.length, TILE)

    @property
    def units(self) -> int:
        """In each chunk."""
        return pl.cdiv(self.d_inner, WARP)

    @property
    def channels(self) -> int:
        """Channels rounded up to whole units."""
        return self.units * WARP


class Worker(NamedTuple):
    """One of the four warps of a block, and what it works on.

    On a GPU `warp` and all that follows from it are scalars that differ from warp to warp, although Pallas takes them
    for the same in all: a vector of 128 lanes then consists of four pieces of 32, each at its own warp's place. The
    interpreter has no such thing; there each of four workers in turn handles vectors of 32.
    """

    warp: jax.Array | int
    major: jax.Array  # the chunk
    unit: jax.Array
    batch: jax.Array

    def at(self, start):
        return pl.ds(start, WARP) if interpreting() else pl.ds(start - self.warp * WARP, LANES)

    @property
    def chunk(self) -> jax.Array:
        return self.major

    @property
    def channels(self):
        """The unit's channels as a vector."""
        return self.at(self.unit * WARP)

    @property
    def columns(self):
        """The same for a copy."""
        return pl.ds(self.unit * WARP, WARP)

    @property
    def lanes(self):
        """Its piece of a row of 128."""
        return self.at(self.warp * WARP)

    def rows(self, sizes: Sizes, tile, span: int = 1):
        """Of `span` tiles, from `tile` on."""
        return pl.ds(self.chunk * sizes.chunk + tile * TILE, span * TILE)

    def tile(self, slot):
        """First index of a tile buffer (slots * 4, TILE, width)."""
        return slot * WARPS + self.warp

    def _row(self, buffer, slot, t):
        """Row t of this worker's tile in a buffer (slots * 4, rows, 32): the reference to read or write."""
        if interpreting():
            return buffer.at[self.tile(slot), t]
        flat = buffer.reshape(math.prod(buffer.shape))
        return flat.at[self.at((self.tile(slot) * buffer.shape[1] + t) * WARP)]

    def row(self, buffer, slot, t) -> jax.Array:
        return self._row(buffer, slot, t)[...].astype(F32)

    def put(self, buffer, slot, t, value: jax.Array) -> None:
        self._row(buffer, slot, t)[...] = value.astype(buffer.dtype)

    def scalars(self, buffer, slot, t, n: int) -> list[jax.Array]:
        """One row of B or C. Read before any arithmetic of the step, so that the compiler reads four at a time."""
        if interpreting():  # where every access takes long
            row = buffer[self.tile(slot), t].astype(F32)
            return [row[k] for k in range(n)]
        return [buffer[self.tile(slot), t, k].astype(F32) for k in range(n)]

    def put_rows(self, buffer, firsts, values) -> None:
        """Tuples of vectors into consecutive rows of 128, from `firsts` on, each worker into its own piece."""
        if interpreting():  # where every access takes long
            for first, column in zip(firsts, zip(*values, strict=True), strict=True):
                buffer[pl.ds(first, len(column)), self.lanes] = jnp.stack(column)
            return
        for k, vectors in enumerate(values):
            for first, vector in zip(firsts, vectors, strict=True):
                buffer[first + k, self.lanes] = vector


def workers(units: int) -> list[Worker]:
    """Those of this block; the grid is (group, batch), units the number of units in each chunk."""
    group, batch = lax.axis_index("group"), lax.axis_index("batch")

    def worker(warp) -> Worker:
        index = group * WARPS + warp
        return Worker(warp, lax.div(index, jnp.int32(units)), lax.rem(index, jnp.int32(units)), batch)

    return [worker(w) for w in range(WARPS)] if interpreting() else [worker(_warp_index())]


def each_of_block(units: int) -> list[Worker]:
    """All four, with numbers that are the same in the whole block: for what the warpgroup does together."""
    group, batch = lax.axis_index("group"), lax.axis_index("batch")
    indices = [group * WARPS + w for w in range(WARPS)]
    return [Worker(w, lax.div(i, jnp.int32(units)), lax.rem(i, jnp.int32(units)), batch) for w, i in enumerate(indices)]


def _warp_index() -> jax.Array:
    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())))
    def index(_):
        return mgpu.FragmentedArray.splat(mgpu.warp_idx(sync=True), shape=(), is_signed=True)

    return index()


def copies(workers: list[Worker], copy) -> None:
    """copy(worker) by each warp for itself."""
    if interpreting():
        for w in workers:
            copy(w)
    else:
        plgpu.warp_map(lambda _: copy(workers[0]))


def fetch(at: Worker, slot, rows, barrier, sources, buffers) -> None:
    """Copy these rows of the sources to their buffers: those of a warp's channels, of B and C, the last two, all."""
    for number, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
        where = (at.batch, rows, at.columns) if number < len(sources) - 2 else (at.batch, rows)
        plgpu.copy_gmem_to_smem(source.at[where], buffer.at[at.tile(slot)], barrier)


def barrier() -> None:
    """All warps of the block have come here. Unlike commit_smem it does not wait for the copy engine's view."""
    if interpreting():
        return

    @plgpu.inline_mgpu()
    def wait(_):
        mgpu.warpgroup_barrier()

    wait()


def zeros() -> jax.Array:
    """As a loop carry must start out: in the layout in which it goes on."""
    if interpreting():
        return jnp.zeros((WARP,), F32)
    return plgpu.layout_cast(jnp.zeros((LANES,), F32), plgpu.Layout.WG_STRIDED((LANES,), 1))


def total(terms: list[jax.Array]) -> jax.Array:
    """Sum in a tree, so that no long chain of additions waits for itself."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + ([terms[-1]] if len(terms) % 2 else [])
    return terms[0]


def dot(vectors, scalars, first: jax.Array | None = None) -> jax.Array:
    """Sum of vector times scalar in four chains of fused multiply-adds."""
    chains: list[jax.Array | None] = [first, None, None, None]
    for k, (v, s) in enumerate(zip(vectors, scalars, strict=True)):
        term = v * s
        chain = chains[k % 4]
        chains[k % 4] = term if chain is None else chain + term
    return total([c for c in chains if c is not None])


class Step(NamedTuple):
    """The step size of one step, and what its derivative needs."""

    delta: jax.Array
    raw: jax.Array
    small: jax.Array | None  # exp(-|raw|)


def step_size(dt: jax.Array, bias: jax.Array, softplus: bool) -> Step:
    raw = dt + bias
    if not softplus:
        return Step(raw, raw, None)
    e = jnp.exp2(jnp.abs(raw) * -LOG2E)
    p = jnp.full_like(e, _LOG1P[-1])
    for c in _LOG1P[-2::-1]:
        p = p * e + c
    return Step(jnp.maximum(raw, 0.0) + e * p, raw, e)


def reciprocal(v: jax.Array) -> jax.Array:
    """Of numbers from 1 to infinity: one instruction and a product, where a division takes eight and a branch."""
    r = lax.rsqrt(v)
    return r * r


def slope(step: Step, inside: jax.Array) -> jax.Array:
    """Derivative of the step size by dt; 0 past the end of the sequence."""
    if step.small is None:
        return inside
    r = reciprocal(1.0 + step.small)
    return jnp.where(step.raw >= 0.0, r, step.small * r) * inside


def sigmoid(v: jax.Array) -> jax.Array:
    return reciprocal(1.0 + jnp.exp2(v * -LOG2E))


def advance(h, rates, delta: jax.Array, dx: jax.Array, b):
    """States after one step: exp(delta A) h + delta x B, with rates = A log2(e)."""
    return tuple(jnp.exp2(delta * a) * s + dx * k for a, s, k in zip(rates, h, b, strict=True))


def within(sizes: Sizes, at: Worker, tile, t) -> jax.Array:
    """1 for a step of the sequence, 0 past its end: such a step must leave the state alone."""
    return jnp.where(at.chunk * sizes.chunk + tile * TILE + t < sizes.length, 1.0, 0.0).astype(F32)


def pipeline(tiles: int, slots: int, load, compute, carry, store=None):
    """carry after all tiles: load(i, slot) starts copies, compute(i, slot, carry) waits for them, store writes results.

    Between the last read of a slot and the copy that refills it lies commit_smem, a barrier for all threads.
    """
    for i in range(min(slots, tiles)):
        load(i, i)

    def body(i, carry):
        slot = lax.rem(i, jnp.int32(slots))
        carry = compute(i, slot, carry)
        plgpu.commit_smem()
        if store is not None:
            store(i, slot)

        @pl.when(i + slots < tiles)
        def _():
            load(i + slots, slot)

        return carry

    return lax.fori_loop(0, tiles, body, carry)


def tile_buffer(like: jax.Array, slots: int, width: int = WARP, span: int = 1):
    return plgpu.SMEM((slots * WARPS, span * TILE, width), like.dtype)


def launch_warps(kernel, name: str, sizes: Sizes, options: Options, groups: int, **arguments):
    """The kernel as a function of arrays, over `groups` blocks of four warps for each batch entry."""
    return launch(
        kernel,
        name,
        (sizes, options),
        approx_math=options.approx_math,
        grid=(groups, sizes.batch),
        grid_names=("group", "batch"),
        **arguments,
    )
