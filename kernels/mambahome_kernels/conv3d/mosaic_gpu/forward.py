"""Forward: a plane of the input is brought once and used by all taps of the kernel.

A block keeps all weights in shared memory and walks along depth. One warpgroup brings the planes of a tile of the input
with a margin as wide as the kernel reaches; each of the others multiplies 64 voxels of a plane by the weights of all
taps within a plane for three depths at once, (64 voxels, inputs) by (inputs, 3 outputs), into the sums of the three
output planes it belongs to.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.conv3d.mosaic_gpu import products
from mambahome_kernels.conv3d.mosaic_gpu.tiles import (
    KERNEL,
    MOST_COPIED,
    PIECE,
    ROW_BYTES,
    SHARED_BYTES,
    Place,
    View,
    Walks,
    walks,
)
from mambahome_kernels.mosaic.launch import launch
from mambahome_kernels.mosaic.runtime import interpreting

F32 = jnp.float32
VOXELS = 64  # that one instruction multiplies
SIDE = 8  # of the square that they are, unless planes are long rows


class Pair(NamedTuple):
    """Two pieces of 8 channels, the 16 that one instruction sums over: (row, column, piece) of each."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]


class Sizes(NamedTuple):
    view: View
    walks: Walks
    inputs: int
    outputs: int
    workers: int  # warpgroups that multiply, each 64 voxels beside those of the one before
    slots: int  # planes in flight

    @property
    def pieces(self) -> int:
        return self.inputs // PIECE

    @property
    def square(self) -> tuple[int, int]:
        return (1, VOXELS) if self.view.is_long else (SIDE, SIDE)

    @property
    def margin(self) -> tuple[int, int]:
        return self.view.margin(self.walks.rows, self.walks.columns, 1)

    @property
    def pairs(self) -> list[Pair]:
        return list(_pairs(self.view.taps, self.pieces))

    @property
    def row_width(self) -> int:
        """Of the result: Pallas stores squares as wide as a row as single runs of bytes, across the ends of planes."""
        width = self.walks.width
        return max(width, VOXELS) if self.view.is_long else width + (width == SIDE)

    def within_row(self, column: jax.Array, voxels: int) -> jax.Array:
        """Of a long row squares are single runs of bytes: rather over the one before than past the row's end."""
        return jnp.minimum(column, max(self.row_width - voxels, 0)) if self.view.is_long else column

    def place(self, step: jax.Array, block: jax.Array) -> Place:
        at = self.walks.place(step, block)
        return at._replace(column=self.within_row(at.column, self.walks.columns))

    @property
    def shared_bytes(self) -> int:
        weights = 2 * len(self.pairs) * KERNEL * self.outputs * ROW_BYTES
        planes = self.slots * self.pieces * self.margin[0] * self.margin[1] * ROW_BYTES
        return weights + planes + self.workers * VOXELS * self.outputs * 2 + 1024


def _pairs(taps: list[tuple[int, int]], pieces: int) -> Iterator[Pair]:
    """Every piece of every tap; of an odd number, the last pieces of two taps together, and the very last with one that
    is in a pair already and counts for nothing here."""
    for tap in taps:
        for piece in range(0, pieces - 1, 2):
            yield Pair((*tap, piece), (*tap, piece + 1))
    if pieces % 2:
        last = [(*tap, pieces - 1) for tap in taps]
        for first, second in zip(last[::2], last[1::2], strict=False):
            yield Pair(first, second)
        yield Pair(last[-2], last[-1])


def sizes_of(view: View, shape: tuple[int, ...], outputs: int, blocks: int, run: int | None = None) -> Sizes | None:
    """None where weights and two planes do not fit into shared memory, or a row with its margin into a copy."""
    workers, slots = 2, [3, 2]
    if view.is_long:
        most = 3 if outputs <= 48 else 2  # whose sums fit into registers
        workers = min(most, pl.cdiv(view.columns, VOXELS), (MOST_COPIED - 2 * view.step) // VOXELS)
        slots = [6, 4, 3, 2]
    if workers < 1:
        return None
    rows, columns = (1, VOXELS * workers) if view.is_long else (SIDE, SIDE * workers)
    made = walks((shape[0] * view.stacks, *view[1:4]), rows, columns, blocks, run)
    every = [Sizes(view, made, shape[4], outputs, workers, n) for n in slots]
    return next((s for s in every if s.shared_bytes <= SHARED_BYTES), None)


def forward(x: jax.Array, kernel: jax.Array, s: Sizes) -> jax.Array:
    """x (batch, depth, height, width, inputs) and kernel (kd, kh, kw, inputs, outputs), bfloat16."""
    w = s.walks
    planes = x.reshape(w.entries * w.depth, w.height, w.width, s.pieces, PIECE)
    if interpreting():  # which reads no zeros before the beginning of an array
        rows, columns = s.view.reach
        planes = jnp.pad(planes, ((0, 1), (rows, rows), (columns, columns), (0, 0), (0, 0)))
    y = _kernel(s)(planes, _arranged(kernel, s))
    return y[:, :, : w.width].reshape(*x.shape[:4], s.outputs)


def _arranged(kernel: jax.Array, s: Sizes) -> jax.Array:
    """(kd, kh, kw, inputs, outputs) to (pieces of all pairs, 3 * outputs, 8), the last depth of the kernel first."""
    taps, even = len(s.view.taps), s.pieces // 2 * 2
    kernel = kernel.reshape(KERNEL, taps, s.pieces, PIECE, s.outputs)[::-1].transpose(1, 2, 0, 4, 3)
    kernel = kernel.reshape(taps, s.pieces, KERNEL * s.outputs, PIECE)
    parts = [kernel[:, :even].reshape(taps * even, *kernel.shape[2:])]
    if s.pieces > even:
        last = kernel[:, even]
        parts += [last[:-1], jnp.zeros_like(last[:1]), last[-1:]]
    return jnp.concatenate(parts)


def _kernel(s: Sizes):
    w = s.walks
    before = (0, 0) if interpreting() else s.view.reach
    square = s.square if interpreting() else (VOXELS,)

    def kernel(x, weights, out, planes, taps, staged, full, free, arrived):
        worker, block = lax.axis_index("worker"), lax.axis_index("block")
        steps = w.all_steps(block)

        def slot_of(step):
            return lax.rem(step, jnp.int32(s.slots))

        begin = s.within_row(worker * s.square[1], s.square[1])  # of this worker's square in the tile

        def until_free(step, _):
            plgpu.barrier_wait(free.at[slot_of(step)])

        def bring(step, _):
            at, slot = s.place(step, block), slot_of(step)
            pl.when(step >= s.slots)(lambda: until_free(step, None))
            z = at.first + at.plane - 1
            inside = (z >= 0) & (z < w.depth)
            # Past the end of an array, and before its beginning, the copy engine reads zeros.
            plane = jnp.where(inside, at.entry * w.depth + z, w.entries * w.depth)
            rows, columns = pl.ds(at.row - before[0], s.margin[0]), pl.ds(at.column - before[1], s.margin[1])
            for piece in range(s.pieces):
                plgpu.copy_gmem_to_smem(x.at[plane, rows, columns, piece], planes.at[slot, piece], full.at[slot])

        def compute(step, sums):
            at, slot = s.place(step, block), slot_of(step)
            plgpu.barrier_wait(full.at[slot])
            done, *sums = _multiply(s, planes.at[slot], begin, taps, *sums)
            plgpu.barrier_arrive(free.at[slot])
            z = at.first + at.plane - 2

            @pl.when((at.plane >= 2) & (z < w.depth))
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                _store(staged.at[worker], done.astype(staged.dtype))
                plgpu.commit_smem()
                ready = staged.at[worker] if interpreting() else staged.at[worker].reshape(*s.square, s.outputs)
                rows, columns = pl.ds(at.row, s.square[0]), pl.ds(at.column + begin, s.square[1])
                plgpu.copy_smem_to_gmem(ready, out.at[at.entry * w.depth + z, rows, columns])

            return tuple(sums)

        @pl.when(worker < s.workers)
        def _():
            plgpu.barrier_wait(arrived)
            none = jnp.zeros((VOXELS, s.outputs), F32)
            if not interpreting():
                none = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
            lax.fori_loop(0, steps, compute, (none, none))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == s.workers)
        def _():
            plgpu.copy_gmem_to_smem(weights, taps, arrived)
            lax.fori_loop(0, steps, bring, None)
            lax.fori_loop(jnp.maximum(steps - s.slots, 0), steps, until_free, None)

    return launch(
        kernel,
        "conv3d_forward",
        s,
        out_type=jax.ShapeDtypeStruct((w.entries * w.depth, w.height, s.row_width, s.outputs), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((s.slots, s.pieces, *s.margin, PIECE), jnp.bfloat16),
            plgpu.SMEM((2 * len(s.pairs), KERNEL * s.outputs, PIECE), jnp.bfloat16),
            plgpu.SMEM((s.workers, *square, s.outputs), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=s.pieces, num_barriers=s.slots),
            plgpu.Barrier(num_arrivals=s.workers, num_barriers=s.slots),
            plgpu.Barrier(),
        ],
        grid=(w.blocks,),
        grid_names=("block",),
        num_threads=s.workers + 1,
        thread_name="worker",
    )


def _store(target, value) -> None:
    if interpreting():
        target[...] = value.reshape(target.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, target, value):
        # Newer versions of JAX refuse an ordinary store whose lines meet in a bank, as those of 32 channels do.
        value.store_untiled(target, optimized=False)

    store(target, value)


def _multiply(s: Sizes, plane, column, taps, older, newer):
    """Adds this plane's share to the sums of three output planes, each (64 voxels, outputs).

    Returns the oldest, which is complete, and the other two. column: where this worker's square begins in the plane.
    """
    if interpreting():
        return _multiply_interpreted(s, plane, column, taps, older, newer)
    result = plgpu.ShapeDtypeStruct(older.shape, F32, layout=plgpu.Layout.WGMMA)
    row, piece = s.margin[1] * ROW_BYTES, s.margin[0] * s.margin[1] * ROW_BYTES
    width = KERNEL * s.outputs * ROW_BYTES
    eight = SIDE * ROW_BYTES if s.view.is_long else row  # from eight voxels to the next

    def place(at: tuple[int, int, int]) -> int:
        return at[0] * row + at[1] * ROW_BYTES + at[2] * piece

    apart = [place(p.second) - place(p.first) for p in s.pairs]
    distances = sorted(set(apart))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA),
        return_type=(result,) * KERNEL,
    )
    def run(_, plane, taps, older, newer):
        voxels = [products.Operand(plane, distance, eight, transposed=False) for distance in distances]
        weights = products.Operand(taps, width, PIECE * ROW_BYTES, transposed=False)
        offsets = [
            products.Product(0, distances.index(apart[i]), place(pair.first), 2 * i * width)
            for i, pair in enumerate(s.pairs)
        ]
        sums = products.side_by_side([older, newer, products.zeros_like(older)])
        (sums,) = products.multiply_add([sums], voxels, weights, offsets)
        return products.apart(sums, KERNEL)

    return run(plane.at[0, 0, pl.ds(column, 1)], taps, older, newer)


def _multiply_interpreted(s: Sizes, plane, column, taps, older, newer):
    voxels = plane[...].astype(F32)
    plgpu.commit_smem()  # the copy engine does not wait for ordinary reads, as it does for the tensor cores'
    weights = taps[...].reshape(-1, KERNEL, s.outputs, PIECE).astype(F32)
    total = jnp.zeros((KERNEL, VOXELS, s.outputs), F32)
    places = [place for pair in s.pairs for place in (pair.first, pair.second)]
    for (row, tap, piece), weight in zip(places, weights, strict=True):
        square = lax.dynamic_slice(voxels, (piece, row, column + tap, 0), (1, *s.square, PIECE)).reshape(-1, PIECE)
        total += jnp.einsum("vk,dok->dvo", square, weight, precision="highest")
    return older + total[0], newer + total[1], total[2]
