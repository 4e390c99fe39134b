"""Patch and batch of the U-Nets as the planner of nnU-Net 2.8 chooses them (Isensee et al. 2021 and 2024).

Its estimate of memory counts what all convolutions put out; patch and batch fill a reference that stands for a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mambahome_jax.config import MODEL_SIZES, UNetConfig, multiples_of
from mambahome_jax.preprocessing.grids import Grids, grids_for
from mambahome_jax.preprocessing.step_memory import conv_outputs

_INITIAL_VOXELS = 256**3
_REFERENCE_BATCH, _LEAST_BATCH = 2, 2


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
    patch = _initial_patch(spacing, shape) if patch_size is None else patch_size
    grids, outputs = planned(patch)
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


def _initial_patch(spacing: Sequence[float], shape: Sequence[float]) -> list[float]:
    """As long in mm along every axis, or as the median scan."""
    inverse = 1 / np.array(spacing, float)
    cube = inverse * (_INITIAL_VOXELS / math.prod(inverse)) ** (1 / 3)
    return [min(round(n), whole) for n, whole in zip(cube, shape, strict=True)]
