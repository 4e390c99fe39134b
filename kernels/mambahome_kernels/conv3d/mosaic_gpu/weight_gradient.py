"""Gradient by the weights: a sum over all voxels of outer products, for 27 taps at once.

A block takes some input channels and keeps the sums of all taps in registers while it walks over tiles. Warpgroup kw
has the taps kw along width; one product of the tensor cores is (outputs, 16 voxels of a row) by (16 voxels shifted by
kw, the three kh times the input channels), since in shared memory the channels of a row are followed by those of the
next row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambahome_kernels.conv3d.mosaic_gpu import products
from mambahome_kernels.conv3d.mosaic_gpu.tiles import KERNEL, PIECE, ROW_BYTES, Walks, walks, with_margin
from mambahome_kernels.mosaic.launch import launch
from mambahome_kernels.mosaic.runtime import interpreting

F32 = jnp.float32
ROWS, COLUMNS = 8, 16  # of a tile; the voxels of a row are what one instruction sums over
OUTPUTS = 64  # rows of an instruction: output channels, and what lies behind them
SLOTS = 6  # planes in flight, three of which are in use


class Sizes(NamedTuple):
    walks: Walks  # of one batch entry
    batch: int
    inputs: int
    outputs: int

    @property
    def pieces(self) -> int:
        """Of the input channels of a block: as many as sums of all taps fit into registers."""
        return next(n for n in (3, 2, 1) if self.inputs // PIECE % n == 0)

    @property
    def shares(self) -> int:
        """Blocks that divide the input channels among them."""
        return self.inputs // PIECE // self.pieces

    @property
    def margin(self) -> tuple[int, int]:
        return with_margin(ROWS, COLUMNS, self.pieces)


def sizes_of(shape: tuple[int, ...], outputs: int, blocks: int, run: int | None = None) -> Sizes:
    batch, *grid, inputs = shape
    none = Sizes(walks((1, *grid), ROWS, COLUMNS, 1, run), batch, inputs, outputs)
    share = max(1, blocks // (none.shares * batch))
    return none._replace(walks=walks((1, *grid), ROWS, COLUMNS, share, run))


def weight_gradient(x: jax.Array, dy: jax.Array, s: Sizes) -> jax.Array:
    """(batch, 3, 3, 3, inputs, outputs) in float32: of every batch entry."""
    shape = s.batch * s.walks.depth, s.walks.height, s.walks.width
    xs = x.reshape(*shape, s.inputs // PIECE, PIECE)
    dys = dy.reshape(*shape, s.outputs // PIECE, PIECE)
    if interpreting():  # which reads no zeros before the beginning of an array, and copies without transposing
        xs = jnp.pad(xs, ((0, 1), (1, 1), (1, 1), (0, 0), (0, 0))).swapaxes(2, 3)
        dys = jnp.pad(dys, ((0, 1), (0, 0), (0, 0), (0, 0), (0, 0))).swapaxes(2, 3)
    parts = _kernel(s)(xs, dys)[..., : s.outputs, :].sum(1)
    parts = parts.reshape(s.batch, s.shares, KERNEL, KERNEL, s.outputs, KERNEL, s.pieces * PIECE)
    # (batch, share, kw, kd, outputs, kh, inputs of a share)
    return parts.transpose(0, 3, 5, 2, 1, 6, 4).reshape(s.batch, *(KERNEL,) * 3, s.inputs, s.outputs)


def _kernel(s: Sizes):
    w = s.walks
    before = 0 if interpreting() else 1
    channels = s.pieces * PIECE
    out_pieces = s.outputs // PIECE

    def kernel(x, dy, out, dys, xs, full, free):
        worker, block = lax.axis_index("worker"), lax.axis_index("block")
        share, entry = lax.axis_index("share"), lax.axis_index("entry")
        # Two more at the beginning, of zeros: a plane of x meets the three planes of dy around it.
        steps = w.all_steps(block) + 2

        def slot_of(step):
            return lax.rem(step, jnp.int32(SLOTS))

        def until_free(step, _):
            plgpu.barrier_wait(free.at[slot_of(step)])

        def bring(step, _):
            at, slot = w.place(jnp.maximum(step - 2, 0), block), slot_of(step)
            pl.when(step >= SLOTS)(lambda: until_free(step, None))
            z = at.first + at.plane - 1
            inside = (step >= 2) & (z >= 0) & (z < w.depth)
            own = (step >= 2) & (at.plane < w.run) & (z + 1 < w.depth)
            # Past the end of an array, and before its beginning, the copy engine reads zeros.
            nowhere = s.batch * w.depth
            x_plane = jnp.where(inside, entry * w.depth + z, nowhere)
            dy_plane = jnp.where(own, entry * w.depth + z + 1, nowhere)
            rows, columns = pl.ds(at.row - before, s.margin[0]), pl.ds(at.column - before, s.margin[1])
            mine = pl.ds(share * s.pieces, s.pieces)
            _copy(x, (x_plane, rows, columns, mine), xs.at[slot], full.at[slot])
            whole = (dy_plane, pl.ds(at.row, ROWS), pl.ds(at.column, COLUMNS), pl.ds(0, out_pieces))
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
            none = jnp.zeros((OUTPUTS, KERNEL * channels), F32)
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
            lax.fori_loop(jnp.maximum(steps - SLOTS, 0), steps, until_free, None)

    return launch(
        kernel,
        "conv3d_weight_gradient",
        s,
        out_type=jax.ShapeDtypeStruct((s.batch, w.blocks, s.shares, KERNEL, KERNEL, OUTPUTS, KERNEL * channels), F32),
        scratch_types=[
            # In this order: what an instruction reads behind the output channels is then shared memory too.
            plgpu.SMEM((SLOTS, ROWS, out_pieces, COLUMNS, PIECE), jnp.bfloat16),
            plgpu.SMEM((SLOTS, s.margin[0], s.pieces, s.margin[1], PIECE), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=KERNEL, num_barriers=SLOTS),
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
    x_row, dy_row = s.margin[1] * ROW_BYTES, COLUMNS * ROW_BYTES
    half = PIECE * ROW_BYTES  # of the voxels of a row

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), (plgpu.RefType(),) * KERNEL, (plgpu.Layout.WGMMA,) * KERNEL),
        return_type=(result,) * KERNEL,
    )
    def run(_, x, dys, sums):
        left = [products.Operand(dy, half, dy_row, transposed=True) for dy in dys]
        right = products.Operand(x, half, x_row, transposed=True)
        offsets = [
            (kd, row * (s.outputs // PIECE) * dy_row, row * s.pieces * x_row)
            for row in range(ROWS)
            for kd in range(KERNEL)
        ]
        return products.multiply_add(sums, left, right, offsets)

    return run(x.at[0, 0, pl.ds(kw, 1)], tuple(dys), tuple(sums))


def _multiply_interpreted(s: Sizes, x, dys, kw, sums):
    plane = x[...].astype(F32)
    planes = [dy[...].astype(F32) for dy in dys]
    plgpu.commit_smem()  # the copy engine does not wait for ordinary reads, as it does for the tensor cores'
    plane = lax.dynamic_slice(plane, (0, 0, kw, 0), (*plane.shape[:2], COLUMNS, PIECE))
    shifted = jnp.stack([plane[kh : kh + ROWS] for kh in range(KERNEL)])
    results = []
    for dy, total in zip(planes, sums, strict=True):
        product = jnp.einsum("rpwc,kriwd->pckid", dy, shifted, precision="highest").reshape(s.outputs, -1)
        results.append(total + jnp.pad(product, ((0, OUTPUTS - s.outputs), (0, 0))))
    return tuple(results)
