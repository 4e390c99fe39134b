"""How a grid of voxels is cut into tiles, and in which order a block walks over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

PIECE = 8  # channels that lie together in shared memory: 16 bytes, a row of a core matrix
ROW_BYTES = PIECE * 2
KERNEL = 3
MOST_COPIED = 256  # voxels of a row that one copy brings
SHARED_BYTES = 232448  # that a block of a Hopper GPU can have


class View(NamedTuple):
    """A grid of voxels as the kernels go over it: stacks of planes, and which neighbours within a plane meet.

    A kernel of size 1 along the last axis sees a plane as one long row, in which the next row is `step` columns on. The
    zeros before the first row and behind the last are then those beyond the long row's ends.
    """

    stacks: int  # of a batch entry
    planes: int
    rows: int
    columns: int
    kernel_rows: int
    step: int

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Of the kernel within a plane: rows and columns from the margin's corner."""
        return [(row, column * self.step) for row in range(self.kernel_rows) for column in range(KERNEL)]

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns of a margin."""
        return self.kernel_rows // 2, self.step

    @property
    def is_long(self) -> bool:
        return self.kernel_rows == 1

    def margin(self, rows: int, columns: int, pieces: int) -> tuple[int, int]:
        """A tile with its margin, as wide as copies of whole 128 bytes ask for."""
        rows, columns = rows + 2 * self.reach[0], columns + 2 * self.reach[1]
        while rows * columns * pieces * ROW_BYTES % 128:
            columns += 1
        return rows, columns


def view_of(sizes: tuple[int, ...], grid: tuple[int, ...]) -> View | None:
    """For kernels of such sizes; None for those that have none."""
    depth, height, width = grid
    views = {
        (3, 3, 3): View(1, depth, height, width, KERNEL, 1),
        (3, 3, 1): View(1, depth, 1, height * width, 1, width),
        (1, 3, 3): View(depth, height, 1, width, 1, 1),
    }
    kd, kh, kw = sizes
    return views.get((kd, kh, kw))


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
