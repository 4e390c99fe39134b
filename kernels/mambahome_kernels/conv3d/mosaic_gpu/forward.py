"""Forward: a plane of the input is brought once and used by all 27 taps.

A block keeps all weights in shared memory and walks along depth. One warpgroup brings the planes of a tile of the input
with a margin of one voxel; each of the others multiplies 64 voxels of a plane by the weights of nine taps for three
depths at once, (64 voxels, inputs) by (inputs, 3 outputs), into the sums of the three output planes it belongs to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.conv3d.mosaic_gpu import products
from mambahome_kernels.conv3d.mosaic_gpu.tiles import KERNEL, PIECE, ROW_BYTES, SHARED_BYTES, Walks, walks, with_margin
from mambahome_kernels.mosaic.launch import launch
from mambahome_kernels.mosaic.runtime import interpreting

F32 = jnp.float32
SIDE = 8  # voxels a side of the square that one instruction multiplies
WORKERS = 2  # squares beside each other
TAPS = KERNEL * KERNEL


class Sizes(NamedTuple):
    walks: Walks
    inputs: int
    outputs: int
    slots: int  # planes in flight

    @property
    def pieces(self) -> int:
        """Of the input channels, in whole instructions (16 channels)."""
        return pl.cdiv(self.inputs, 16) * 2

    @property
    def margin(self) -> tuple[int, int]:
        return with_margin(SIDE, SIDE * WORKERS, 1)

    @property
    def row_width(self) -> int:
        """Of the result: Pallas stores squares as wide as a row as single runs of bytes, across the ends of planes."""
        return self.walks.width + (self.walks.width == SIDE)

    @property
    def shared_bytes(self) -> int:
        weights = TAPS * self.pieces * KERNEL * self.outputs * ROW_BYTES
        planes = self.slots * self.pieces * self.margin[0] * self.margin[1] * ROW_BYTES
        return weights + planes + WORKERS * SIDE * SIDE * self.outputs * 2 + 1024


def sizes_of(shape: tuple[int, ...], outputs: int, blocks: int, run: int | None = None) -> Sizes | None:
    """None where weights and two planes do not fit into shared memory."""
    made = walks(shape[:4], SIDE, SIDE * WORKERS, blocks, run)
    every = [Sizes(made, shape[4], outputs, slots) for slots in (3, 2)]
    return next((s for s in every if s.shared_bytes <= SHARED_BYTES), None)


def forward(x: jax.Array, kernel: jax.Array, s: Sizes) -> jax.Array:
    """x (batch, depth, height, width, inputs) and kernel (3, 3, 3, inputs, outputs), bfloat16."""
    batch, depth, height, width, inputs = x.shape
    planes = x.reshape(batch * depth, height, width, inputs // PIECE, PIECE)
    if interpreting():  # which reads no zeros before the beginning of an array
        planes = jnp.pad(planes, ((0, 1), (1, 1), (1, 1), (0, s.pieces - inputs // PIECE), (0, 0)))
    y = _kernel(s)(planes, _arranged(kernel, s.pieces))
    return y[:, :, :width].reshape(batch, depth, height, width, s.outputs)


def _arranged(kernel: jax.Array, pieces: int) -> jax.Array:
    """(3, 3, 3, inputs, outputs) to (9 * pieces, 3 * outputs, 8), the last depth of the kernel first."""
    inputs, outputs = kernel.shape[3:]
    kernel = jnp.pad(kernel[::-1], ((0, 0),) * 3 + ((0, pieces * PIECE - inputs), (0, 0)))
    kernel = kernel.reshape(KERNEL, TAPS, pieces, PIECE, outputs).transpose(1, 2, 0, 4, 3)
    return kernel.reshape(TAPS * pieces, KERNEL * outputs, PIECE)


def _kernel(s: Sizes):
    w = s.walks
    before = 0 if interpreting() else 1
    square = (SIDE, SIDE) if interpreting() else (SIDE * SIDE,)

    def kernel(x, weights, out, planes, taps, staged, full, free, arrived):
        worker, block = lax.axis_index("worker"), lax.axis_index("block")
        steps = w.all_steps(block)

        def slot_of(step):
            return lax.rem(step, jnp.int32(s.slots))

        def until_free(step, _):
            plgpu.barrier_wait(free.at[slot_of(step)])

        def bring(step, _):
            at, slot = w.place(step, block), slot_of(step)
            pl.when(step >= s.slots)(lambda: until_free(step, None))
            z = at.first + at.plane - 1
            inside = (z >= 0) & (z < w.depth)
            # Past the end of an array, and before its beginning, the copy engine reads zeros.
            plane = jnp.where(inside, at.entry * w.depth + z, w.entries * w.depth)
            rows, columns = pl.ds(at.row - before, s.margin[0]), pl.ds(at.column - before, s.margin[1])
            for piece in range(s.pieces):
                plgpu.copy_gmem_to_smem(x.at[plane, rows, columns, piece], planes.at[slot, piece], full.at[slot])

        def compute(step, sums):
            at, slot = w.place(step, block), slot_of(step)
            plgpu.barrier_wait(full.at[slot])
            done, *sums = _multiply(s, planes.at[slot], worker * SIDE, taps, *sums)
            plgpu.barrier_arrive(free.at[slot])
            z = at.first + at.plane - 2

            @pl.when((at.plane >= 2) & (z < w.depth))
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                _store(staged.at[worker], done.astype(staged.dtype))
                plgpu.commit_smem()
                ready = staged.at[worker]
                plgpu.copy_smem_to_gmem(
                    ready if interpreting() else ready.reshape(SIDE, SIDE, s.outputs),
                    out.at[at.entry * w.depth + z, pl.ds(at.row, SIDE), pl.ds(at.column + worker * SIDE, SIDE)],
                )

            return tuple(sums)

        @pl.when(worker < WORKERS)
        def _():
            plgpu.barrier_wait(arrived)
            none = jnp.zeros((SIDE * SIDE, s.outputs), F32)
            if not interpreting():
                none = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
            lax.fori_loop(0, steps, compute, (none, none))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == WORKERS)
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
            plgpu.SMEM((TAPS * s.pieces, KERNEL * s.outputs, PIECE), jnp.bfloat16),
            plgpu.SMEM((WORKERS, *square, s.outputs), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=s.pieces, num_barriers=s.slots),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=s.slots),
            plgpu.Barrier(),
        ],
        grid=(w.blocks,),
        grid_names=("block",),
        num_threads=WORKERS + 1,
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

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA),
        return_type=(result,) * KERNEL,
    )
    def run(_, plane, taps, older, newer):
        voxels = products.Operand(plane, piece, row, transposed=False)
        weights = products.Operand(taps, width, PIECE * ROW_BYTES, transposed=False)
        offsets = [
            (0, tap // KERNEL * row + tap % KERNEL * ROW_BYTES + k * piece, (tap * s.pieces + k) * width)
            for tap in range(TAPS)
            for k in range(0, s.pieces, 2)
        ]
        sums = products.side_by_side([older, newer, products.zeros_like(older)])
        (sums,) = products.multiply_add([sums], [voxels], weights, offsets)
        return products.apart(sums, KERNEL)

    return run(plane.at[0, 0, pl.ds(column, 1)], taps, older, newer)


def _multiply_interpreted(s: Sizes, plane, column, taps, older, newer):
    voxels = plane[...].astype(F32)
    plgpu.commit_smem()  # the copy engine does not wait for ordinary reads, as it does for the tensor cores'
    weights = taps[...].reshape(TAPS, s.pieces, KERNEL, s.outputs, PIECE).astype(F32)
    total = jnp.zeros((KERNEL, SIDE * SIDE, s.outputs), F32)
    for tap in range(TAPS):
        first = (0, tap // KERNEL, column + tap % KERNEL, 0)
        square = lax.dynamic_slice(voxels, first, (s.pieces, SIDE, SIDE, PIECE)).reshape(s.pieces, -1, PIECE)
        total += jnp.einsum("pvk,pdok->dvo", square, weights[tap], precision="highest")
    return older + total[0], newer + total[1], total[2]
