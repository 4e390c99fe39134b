"""Patch and grids of a network for scans of given voxels, as the planner of nnU-Net 2.8 chooses them, and the batch of
the U-Nets (Isensee et al. 2021 and 2024).

Its estimate of memory counts what all convolutions put out; patch and batch fill a reference that stands for a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mambahome_jax.config import (
    MODEL_SIZES,
    Triple,
    UNetConfig,
    beyond_one_voxel,
    multiples_of,
    nearest_multiples,
    said_multiples,
    triple,
)
from mambahome_jax.errors import SizeError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing.step_memory import conv_outputs

_SMALLEST = (4, 2, 1)  # voxels left along an axis that is halved: the first of these with which an axis can be
THICK = 3  # over so many times as long as the others are the voxels of thick slices along the axis across them
_MOST_STRIDES = 15  # of a U-Net
_ALIKE = 2  # voxel sizes below so many times the finest count as the same
# Of a U-Net.
_INITIAL_VOXELS = 256**3
_REFERENCE_BATCH, _LEAST_BATCH = 2, 2


class Grids(NamedTuple):
    """Fields of NetworkConfig, and the patch that they are for, raised to multiples."""

    patch_size: Triple
    strides: tuple[Triple, ...]
    kernel_sizes: tuple[Triple, ...]


def thick_axis(voxel_size: Sequence[float] | np.ndarray) -> int | None:
    """The axis across thick slices: voxels are over 3 times as long along it as along the others; None without one."""
    coarse = int(np.argmax(voxel_size))
    return coarse if voxel_size[coarse] > THICK * max(np.delete(voxel_size, coarse)) else None


def grids_for(spacing: Sequence[float], patch_size: Sequence[float], unet: bool = False) -> Grids:
    """Choose grids for patches of so many voxels of so many mm, as nnU-Net's planner does.

    unet: as many stages as leave 4 voxels along each axis that is halved, as nnU-Net has them; else four.

    Each stage halves the axes whose voxels are, at that stage, less than twice as long as the finest of those that have
    enough voxels left; so thick slices are left alone until the voxels within them are about as long. On each grid an
    axis has kernels of 3 once its voxels are less than twice as long as the finest, and of 1 before that; the deepest
    grid has 3 along all.
    """
    length, size, smallest = list(map(float, spacing)), list(patch_size), _SMALLEST[:1] if unet else _SMALLEST
    strides: list[Triple] = []
    kernels: list[Triple] = []
    wide = [False] * 3
    for _ in range(_MOST_STRIDES if unet else 4):
        halved = _halved(size, length, smallest)
        if unet and not halved and strides:
            break
        wide = [was or mm < _ALIKE * min(length) for was, mm in zip(wide, length, strict=True)]
        kernels.append(triple(3 if w else 1 for w in wide))
        strides.append(triple(2 if axis in halved else 1 for axis in range(3)))
        for axis in halved:
            size[axis], length[axis] = -(-size[axis] // 2), 2 * length[axis]
    kernels.append((3, 3, 3))
    whole = triple(math.ceil(n / m) * m for n, m in zip(patch_size, multiples_of(strides), strict=True))
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
        multiples = multiples_of(grids_for(spacing, patch).strides)
        nearest = nearest_multiples(wanted, multiples)
        # Up where the scan ends, so that it is covered; else to the nearest.
        sizes = zip(wanted, multiples, shape, nearest, strict=True)
        patch = [-(-n // m) * m if n >= whole else near for n, m, whole, near in sizes]
    found = grids_for(spacing, patch)
    return found._replace(patch_size=beyond_one_voxel(found.patch_size, multiples_of(found.strides)))


def _cut(millimetres: float, spacing: Sequence[float], shape: Sequence[int]) -> list[float]:
    return [min(n, millimetres / mm) for n, mm in zip(shape, spacing, strict=True)]


def _halved(size: Sequence[float], length: Sequence[float], smallest_allowed: Sequence[int]) -> list[int]:
    for smallest in smallest_allowed:
        able = [axis for axis in range(3) if size[axis] >= 2 * smallest]
        finest = min((length[axis] for axis in able), default=0)
        halved = [axis for axis in able if length[axis] < _ALIKE * finest]
        # One axis by itself has to be long, or the grid gets lopsided.
        if len(halved) > 1 or (halved and size[halved[0]] >= 3 * smallest):
            return halved
    return []


def choose_grids(
    flags: TrainConfig,
    shapes: Sequence[Triple],
    spacing: tuple[float, float, float],
    planned: Mapping[str, Any] | None = None,
) -> Grids:
    """The patch and grids of a training: by --strides and --patch_size, or those of a plan for the same patch.

    shapes: of the volumes, (cases, 3) voxels. planned: values of plan.json. The grids of a U-Net always follow the
    patch. Raises SizeError: a --patch_size that they do not divide.
    """
    network = MODEL_SIZES[flags.model].model
    unet = isinstance(network, UNetConfig)
    if flags.strides == "published" and not unet:
        return Grids(choose_patch(flags, shapes), network.strides, network.kernel_sizes)
    size = flags.patch_size
    if size is None and not unet:
        median = [round(n) for n in np.median(shapes, axis=0)]
        return patch_and_grids(spacing, median, math.prod(MODEL_SIZES[flags.model].patch_size))
    if size is None:
        size = triple(map(min, MODEL_SIZES[flags.model].patch_size, np.max(shapes, axis=0).tolist()))
    found = grids_for(spacing, size, unet)
    if planned and tuple(size) == planned.get("patch_size"):
        found = found._replace(**{name: planned[name] for name in ("strides", "kernel_sizes") if name in planned})
    return found._replace(patch_size=choose_patch(flags, shapes, multiples_of(found.strides)))


def choose_patch(flags: TrainConfig, shapes: Sequence[Triple], multiples: Triple = (16, 16, 16)) -> Triple:
    """--patch_size checked, or that of --model, cut to what covers the largest volume along each axis.

    multiples: `NetworkConfig.multiples` of the network.
    """
    if flags.patch_size is None:
        default, largest = MODEL_SIZES[flags.model].patch_size, np.max(shapes, axis=0).tolist()
        a, b, c = (min(d, -(-n // m) * m) for d, n, m in zip(default, largest, multiples, strict=True))
        return beyond_one_voxel((a, b, c), multiples)
    near = beyond_one_voxel(nearest_multiples(flags.patch_size, multiples), multiples)
    if near != tuple(flags.patch_size):
        given, valid = (" ".join(map(str, sizes)) for sizes in (flags.patch_size, near))
        said = said_multiples(multiples)
        text = f"--patch_size {given}; expected multiples of {said}, not all of them {said}, such as {valid}"
        raise SizeError(text, near)
    return near


@dataclass(frozen=True)
class Target:
    """What a plan fills. outputs: of the convolutions of one patch, at the reference batch of 2; gib: of the GPU that
    this stands for. share: of all voxels of the dataset that a batch may cover."""

    outputs: int
    gib: int
    share: float = 1.0


_LARGE = Target(2_100_000_000, 24)
TARGETS = {
    "PlainUNet": Target(560_000_000, 8, 0.05),
    "ResEncUNet": _LARGE,
    "ResEncUNet_M": Target(680_000_000, 8),
    "ResEncUNet_L": _LARGE,
    "ResEncUNet_XL": Target(3_600_000_000, 40),
}


class UNetPlan(NamedTuple):
    """A patch, its grids and batch, and the convolutions' outputs for one patch."""

    grids: Grids
    batch_size: int
    outputs: int


def plan_unet(
    model: str,
    spacing: Sequence[float],
    shape: Sequence[float],
    cases: int,
    classes: int,
    patch_size: Sequence[int] | None = None,
    target: Target | None = None,
) -> UNetPlan:
    """Choose patch, grids and batch.

    Args:
        model: a name of `--model`.
        spacing: (3,) mm, of the cases after resampling. shape: (3,) voxels, the median of theirs, which may be a half.
            Axes as our volumes have them; nnU-Net's arrays have them in reverse.
        cases: of the dataset. classes: background included.
        patch_size: one to keep, (3,) voxels, raised to what its grids divide.
        target: what to fill, by default that of the model.
    """
    target = target or TARGETS[model]
    network = MODEL_SIZES[model].model.replace(out_chans=classes)
    assert isinstance(network, UNetConfig)

    def planned(patch: Sequence[float]) -> tuple[Grids, int]:
        grids = grids_for(spacing, patch, unet=True)
        return grids, conv_outputs(network.with_grids(*grids[1:]), grids.patch_size)

    coarse = max((2, 1, 0), key=lambda axis: spacing[axis])
    # As long in mm along every axis, or as the median scan.
    inverse = 1 / np.array(spacing, float)
    cube = inverse * (_INITIAL_VOXELS / math.prod(inverse)) ** (1 / 3)
    initial = [min(round(n), whole) for n, whole in zip(cube, shape, strict=True)]
    grids, outputs = planned(initial if patch_size is None else patch_size)
    while patch_size is None and outputs > target.outputs:
        smaller = list(grids.patch_size)
        parts = [n / whole for n, whole in zip(smaller, shape, strict=True)]
        multiples = multiples_of(grids.strides)
        # An axis as short as its multiple, such as that of a single slice, would be gone; nnU-Net fails there.
        able = [a for a in range(3) if smaller[a] > multiples[a]]
        if not able:
            break
        # Of axes alike the last one in nnU-Net's order: ours in reverse, but the coarsest first.
        axis = max(able, key=lambda a: (parts[a], a != coarse, -a))
        trial = list(smaller)
        trial[axis] -= multiples[axis]
        smaller[axis] -= multiples_of(grids_for(spacing, trial, unet=True).strides)[axis]
        grids, outputs = planned(smaller)
    covered = math.prod(shape) * cases * target.share / math.prod(grids.patch_size)
    batch = min(round(target.outputs / outputs * _REFERENCE_BATCH), round(covered))
    return UNetPlan(grids, max(batch, _LEAST_BATCH), outputs)
