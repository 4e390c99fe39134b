"""A scan as nnU-Net v2 brings it to its networks, and where its voxels lie on their grid.

Axes of the file in an order of the plans, crop to what is not 0, normalisation, then cubic splines with the voxels'
edges aligned: nnunetv2 2.8.1, preprocessing/{preprocessors/default_preprocessor,cropping/cropping,
resampling/default_resampling}.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
from scipy import ndimage

from mambahome_jax.forms import among, converted, entries, optional, text
from mambahome_jax.imaging.geometry import (
    SPLINE_REACH,
    Box,
    Limits,
    reorient,
    require_feasible,
    row_slabs,
    sample_by_axis,
)
from mambahome_jax.imaging.intensity import IntensityStatistics, statistics_of_parts
from mambahome_jax.imaging.normalisation import ChannelScheme, PerChannel, Scheme
from mambahome_jax.imaging.volume import Volume

Triple = tuple[int, int, int]
_ROUNDING = 1e-5  # share of a spacing by which an affine may miss it
_SEPARATE = 3  # times as long as the finest are the voxels of an axis that is resampled by itself


@dataclass(frozen=True)
class NnunetPreparation:
    """How nnU-Net prepares scans and reads the output of its networks, beside spacing and patch.

    axes: the array's axis along each of the network's. orientation: to which the array is turned before; None: it stays
    as the file has it. mirror_axes: of the network's, along which training mirrored; None: it did not. regions: the
    label value that each output writes where its sigmoid exceeds 1/2, later ones over earlier; () where the largest
    output is the label. region_values: the label values in each. configuration, trainer: their names in nnU-Net.
    """

    axes: Triple
    normalisation: PerChannel
    orientation: str | None = None
    mirror_axes: tuple[int, ...] | None = None
    regions: tuple[int, ...] = ()
    region_values: tuple[tuple[int, ...], ...] = ()
    configuration: str = "3d_fullres"
    trainer: str = "nnUNetTrainer"

    def __str__(self) -> str:
        schemes = ", ".join(str(channel) for channel in self.normalisation.channels)
        regions = f", regions {' '.join(map(str, self.regions))}" if self.regions else ""
        turned = f" of {self.orientation}" if self.orientation else ""
        return f"that of nnU-Net, axes {' '.join(map(str, self.axes))}{turned}, {schemes}{regions}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NnunetPreparation":
        """From `dataclasses.asdict`. Raises TypeError, ValueError, KeyError or ConfigError for anything else."""
        axis, number = among((0, 1, 2)), among(range(1, 1 << 16))
        fields = {
            "axes": _permutation(values["axes"]),
            "normalisation": PerChannel(entries(_scheme)(values["normalisation"]["channels"])),
            "orientation": optional(text)(values["orientation"]),
            "mirror_axes": optional(entries(axis))(values["mirror_axes"]),
            "regions": entries(number)(values["regions"]),
            # Checkpoints of earlier versions do not say.
            "region_values": entries(entries(number))(values.get("region_values", ())),
            "configuration": text(values["configuration"]),
            "trainer": text(values["trainer"]),
        }
        return cls(**fields)


def _permutation(values: Any) -> Triple:
    axes = entries(among((0, 1, 2)), 3)(values)
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"{axes} is no order of three axes")
    return axes[0], axes[1], axes[2]


def _scheme(values: Mapping[str, Any]) -> ChannelScheme:
    names = ("low", "high", "mean", "std")
    scheme = converted("scheme", values["scheme"], among(get_args(Scheme)), f"one of {', '.join(get_args(Scheme))}")
    return ChannelScheme(scheme, among((False, True))(values["masked"]), *(float(values[name]) for name in names))


@dataclass(frozen=True, eq=False)
class NnunetScan:
    """A scan (D, H, W, C) on its way to the network: axes in the network's order.

    oriented: all of it. crop: the box of what is not 0. spacing: mm of its voxels; target: of the network's. shape: of
    the network's grid, which spans the crop.
    """

    oriented: Volume
    crop: Box
    normalisation: PerChannel
    spacing: tuple[float, ...]
    target: tuple[float, ...]
    shape: Triple

    @classmethod
    def of(cls, volume: Volume, target: Sequence[float], preparation: NnunetPreparation) -> "NnunetScan":
        """From a volume (D0, D1, D2, C) in any real type. Raises DatasetError: far more voxels than can be meant."""
        volume = volume if preparation.orientation is None else reorient(volume, preparation.orientation)
        axes = preparation.axes
        oriented = Volume(volume.array.transpose(*axes, 3), volume.affine[:, [*axes, 3]], volume.header)
        crop = nonzero_box(oriented.array)
        sizes = [box.stop - box.start for box in crop]
        spacing = _stored_spacing(oriented)
        a, b, c = (max(round(s / t * n), 1) for s, t, n in zip(spacing, target, sizes, strict=True))
        before, after = np.array(sizes, np.float64), np.array([a, b, c], np.float64)
        require_feasible(before, after, np.array(spacing), np.array(target))
        return cls(oriented, crop, preparation.normalisation, spacing, tuple(target), (a, b, c))

    @property
    def array(self) -> np.ndarray:
        """The crop."""
        return self.oriented.array[self.crop]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): voxels of the network's grid to RAS mm."""
        steps = np.array(self.array.shape[:3]) / self.shape
        affine = self.oriented.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ ([box.start for box in self.crop] + (steps - 1) / 2)
        affine[:3, :3] *= steps
        return affine

    @cached_property
    def mask(self) -> np.ndarray | None:
        """(D, H, W) bool: voxels of the crop that are not 0 in every channel, and holes among them; None: unneeded."""
        if not self.normalisation.masked:
            return None
        return ndimage.binary_fill_holes((self.array != 0).any(axis=3))

    @cached_property
    def statistics(self) -> IntensityStatistics | None:
        """Of the crop, as the normalisation takes them."""
        if not self.normalisation.needs_statistics:
            return None
        parts = (self.array[rows].astype(np.float32) for rows in row_slabs(self.array.shape))
        return statistics_of_parts(parts, map(self._counted, row_slabs(self.array.shape)))

    def _counted(self, rows: slice) -> np.ndarray:
        """Which voxels of each channel mean and std are of."""
        masked, all_of_it = self.mask, np.ones(self.array[rows].shape[:3], bool)
        channels = self.normalisation.channels
        return np.stack([masked[rows] if c.masked and masked is not None else all_of_it for c in channels], axis=-1)

    def _normalised(self, box: tuple[slice, ...]) -> np.ndarray:
        mask = None if self.mask is None else self.mask[box]
        return self.normalisation(self.array[box], self.statistics, mask)

    @cached_property
    def _separate(self) -> int | None:
        return separate_axis(self.spacing, self.target)

    @cached_property
    def _limits(self) -> Limits:
        """Lowest and highest normalised values, of each channel and, where an axis is separate, of each slice."""
        axes = tuple(axis for axis in range(3) if axis != self._separate)
        ends = []
        for rows in row_slabs(self.array.shape):
            part = self._normalised((rows,))
            ends.append((part.min(axis=axes, keepdims=True), part.max(axis=axes, keepdims=True)))
        low, high = zip(*ends, strict=True)
        if self._separate == 0:
            return np.concatenate(low), np.concatenate(high)
        return np.minimum.reduce(low), np.maximum.reduce(high)

    @cached_property
    def _positions(self) -> list[np.ndarray]:
        """Of the network's voxels along each axis of the crop."""
        return aligned_positions(self.array.shape, self.shape, self._separate)

    def part(self, box: Box) -> np.ndarray:
        """A box of the image on the network's grid, (d, h, w, C) float32."""
        sizes = self.array.shape[:3]
        if sizes == self.shape:
            return self._normalised(box)
        used, positions = [], []
        for at, rows, size in zip(self._positions, box, sizes, strict=True):
            inside = at[rows]
            low = max(int(np.floor(inside.min())) - SPLINE_REACH, 0)
            used.append(slice(low, min(int(np.ceil(inside.max())) + SPLINE_REACH + 1, size)))
            positions.append(inside - low)
        turns = sorted(range(3), key=lambda axis: self.shape[axis] / sizes[axis])
        sampled = sample_by_axis(self._normalised(tuple(used)), positions, turns, ["cubic"] * 3)
        least, most = self._limits
        if (axis := self._separate) is not None:
            slices = self._positions[axis][box[axis]].astype(np.intp)
            least, most = least.take(slices, axis=axis), most.take(slices, axis=axis)
        return np.clip(sampled, least, most)

    def positions(self) -> list[np.ndarray]:
        """Where the crop's voxels lie along each axis of the network's grid, in voxels, for logits between them."""
        separate = separate_axis(self.target, self.spacing)
        exact = aligned_positions(self.shape, self.array.shape, separate)
        return [at.clip(0, size - 1) for at, size in zip(exact, self.shape, strict=True)]


def _stored_spacing(volume: Volume) -> tuple[float, ...]:
    """As the header stores it: an affine's columns have it with noise, and ratios of spacings are compared with 3."""
    header, lengths = volume.header, volume.spacing.tolist()
    if header is None or header.nifti is None:
        return tuple(float(np.float32(mm)) for mm in lengths)
    stored = [float(mm) * header.scale for mm in header.nifti["pixdim"][1:4]]
    close = [[mm for mm in stored if abs(mm - own) < _ROUNDING * own] for own in lengths]
    return tuple(mm[0] if mm else own for mm, own in zip(close, lengths, strict=True))


def nonzero_box(array: np.ndarray) -> Box:
    """The smallest box of an array (D, H, W, C) outside of which all is 0; all of it where nothing else is in it."""
    occupied = [np.zeros(size, bool) for size in array.shape[:3]]
    for rows in row_slabs(array.shape):
        used = (array[rows] != 0).any(axis=3)
        planes = used.any(axis=0)
        occupied[0][rows] = used.any(axis=(1, 2))
        occupied[1] |= planes.any(axis=1)
        occupied[2] |= planes.any(axis=0)
    if not occupied[0].any():
        occupied = [np.ones_like(axis) for axis in occupied]
    a, b, c = (slice(int(axis.argmax()), len(axis) - int(axis[::-1].argmax())) for axis in occupied)
    return a, b, c


def separate_axis(spacing: Sequence[float], other: Sequence[float]) -> int | None:
    """The axis along which nothing is interpolated from voxels of one spacing to another; None: along all it is.

    Of the first of the two in which one axis alone is coarsest, by more than 3 times the finest.
    """
    for millimetres in (spacing, other):
        if max(millimetres) / min(millimetres) > _SEPARATE:
            coarsest = [axis for axis, mm in enumerate(millimetres) if mm == max(millimetres)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def aligned_positions(shape: Sequence[int], new_shape: Sequence[int], nearest: int | None) -> list[np.ndarray]:
    """Where the voxels of a new grid lie along each axis of a grid that spans the same: float64, in its voxels.

    nearest: the axis on which they are those of the voxels that hold their centres.
    """
    positions = [(np.arange(new) + 0.5) * size / new - 0.5 for size, new in zip(shape, new_shape, strict=False)]
    if nearest is not None:
        positions[nearest] = np.floor(positions[nearest] + 0.5).clip(0, shape[nearest] - 1)
    return positions
