"""Statistics and samples of a volume's intensities. Arrays are channels-last."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from mambahome_jax.ranges import SAMPLE_PERCENTILES

_SAMPLE = 200_000  # voxels at most: they are sorted within milliseconds, and show a share of 1 % to a tenth of it
_SLAB = 1 << 22  # voxels that a reduction widens to float64 at a time
_BLOCK = 1 << 15  # voxels that `voxel_digest` takes at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class IntensityStatistics:
    """Of one volume, one entry a channel.

    mean, std: over the voxels that are not 0 (over all where none is 0 or all are); population std, 0 replaced by 1.
    minimum, maximum: over all voxels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


def statistics(array: np.ndarray) -> IntensityStatistics:
    """Statistics of a volume (D, H, W, C), in float64."""
    if array.ndim != 4:
        raise ValueError(f"array {array.shape}; expected (D, H, W, C)")
    channels = [array[..., c] for c in range(array.shape[3])]
    moments = [_moments(channel) for channel in channels]
    return IntensityStatistics(
        mean=tuple(mean for mean, _ in moments),
        std=tuple(std for _, std in moments),
        minimum=tuple(float(channel.min()) for channel in channels),
        maximum=tuple(float(channel.max()) for channel in channels),
    )


def statistics_of_parts(
    parts: Iterable[np.ndarray], counted: Iterable[np.ndarray] | None = None
) -> IntensityStatistics:
    """`statistics` of a volume of which only one part (D, H, W, C) at a time is there, but for rounding in float64.

    counted: bool of each part's shape, the voxels that mean and std are of; None: those that are not 0.
    """
    channels: list[_Running] = []
    for part, used in zip(parts, repeat(None) if counted is None else counted, strict=counted is not None):
        channels = channels or [_Running() for _ in range(part.shape[3])]
        for channel, running in enumerate(channels):
            values = part[..., channel]
            running.add(values, values[values != 0 if used is None else used[..., channel]])
    return IntensityStatistics(
        mean=tuple(running.mean for running in channels),
        std=tuple(running.std for running in channels),
        minimum=tuple(running.minimum for running in channels),
        maximum=tuple(running.maximum for running in channels),
    )


def voxel_digest(array: np.ndarray) -> str:
    """Digest of the voxels of a volume (D, H, W[, C]) as float32, whatever its orientation, file or stored type.

    A sum over the voxels, so that the order of the axes and their directions do not count.
    """
    total = 0
    # As they lie in memory: a view, where a walk along the axes would copy.
    flat = array.ravel(order="K")
    for start in range(0, flat.size, _BLOCK):
        bits = (flat[start : start + _BLOCK].astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: -0 becomes 0
        # Spread the bits (the finalizer of MurmurHash3), so that sums of other values are other sums.
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        total += int(bits.sum(dtype=np.uint64))
    shape = (*sorted(array.shape[:3]), array.shape[3] if array.ndim == 4 else 1)
    return hashlib.sha256(f"{shape} {total}".encode()).hexdigest()[:16]


def intensity_sample(array: np.ndarray) -> np.ndarray:
    """Values of up to 200,000 voxels spread over a volume (D, H, W, C): (n, C), each channel in ascending order.

    The type is that of `array`. A channel is of one value only where all its voxels are.
    """
    step = 1
    while math.prod(-(-n // step) for n in array.shape[:3]) > _SAMPLE:
        step += 1
    # A grid with a step for each axis: every n-th voxel of the flat array may be the same column of every row.
    sample = np.sort(array[::step, ::step, ::step].reshape(-1, array.shape[3]), axis=0)
    for channel in np.flatnonzero(sample[0] == sample[-1]) if step > 1 else ():
        whole = array[..., channel]
        sample[0, channel], sample[-1, channel] = whole.min(), whole.max()
    return sample


def sample_percentiles(sample: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """SAMPLE_PERCENTILES of each channel of a sorted sample (n, C)."""
    shares = [percentile / 100 for percentile in SAMPLE_PERCENTILES]
    return tuple(tuple(sorted_quantile(channel, share) for share in shares) for channel in sample.T)


def sorted_quantile(ordered: np.ndarray, share: float) -> float:
    """As numpy.quantile of a sorted vector, which takes a quarter of a millisecond to begin with."""
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * (place - below)


class _Running:
    """Moments of chosen voxels, joined part by part (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, 0.0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, part: np.ndarray, used: np.ndarray) -> None:
        """Take in a part, of which the values `used` count for the moments."""
        self.minimum, self.maximum = min(self.minimum, float(part.min())), max(self.maximum, float(part.max()))
        if not used.size:
            return
        mean = float(used.sum(dtype=np.float64)) / used.size
        difference = used.astype(np.float64) - mean
        square = float(np.square(difference, out=difference).sum())
        count, gap = self.count + used.size, mean - self.mean
        self.square += square + gap**2 * self.count * used.size / count
        self.mean += gap * used.size / count
        self.count = count

    @property
    def std(self) -> float:
        return _resolved(math.sqrt(self.square / self.count) if self.count else 0.0, self.mean)


def _moments(array: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation in float64, in two passes over small parts; 0 deviation gives 1."""
    flat = array.ravel(order="K")
    parts = [flat[i : i + _SLAB] for i in range(0, flat.size, _SLAB)]
    count = int(np.count_nonzero(flat))
    only_used = 0 < count < flat.size
    count = count if only_used else flat.size
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / count
    square = 0.0
    for part in parts:
        used = part[part != 0] if only_used else part
        difference = used.astype(np.float64) - mean
        # Not a product of vectors: BLAS rounds it otherwise with every number of threads.
        square += float(np.square(difference, out=difference).sum())
    return mean, _resolved(float(np.sqrt(square / count)), mean)


def _resolved(std: float, mean: float) -> float:
    # What float32 cannot resolve is a constant volume with rounding noise, not contrast.
    return std if std > 1e-7 * abs(mean) else 1.0
