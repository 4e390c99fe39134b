"""A network over a volume of any size: overlapping windows, blended by weight.

Rules as MONAI's sliding_window_inference: which windows there are, their order, the padding of short axes and the
weights agree with it exactly.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.errors import ConfigError

Mode = Literal["gaussian", "constant"]
PaddingMode = Literal["edge", "constant"]
# Zeros around a scan smaller than a window, as around one smaller than a training patch (data.loader): networks see the
# whole window at once, and copies of the scan's border, which they were not trained on, cost them several percent.
PADDING_MODE: PaddingMode = "constant"
Memory = Literal["device", "host"]
Predict = Callable[[jax.Array], Any]
# Where a device does not say what it has (a CPU), its memory is the host's, and both ways need the same.
UNKNOWN_DEVICE_BUDGET = 8 << 30
# The floor under the Gaussian weights: without it a voxel near a window's corner would get a weight of 1e-11.
LOWEST_WEIGHT = 1e-3


def sliding_window(
    predict: Predict,
    image: np.ndarray | jax.Array,
    roi_size: int | Sequence[int],
    overlap: float | Sequence[float] = 0.5,
    mode: Mode = "gaussian",
    sw_batch_size: int = 4,
    padding_mode: PaddingMode = "edge",
    sigma_scale: float | Sequence[float] = 0.125,
    *,
    padding_value: float = 0.0,
    accumulate_on: Memory | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array | np.ndarray:
    """Predict a volume window by window and blend: sum(weight * prediction) / sum(weight).

    predict: (sw_batch_size, *roi, in) -> (sw_batch_size, *roi, classes), any callable on arrays. Each call has the
      same shape, the last one filled up with repeated windows, so that a jitted function compiles once.
    image: (D, H, W, in), floating point; integers become float32.
    roi_size: window in voxels; an entry <= 0 takes the whole axis. A shorter axis is padded, floor(missing / 2) before,
      and cut again: "edge" values, or the constant `padding_value`.
    overlap: share of a window that the next one covers, in [0, 1), also one an axis.
    mode: weights "gaussian" (standard deviation sigma_scale * roi, also one an axis) or "constant".
    accumulate_on: "device"; "host", slower, for sums that do not fit there; None chooses by the device's free memory.
    progress: called with (windows done, windows in all).

    Returns (D, H, W, classes) in float32, or float64 where `predict` gives that: a jax.Array, or with accumulation on
    the host an ndarray. Raises ConfigError for settings or shapes that do not fit.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise ConfigError(f"image has shape {tuple(image.shape)}; expected (D, H, W, channels), none of them 0")
    if sw_batch_size < 1:
        raise ConfigError(f"sw_batch_size is {sw_batch_size}; expected 1 or more")
    if padding_mode not in ("edge", "constant"):
        raise ConfigError(f"padding_mode is {padding_mode!r}; expected edge or constant")
    roi = window_size(image.shape[:3], roi_size)
    shape = tuple(max(n, r) for n, r in zip(image.shape[:3], roi, strict=True))
    starts = window_starts(shape, roi, overlap)
    weights = importance_map(roi, mode, sigma_scale)
    before = [(p - n) // 2 for p, n in zip(shape, image.shape[:3], strict=True)]
    padded = pad(np.asarray(image), before, shape, padding_mode, padding_value)

    sums: _DeviceSums | _HostSums | None = None
    for first in range(0, len(starts), sw_batch_size):
        corners = starts[first : first + sw_batch_size]
        filled = np.concatenate([corners, np.repeat(corners[-1:], sw_batch_size - len(corners), axis=0)])
        windows = np.stack([padded[tuple(slice(s, s + r) for s, r in zip(c, roi, strict=True))] for c in filled])
        predicted = jnp.asarray(predict(jnp.asarray(windows)))
        if predicted.ndim != 5 or predicted.shape[:4] != windows.shape[:4]:
            expected = (*windows.shape[:4], "classes")
            raise ConfigError(f"predict gave shape {predicted.shape} for windows {windows.shape}; expected {expected}")
        if sums is None:
            sums = _sums(accumulate_on, shape, predicted, weights)
        sums.add(predicted, filled, len(corners))
        if progress is not None:
            progress(first + len(corners), len(starts))
    assert sums is not None
    return _crop(sums.mean(), before, image.shape[:3])


def window_size(shape: Sequence[int], roi_size: int | Sequence[int]) -> tuple[int, ...]:
    """The window (voxels an axis) for a volume of `shape`: entries <= 0 become the whole axis."""
    entries = _per_axis(roi_size, len(shape), "roi_size")
    if any(r != int(r) for r in entries):
        raise ConfigError(f"roi_size is {roi_size}; expected whole numbers of voxels")
    return tuple(int(r) if r > 0 else int(n) for r, n in zip(entries, shape, strict=True))


def window_starts(shape: Sequence[int], roi: Sequence[int], overlap: float | Sequence[float]) -> np.ndarray:
    """First voxel of every window, (windows, axes) int64, last axis fastest. No axis may be shorter than its roi."""
    overlaps = _per_axis(overlap, len(shape), "overlap")
    if not all(0 <= o < 1 for o in overlaps):
        raise ConfigError(f"overlap is {overlap}; expected at least 0 and below 1")
    axes = []
    for size, window, share in zip(shape, roi, overlaps, strict=True):
        # Truncated in float64 as in MONAI: roi 10 with overlap 0.8 steps by 1, since 10 * (1 - 0.8) is below 2.
        step = window if size == window else max(int(window * (1 - share)), 1)
        count = math.ceil((size - window) / step) + 1
        axes.append([min(i * step, size - window) for i in range(count)])
    return np.array(list(product(*axes)), dtype=np.int64)


def importance_map(
    roi: Sequence[int], mode: Mode = "gaussian", sigma_scale: float | Sequence[float] = 0.125
) -> np.ndarray:
    """Weight of each voxel of a window, float32 of shape `roi`: ones, or a Gaussian round its centre with a floor."""
    if mode == "constant":
        return np.ones(roi, np.float32)
    if mode != "gaussian":
        raise ConfigError(f"mode is {mode!r}; expected gaussian or constant")
    scales = _per_axis(sigma_scale, len(roi), "sigma_scale")
    if not all(s > 0 for s in scales):
        raise ConfigError(f"sigma_scale is {sigma_scale}; expected positive numbers")
    weights = np.ones((), np.float32)
    for window, scale in zip(roi, scales, strict=True):
        offset = np.arange(window, dtype=np.float32) - np.float32((window - 1) / 2)
        weights = weights[..., None] * np.exp(-(offset**2) / np.float32(2 * (scale * window) ** 2))
    return np.maximum(weights, max(float(weights.min()), LOWEST_WEIGHT)).astype(np.float32)


def pad(
    image: np.ndarray, before: Sequence[int], shape: Sequence[int], mode: PaddingMode, value: float = 0.0
) -> np.ndarray:
    """(*shape, in) of an image (D, H, W, in), `before` voxels in front of each axis and the rest behind.

    mode: "edge" values or the constant `value`. Integers become float32.
    """
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
    widths = [(b, p - n - b) for b, p, n in zip(before, shape, image.shape[:3], strict=True)] + [(0, 0)]
    if not any(map(any, widths)):
        return image
    if mode == "edge":
        return np.pad(image, widths, mode="edge")
    return np.pad(image, widths, mode="constant", constant_values=value)


class _DeviceSums:
    """Weighted sums on the device, changed in place."""

    def __init__(self, shape: tuple[int, ...], classes: int, dtype: Any, weights: np.ndarray):
        self.total = jnp.zeros((*shape, classes), dtype)
        self.weight = jnp.zeros(shape, dtype)
        self.weights = jnp.asarray(weights, dtype)
        self.running: list[jax.Array] = []

    def add(self, predicted: jax.Array, corners: np.ndarray, count: int) -> None:
        self.total, self.weight, done = _add(
            self.total, self.weight, predicted, self.weights, corners.astype(np.int32), count
        )
        # Two calls in flight keep the device busy; more would only hold their windows in its memory.
        self.running.append(done)
        if len(self.running) > 2:
            self.running.pop(0).block_until_ready()

    def mean(self) -> jax.Array:
        return _divide(self.total, self.weight)


class _HostSums:
    """The same in NumPy, for sums that are larger than the device's memory."""

    def __init__(self, shape: tuple[int, ...], classes: int, dtype: Any, weights: np.ndarray):
        self.total = np.zeros((*shape, classes), dtype)
        self.weight = np.zeros(shape, dtype)
        self.weights = weights.astype(dtype)

    def add(self, predicted: jax.Array, corners: np.ndarray, count: int) -> None:
        for corner, window in zip(corners[:count], np.asarray(predicted, self.total.dtype), strict=False):
            region = tuple(slice(s, s + r) for s, r in zip(corner, self.weights.shape, strict=True))
            self.total[region] += self.weights[..., None] * window
            self.weight[region] += self.weights

    def mean(self) -> np.ndarray:
        self.total /= self.weight[..., None]
        return self.total


@partial(jax.jit, donate_argnums=(0, 1))
def _add(total, weight, predicted, weights, corners, count):
    def one(i, sums):
        total, weight = sums
        corner = tuple(corners[i, axis] for axis in range(3))
        corner_and_class = (*corner, jnp.zeros((), corners.dtype))
        region = jax.lax.dynamic_slice(total, corner_and_class, predicted.shape[1:])
        region += weights[..., None] * predicted[i].astype(total.dtype)
        total = jax.lax.dynamic_update_slice(total, region, corner_and_class)
        region = jax.lax.dynamic_slice(weight, corner, weights.shape) + weights
        return total, jax.lax.dynamic_update_slice(weight, region, corner)

    total, weight = jax.lax.fori_loop(0, count, one, (total, weight))
    return total, weight, weight[0, 0, 0]


@partial(jax.jit, donate_argnums=0)
def _divide(total, weight):
    return total / weight[..., None]


def _sums(where: Memory | None, shape: tuple[int, ...], predicted: jax.Array, weights: np.ndarray):
    classes, dtype = predicted.shape[-1], jnp.promote_types(predicted.dtype, jnp.float32)
    if where is None:
        needed = math.prod(shape) * (classes + 1) * dtype.itemsize
        where = "device" if needed <= budget(next(iter(predicted.devices()))) else "host"
    if where not in ("device", "host"):
        raise ConfigError(f"accumulate_on is {where!r}; expected device or host")
    return (_DeviceSums if where == "device" else _HostSums)(shape, classes, dtype, weights)


def budget(device: jax.Device) -> float:
    """Bytes that sums may take on a device: half of what it has left."""
    statistics = device.memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return UNKNOWN_DEVICE_BUDGET
    # The other half is for the network's own activations and for bringing the result back to the scan's grid.
    return 0.5 * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))


def _crop(array: Any, before: list[int], shape: Sequence[int]) -> Any:
    if tuple(array.shape[:3]) == tuple(shape):
        return array
    return array[tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))]


def _per_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    values = (value,) * axes if np.ndim(value) == 0 else tuple(value)
    if len(values) != axes:
        raise ConfigError(f"{name} is {value}; expected one number, or one for each of {axes} axes")
    return values
