"""Patch and grids of a network for scans of given voxels, as nnU-Net's planner chooses them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mambahome_jax.config import ModelConfig, Triple, beyond_one_voxel, nearest_multiples, triple

_SMALLEST = (4, 2, 1)  # voxels left along an axis that is halved: the first of these with which an axis can be
THICK = 3  # over so many times as long as the others are the voxels of thick slices along the axis across them
_ALIKE = 2  # voxel sizes below so many times the finest count as the same


class Grids(NamedTuple):
    """Fields of ModelConfig, and the patch that they are for, raised to multiples."""

    patch_size: Triple
    strides: tuple[Triple, ...]
    kernel_sizes: tuple[Triple, ...]


def thick_axis(voxel_size: Sequence[float] | np.ndarray) -> int | None:
    """The axis across thick slices: voxels are over 3 times as long along it as along the others; None without one."""
    coarse = int(np.argmax(voxel_size))
    return coarse if voxel_size[coarse] > THICK * max(np.delete(voxel_size, coarse)) else None


def grids_for(spacing: Sequence[float], patch_size: Sequence[int]) -> Grids:
    """Choose grids for patches of so many voxels of so many mm, as nnU-Net's planner does.

    Each stage halves the axes whose voxels are, at that stage, less than twice as long as the finest of those that have
    enough voxels left; so thick slices are left alone until the voxels within them are about as long. On each grid an
    axis has kernels of 3 once its voxels are less than twice as long as the finest, and of 1 before that; the deepest
    grid has 3 along all.
    """
    length, size = list(map(float, spacing)), list(patch_size)
    strides: list[Triple] = []
    kernels: list[Triple] = []
    wide = [False] * 3
    for _ in range(4):
        wide = [was or mm < _ALIKE * min(length) for was, mm in zip(wide, length, strict=True)]
        kernels.append(triple(3 if w else 1 for w in wide))
        halved = _halved(size, length)
        strides.append(triple(2 if axis in halved else 1 for axis in range(3)))
        for axis in halved:
            size[axis], length[axis] = -(-size[axis] // 2), 2 * length[axis]
    kernels.append((3, 3, 3))
    multiples = ModelConfig(strides=tuple(strides)).multiples
    whole = triple(-(-n // m) * m for n, m in zip(patch_size, multiples, strict=True))
    return Grids(whole, tuple(strides), tuple(kernels))


def patch_and_grids(spacing: Sequence[float], shape: Sequence[int], voxels: int = 128**3) -> Grids:
    """Choose the patch of about so many voxels, and its grids.

    It is as long in mm along each axis as along the others, or as long as the scans (`shape`: the median of theirs),
    whichever is less.
    """
    low, high = 0.0, max(n * mm for n, mm in zip(shape, spacing, strict=True))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(_cut(middle, spacing, shape)) <= voxels else (low, middle)
    wanted = [max(1, round(n)) for n in _cut(low, spacing, shape)]
    patch = wanted
    # Once more for the patch that is whole: a few voxels may decide whether an axis is halved.
    for _ in range(2):
        multiples = ModelConfig(strides=grids_for(spacing, patch).strides).multiples
        nearest = nearest_multiples(wanted, multiples)
        # Up where the scan ends, so that it is covered; else to the nearest.
        sizes = zip(wanted, multiples, shape, nearest, strict=True)
        patch = [-(-n // m) * m if n >= whole else near for n, m, whole, near in sizes]
    found = grids_for(spacing, patch)
    multiples = ModelConfig(strides=found.strides).multiples
    return found._replace(patch_size=beyond_one_voxel(found.patch_size, multiples))


def _cut(millimetres: float, spacing: Sequence[float], shape: Sequence[int]) -> list[float]:
    return [min(n, millimetres / mm) for n, mm in zip(shape, spacing, strict=True)]


def _halved(size: Sequence[int], length: Sequence[float]) -> list[int]:
    for smallest in _SMALLEST:
        able = [axis for axis in range(3) if size[axis] >= 2 * smallest]
        finest = min((length[axis] for axis in able), default=0)
        halved = [axis for axis in able if length[axis] < _ALIKE * finest]
        # One axis by itself has to be long, or the grid gets lopsided.
        if len(halved) > 1 or (halved and size[halved[0]] >= 3 * smallest):
            return halved
    return []
