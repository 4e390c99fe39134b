"""The tensor cores' products of what lies in shared memory without swizzle, into sums in registers.

Without swizzle a core matrix is eight rows of 16 bytes, one after another, wherever they begin: so a tap of the kernel
is an offset. With swizzle, as Pallas' own wgmma asks for, a shift by one voxel would need a copy of its own.
"""

import importlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, nvvm
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils

# The package has a function of the module's name.
_wgmma = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")


class Operand(NamedTuple):
    """Where the core matrices of an operand lie: its first element, bytes to the next along K, and along M or N.

    transposed: rows of core matrices run along M or N, not along K.
    """

    ref: ir.Value
    along_k: int
    along_other: int
    transposed: bool

    def descriptor(self) -> ir.Value:
        return mma_utils.encode_descriptor(self.ref, self.along_k, self.along_other, None)


class Product(NamedTuple):
    """Which sums it belongs to, its left operand, and where in both operands it begins, in bytes."""

    sums: int
    left: int
    left_offset: int
    right_offset: int


def _joined(registers: np.ndarray) -> fa.FragmentedArray:
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT_ACC_32BIT, _is_signed=None)


def zeros_like(a: fa.FragmentedArray) -> fa.FragmentedArray:
    f32 = ir.F32Type.get()
    zero = llvm.ConstantOp(f32, ir.FloatAttr.get(f32, 0.0)).result
    return fa.FragmentedArray.splat(zero, a.shape, fa.WGMMA_LAYOUT)


def side_by_side(arrays: Sequence[fa.FragmentedArray]) -> fa.FragmentedArray:
    """Along the second axis."""
    registers = [a.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers for a in arrays]
    return _joined(np.concatenate(registers, axis=1)).to_layout(fa.WGMMA_LAYOUT)


def apart(array: fa.FragmentedArray, parts: int) -> tuple[fa.FragmentedArray, ...]:
    registers = array.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
    return tuple(_joined(r).to_layout(fa.WGMMA_LAYOUT) for r in np.split(registers, parts, axis=1))


def multiply_add(
    sums: Sequence[fa.FragmentedArray], left: Sequence[Operand], right: Operand, products: Iterable[Product]
) -> tuple[fa.FragmentedArray, ...]:
    """Adds all products to the sums, when all are done.

    sums (64, n) in float32; products of 64 x 16 and 16 x n, bfloat16.
    """
    i64, bf16 = ir.IntegerType.get_signless(64), ir.BF16Type.get()
    registers = [_wgmma.wgmma_fence(a.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT)).registers for a in sums]
    lefts, rights = [operand.descriptor() for operand in left], right.descriptor()

    def moved(descriptor: ir.Value, offset: int) -> ir.Value:
        step = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(offset))).result
        return llvm.add(descriptor, step, overflow_flags=llvm.IntegerOverflowFlags.none)

    for p in products:
        registers[p.sums] = _wgmma.wgmma_m64(
            registers[p.sums],
            moved(lefts[p.left], p.left_offset),
            moved(rights, p.right_offset),
            a_transpose=left[p.left].transposed,
            b_transpose=right.transposed,
            a_k_stride=32,
            b_k_stride=32,
            n=sums[p.sums].shape[1],
            swizzle=32,  # bytes of K that one call of it goes over, a single instruction's
            a_element_type=bf16,
            b_element_type=bf16,
        )
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)
    return tuple(fa.optimization_barrier(_joined(r)).to_layout(fa.WGMMA_LAYOUT) for r in registers)
