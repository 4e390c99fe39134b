"""How a grid of voxels is cut into tiles, and in which order a block walks over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

PIECE = 8  # channels that lie together in shared memory: 16 bytes, a row of a core matrix
ROW_BYTES = PIECE * 2
KERNEL = 3
SHARED_BYTES = 232448  # that a block of a Hopper GPU can have


class Place(NamedTuple):
    """Of one step: batch entry, first output plane of its walk, row and column of its tile, plane within the walk."""

    entry: jax.Array
    first: jax.Array
    row: jax.Array
    column: jax.Array
    plane: jax.Array


class Walks(NamedTuple):
    """A walk goes over `run` planes of a tile, and the one before and after them; blocks take turns at the walks."""

    entries: int
    depth: int
    height: int
    width: int
    rows: int
    columns: int
    run: int
    blocks: int

    @property
    def grid(self) -> tuple[int, int, int, int]:
        tiles = pl.cdiv(self.height, self.rows), pl.cdiv(self.width, self.columns)
        return self.entries, pl.cdiv(self.depth, self.run), *tiles

    @property
    def total(self) -> int:
        entries, runs, rows, columns = self.grid
        return entries * runs * rows * columns

    @property
    def steps(self) -> int:
        """Of one walk."""
        return self.run + 2

    def all_steps(self, block: jax.Array) -> jax.Array:
        """Of one block."""
        return lax.div(jnp.int32(self.total + self.blocks - 1) - block, jnp.int32(self.blocks)) * self.steps

    def place(self, step: jax.Array, block: jax.Array) -> Place:
        rest = block + lax.div(step, jnp.int32(self.steps)) * self.blocks
        indices = []
        for size in reversed(self.grid[1:]):
            indices.append(lax.rem(rest, jnp.int32(size)))
            rest = lax.div(rest, jnp.int32(size))
        column, row, run = indices
        plane = lax.rem(step, jnp.int32(self.steps))
        return Place(rest, run * self.run, row * self.rows, column * self.columns, plane)


def walks(shape: tuple[int, ...], rows: int, columns: int, blocks: int, run: int | None = None) -> Walks:
    """With runs of such a length that the block with most to do has least; shape (entries, depth, height, width)."""
    entries, depth, height, width = shape

    def made(run: int) -> Walks:
        w = Walks(entries, depth, height, width, rows, columns, run, blocks)
        return w._replace(blocks=min(blocks, w.total))

    if run is not None:
        return made(min(run, depth))
    every = [made(pl.cdiv(depth, parts)) for parts in range(1, pl.cdiv(depth, 4) + 1)]
    return min(every, key=lambda w: pl.cdiv(w.total, w.blocks) * w.steps)


def with_margin(rows: int, columns: int, pieces: int) -> tuple[int, int]:
    """Of a tile, with one voxel around it, as wide as copies of whole 128 bytes ask for."""
    rows, columns = rows + 2, columns + 2
    while rows * columns * pieces * ROW_BYTES % 128:
        columns += 1
    return rows, columns
