"""What the kernels share: one lane a channel, tiles of time brought to shared memory, arithmetic on 128 lanes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # channels of a block: one for each thread of a warpgroup
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


class Sizes(NamedTuple):
    """Static sizes of one call. Rows past `length` and channels past `d_inner` are zeros where read, dropped where written."""

    batch: int
    length: int
    d_inner: int
    d_state: int  # 8 or 16
    tiles: int  # in each chunk
    chunks: int
    softplus: bool
    gated: bool  # z is there

    @property
    def chunk(self) -> int:
        return self.tiles * TILE

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return pl.cdiv(self.d_inner, LANES)

    @property
    def channels(self) -> int:
        """Channels rounded up to whole blocks."""
        return self.blocks * LANES


class Place(NamedTuple):
    """Which chunk, channels and batch entry this block works on."""

    chunk: jax.Array
    block: jax.Array
    batch: jax.Array

    @property
    def channels(self):
        return pl.ds(self.block * LANES, LANES)

    def rows(self, sizes: Sizes, tile):
        return pl.ds(self.chunk * sizes.chunk + tile * TILE, TILE)


def place() -> Place:
    return Place(lax.axis_index("chunk"), lax.axis_index("block"), lax.axis_index("batch"))


def zeros() -> jax.Array:
    """As a loop carry must start out: in the layout in which it goes on."""
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


def slope(step: Step) -> jax.Array | None:
    """Derivative of softplus, or None for 1."""
    if step.small is None:
        return None
    r = reciprocal(1.0 + step.small)
    return jnp.where(step.raw >= 0.0, r, step.small * r)


def sigmoid(v: jax.Array) -> jax.Array:
    return reciprocal(1.0 + jnp.exp2(v * -LOG2E))


def row_scalars(ref, slot, t, n: int) -> list[jax.Array]:
    """One row of B or C. Read before any arithmetic of the step, so that the compiler reads four at a time."""
    return [ref[slot, t, k].astype(F32) for k in range(n)]


def advance(h, rates, delta: jax.Array, dx: jax.Array, b):
    """States after one step: exp(delta A) h + delta x B, with rates = A log2(e)."""
    return tuple(jnp.exp2(delta * a) * s + dx * k for a, s, k in zip(rates, h, b, strict=True))


def within(sizes: Sizes, at: Place, tile, t) -> jax.Array:
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
