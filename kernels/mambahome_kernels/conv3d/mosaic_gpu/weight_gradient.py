"""Gradient by the weights: a sum over all voxels of outer products, for all taps at once.

A block takes some input channels and keeps the sums of all taps in registers while it walks over tiles. Warpgroup kw
has the taps kw along a row; one product of the tensor cores is (outputs, 16 voxels of a row) by (16 voxels shifted by
kw, the three kh times the input channels), since in shared memory the channels of a row are followed by those of the
next row. Where a plane is one long row there is one kh, and a block takes more input channels.
"""

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
    View,
    Walks,
    walks,
)
from mambahome_kernels.mosaic.launch import launch
from mambahome_kernels.mosaic.runtime import interpreting

F32 = jnp.float32
TILE, LONG_TILE = (8, 16), (1, 128)  # rows and columns
VOXELS = 16  # of a row, that one instruction sums over
OUTPUTS = 64  # rows of an instruction: output channels, and what lies behind them


class Sizes(NamedTuple):
    view: View
    walks: Walks  # of one batch entry
    batch: int
    inputs: int
    outputs: int
    slots: int = 6  # planes in flight, three of which are in use

    @property
    def pieces(self) -> int:
        """Of the input channels of a block: as many as sums of all taps fit into registers."""
        most = 9 // self.view.kernel_rows
        return next(n for n in range(most, 0, -1) if self.inputs // PIECE % n == 0)

    @property
    def shares(self) -> int:
        """Blocks that divide the input channels among them."""
        return self.inputs // PIECE // self.pieces

    @property
    def margin(self) -> tuple[int, int]:
        return self.view.margin(self.walks.rows, self.walks.columns, self.pieces)

    @property
    def shared_bytes(self) -> int:
        x = self.margin[0] * self.margin[1] * self.pieces
        dy = self.walks.rows * self.walks.columns * (self.outputs // PIECE)
        return self.slots * (x + dy) * ROW_BYTES + 1024


def sizes_of(view: View, shape: tuple[int, ...], outputs: int, blocks: int, run: int | None = None) -> Sizes | None:
    """None where a row with its margin does not fit into a copy, or planes into shared memory."""
    batch, inputs = shape[0], shape[4]
    tile = LONG_TILE if view.is_long else TILE
    if tile[1] + 2 * view.step > MOST_COPIED:
        return None
    one = Sizes(view, walks(view[:4], *tile, 1, run), batch, inputs, outputs)
    share = max(1, blocks // (one.shares * batch))
    every = [one._replace(walks=walks(view[:4], *tile, share, run), slots=slots) for slots in (6, 5, 4)]
    return next((s for s in every if s.shared_bytes <= SHARED_BYTES), None)


def weight_gradient(x: jax.Array, dy: jax.Array, s: Sizes) -> jax.Array:
    """(batch, kd, kh * kw, inputs, outputs) in float32: of every batch entry."""
    shape = s.batch * s.view.stacks * s.view.planes, s.view.rows, s.view.columns
    xs = x.reshape(*shape, s.inputs // PIECE, PIECE)
    dys = dy.reshape(*shape, s.outputs // PIECE, PIECE)
    if interpreting():  # which reads no zeros before the beginning of an array, and copies without transposing
        rows, columns = s.view.reach
        xs = jnp.pad(xs, ((0, 1), (rows, rows), (columns, columns), (0, 0), (0, 0))).swapaxes(2, 3)
        dys = jnp.pad(dys, ((0, 1), (0, 0), (0, 0), (0, 0), (0, 0))).swapaxes(2, 3)
    parts = _kernel(s)(xs, dys)[..., : s.outputs, :].sum(1)
    parts = parts.reshape(s.batch, s.shares, KERNEL, KERNEL, s.outputs, s.view.kernel_rows, s.pieces * PIECE)
    # (batch, share, kw, kd, outputs, kh, inputs of a share)
    return parts.transpose(0, 3, 5, 2, 1, 6, 4).reshape(s.batch, KERNEL, -1, s.inputs, s.outputs)


def _kernel(s: Sizes):
    w = s.walks
    before = (0, 0) if interpreting() else s.view.reach
    columns_of_sums = s.view.kernel_rows * s.pieces * PIECE
    out_pieces = s.outputs // PIECE

    def kernel(x, dy, out, dys, xs, full, free):
        worker, block = lax.axis_index("worker"), lax.axis_index("block")
        share, entry = lax.axis_index("share"), lax.axis_index("entry")
        # Two more at the beginning, of zeros: a plane of x meets the three planes of dy around it.
        steps = w.all_steps(block) + 2

        def slot_of(step):
            return lax.rem(step, jnp.int32(s.slots))

        def until_free(step, _):
            plgpu.barrier_wait(free.at[slot_of(step)])

        def bring(step, _):
            at, slot = w.place(jnp.maximum(step - 2, 0), block), slot_of(step)
            pl.when(step >= s.slots)(lambda: until_free(step, None))
            z = at.first + at.plane - 1
            inside = (step >= 2) & (z >= 0) & (z < w.depth)
            own = (step >= 2) & (at.plane < w.run) & (z + 1 < w.depth)
            # Past the end of an array, and before its beginning, the copy engine reads zeros.
            nowhere = s.batch * w.entries * w.depth
            plane = (entry * w.entries + at.entry) * w.depth + z
            x_plane = jnp.where(inside, plane, nowhere)
            dy_plane = jnp.where(own, plane + 1, nowhere)
            rows, columns = pl.ds(at.row - before[0], s.margin[0]), pl.ds(at.column - before[1], s.margin[1])
            mine = pl.ds(share * s.pieces, s.pieces)
            _copy(x, (x_plane, rows, columns, mine), xs.at[slot], full.at[slot])
            whole = (dy_plane, pl.ds(at.row, w.rows), pl.ds(at.column, w.columns), pl.ds(0, out_pieces))
            _copy(dy, whole, dys.at[slot], full.at[slot])

        def compute(step, sums):
            plgpu.barrier_wait(full.at[slot_of(step)])
            slots = [slot_of(step - back) for back in range(KERNEL)]
            sums = _multiply(s, xs.at[slots[0]], [dys.at[k] for k in slots], worker, sums)
            plgpu.barrier_arrive(free.at[slots[-1]])
            return sums

        @pl.when(worker < KERNEL)
        def _():
            plgpu.set_max_registers(152, action="increase")
            none = jnp.zeros((OUTPUTS, columns_of_sums), F32)
            if not interpreting():
                none = plgpu.layout_cast(none, plgpu.Layout.WGMMA)
            for step in range(2):
                plgpu.barrier_wait(full.at[step])
            sums = lax.fori_loop(2, steps, compute, (none,) * KERNEL)
            for back in (2, 1):
                plgpu.barrier_arrive(free.at[slot_of(steps - back)])
            for kd in range(KERNEL):
                out[entry, block, share, worker, kd] = sums[kd]

        @pl.when(worker == KERNEL)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, steps, bring, None)
            lax.fori_loop(jnp.maximum(steps - s.slots, 0), steps, until_free, None)

    return launch(
        kernel,
        "conv3d_weight_gradient",
        s,
        out_type=jax.ShapeDtypeStruct((s.batch, w.blocks, s.shares, KERNEL, KERNEL, OUTPUTS, columns_of_sums), F32),
        scratch_types=[
            # In this order: what an instruction reads behind the output channels is then shared memory too.
            plgpu.SMEM((s.slots, w.rows, out_pieces, w.columns, PIECE), jnp.bfloat16),
            plgpu.SMEM((s.slots, s.margin[0], s.pieces, s.margin[1], PIECE), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2, num_barriers=s.slots),
            plgpu.Barrier(num_arrivals=KERNEL, num_barriers=s.slots),
        ],
        grid=(w.blocks, s.shares, s.batch),
        grid_names=("block", "share", "entry"),
        num_threads=KERNEL + 1,
        thread_name="worker",
    )


def _copy(source, at, target, barrier) -> None:
    """(rows, columns, pieces, 8) to (rows, pieces, columns, 8)."""
    plane, rows, columns, pieces = at
    if interpreting():
        plgpu.copy_gmem_to_smem(source.at[plane, rows, pieces, columns], target, barrier)
    else:
        plgpu.copy_gmem_to_smem(source.at[at], target.transpose((0, 2, 1, 3)), barrier)


def _multiply(s: Sizes, x, dys, kw, sums):
    """The sums of the three kd, each (64, kh * channels), with the share of this plane of x and three planes of dy."""
    if interpreting():
        return _multiply_interpreted(s, x, dys, kw, sums)
    result = plgpu.ShapeDtypeStruct(sums[0].shape, F32, layout=plgpu.Layout.WGMMA)
    x_row, dy_row = s.margin[1] * ROW_BYTES, s.walks.columns * ROW_BYTES
    eight = PIECE * ROW_BYTES  # voxels of a row

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), (plgpu.RefType(),) * KERNEL, (plgpu.Layout.WGMMA,) * KERNEL),
        return_type=(result,) * KERNEL,
    )
    def run(_, x, dys, sums):
        left = [products.Operand(dy, eight, dy_row, transposed=True) for dy in dys]
        right = products.Operand(x, eight, x_row, transposed=True)
        every = [
            products.Product(kd, kd, row * (s.outputs // PIECE) * dy_row + begin, row * s.pieces * x_row + begin)
            for row in range(s.walks.rows)
            for begin in range(0, dy_row, VOXELS * ROW_BYTES)
            for kd in range(KERNEL)
        ]
        return products.multiply_add(sums, left, right, every)

    return run(x.at[0, 0, pl.ds(kw * s.view.step, 1)], tuple(dys), tuple(sums))


def _multiply_interpreted(s: Sizes, x, dys, kw, sums):
    plane = x[...].astype(F32)
    planes = [dy[...].astype(F32) for dy in dys]
    plgpu.commit_smem()  # the copy engine does not wait for ordinary reads, as it does for the tensor cores'
    w = s.walks
    plane = lax.dynamic_slice(plane, (0, 0, kw * s.view.step, 0), (*plane.shape[:2], w.columns, PIECE))
    shifted = jnp.stack([plane[kh : kh + w.rows] for kh in range(s.view.kernel_rows)])
    results = []
    for dy, total in zip(planes, sums, strict=True):
        product = jnp.einsum("rpwc,kriwd->pckid", dy, shifted, precision="highest").reshape(s.outputs, -1)
        results.append(total + jnp.pad(product, ((0, OUTPUTS - s.outputs), (0, 0))))
    return tuple(results)
