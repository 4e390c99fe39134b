"""A network over a volume of any size, in windows as MONAI's sliding_window_inference has them.

Windows are cut from slabs, and their predictions added up in tiles of one size, each of which exists only while windows
touch it: nothing is compiled for a volume's size, and no array has all classes of a whole volume. Neighbouring tiles
share a plane of voxels, so that what lies between two voxels can be interpolated from one tile.
"""

import gc
import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.support.devices import is_out_of_memory

Mode = Literal["gaussian", "constant", "nnunet"]
PaddingMode = Literal["edge", "constant"]
# Zeros around a scan smaller than a window, as around one smaller than a training patch (patches.loader): networks see
# the whole window at once, and copies of the scan's border, which they were not trained on, cost them several percent.
PADDING_MODE: PaddingMode = "constant"
Predict = Callable[[jax.Array], Any]
Progress = Callable[[int, int], None]  # windows done, windows in all
# (axis, start, stop) -> these planes of an image, (D, H, W, in) with the other axes whole
Slab = Callable[[int, int, int], np.ndarray]
Index = tuple[int, int, int]  # of a tile
Sums = tuple[jax.Array, jax.Array]  # of weight * prediction and of weight, for one tile and network
Slices = tuple[slice, ...]
# A box, or the indices of single voxels along each axis.
Place = tuple[slice, ...] | tuple[np.ndarray, ...]
# Where values go, which of the tile's they are, and the values with whether those of each network are finite.
Part = tuple[Place, Slices, tuple[jax.Array, jax.Array]]

# Where a device does not say what it has (a CPU), its memory is the host's.
UNKNOWN_DEVICE_BUDGET = 8 << 30
# The floor under the Gaussian weights: without it a voxel near a window's corner would get a weight of 1e-11.
LOWEST_WEIGHT = 1e-3
# Calls of the network for which windows are cut while it is at work: making a slab takes as long as a few.
_AHEAD = 4
# A window's depth of the last axis may have so many voxels, 1 GiB of 16 classes, before the axis is taken that is
# longest in windows, which needs least memory. The last mostly is, and another means another shape of tiles to compile.
FEW_VOXELS = 1 << 24
# Tiles in a window's length, along the axis in whose order windows come and along the others. On a CPU little memory
# counts: halves fit the windows where these overlap by half, and quarters keep what is alive little deeper than a
# window. On a GPU each tile that a window touches is a program to start, some 45 of them with the fine parts, and the
# starts took as long as the network.
FINE, COARSE = (4, 2), (2, 1)
# ResultFiles of tiles that may be on their way to the host while the device goes on.
_PENDING = 64
_FILLED_UP = 32  # windows of a call that may be copies, so that volumes of all sizes share one program


@dataclass(frozen=True)
class WindowSettings:
    """How a volume is cut into windows, and how their predictions are blended.

    roi: window in voxels. overlap, mode, padding_mode, sw_batch_size, sigma_scale, padding_value: see `sliding_window`.
    device_bytes: sums that take more are kept by the host, which is slower; None: half of what the device has left.
    """

    roi: tuple[int, ...]
    overlap: float | Sequence[float] = 0.5
    mode: Mode = "gaussian"
    padding_mode: PaddingMode = PADDING_MODE
    sw_batch_size: int = 4
    device_bytes: float | None = None
    sigma_scale: float | Sequence[float] = 0.125
    padding_value: float = 0.0


def window_size(shape: Sequence[int], roi_size: int | Sequence[int]) -> tuple[int, ...]:
    """Resolve the window (voxels an axis) for a volume of `shape`: entries <= 0 become the whole axis."""
    entries = _per_axis(roi_size, len(shape), "roi_size")
    if not all(isinstance(r, int | float | np.number) and r == int(r) for r in entries):
        raise ConfigError(f"roi_size is {roi_size}; expected whole numbers of voxels")
    return tuple(int(r) if r > 0 else int(n) for r, n in zip(entries, shape, strict=True))


def window_starts(
    shape: Sequence[int], roi: Sequence[int], overlap: float | Sequence[float], mode: Mode = "gaussian"
) -> np.ndarray:
    """First voxel of every window, (windows, axes) int64, last axis fastest. No axis may be shorter than its roi.

    They lie a step apart and the last at the end, as MONAI's; in mode "nnunet" evenly, as nnU-Net's.
    """
    overlaps = _per_axis(overlap, len(shape), "overlap")
    if not all(0 <= o < 1 for o in overlaps):
        raise ConfigError(f"overlap is {overlap}; expected at least 0 and below 1")
    axes = []
    for size, window, share in zip(shape, roi, overlaps, strict=True):
        if mode == "nnunet":
            gaps = math.ceil((size - window) / (window * (1 - share)))
            axes.append([round((size - window) / max(gaps, 1) * i) for i in range(gaps + 1)])
            continue
        # Truncated in float64 as in MONAI: roi 10 with overlap 0.8 steps by 1, since 10 * (1 - 0.8) is below 2.
        step = window if size == window else max(int(window * (1 - share)), 1)
        count = math.ceil((size - window) / step) + 1
        axes.append([min(i * step, size - window) for i in range(count)])
    return np.array(list(product(*axes)), dtype=np.int64)


def importance_map(
    roi: Sequence[int], mode: Mode = "gaussian", sigma_scale: float | Sequence[float] = 0.125
) -> np.ndarray:
    """Weight of each voxel of a window, float32 of shape `roi`: ones, or a Gaussian round its centre with a floor.

    In mode "nnunet" the Gaussian is that of nnU-Net, whose centre is a voxel, and which ends after 4 deviations.
    """
    if mode == "constant":
        return np.ones(roi, np.float32)
    if mode == "nnunet":
        return _nnunet_importance(roi)
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


def _nnunet_importance(roi: Sequence[int]) -> np.ndarray:
    weights = np.ones(())
    for window in roi:
        impulse = np.zeros(window)
        impulse[window // 2] = 1
        weights = weights[..., None] * ndimage.gaussian_filter1d(impulse, window / 8, mode="constant")
    weights *= 10 / weights.max()
    return np.where(weights > 0, weights, weights[weights > 0].min()).astype(np.float32)


def _per_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    values = (value,) * axes if np.ndim(value) == 0 else tuple(value)
    if len(values) != axes:
        raise ConfigError(f"{name} is {value}; expected one number, or one for each of {axes} axes")
    return values


class Windows:
    """Cuts windows out of an image of which only the planes that they need are kept.

    axis: along which windows come in order. before: voxels of padding in front of each axis of the image.
    """

    def __init__(
        self, slab: Slab, shape: Sequence[int], axis: int, before: Sequence[int], settings: WindowSettings
    ) -> None:
        self.slab, self.shape, self.axis, self.before, self.settings = slab, shape, axis, before, settings
        self.first = 0
        self.planes: np.ndarray | None = None

    def stacks(self, calls: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """`stack` of each, made by a thread ahead of its turn."""
        with ThreadPoolExecutor(1) as maker:
            waiting: deque[Future[np.ndarray]] = deque()
            try:
                for corners in calls:
                    waiting.append(maker.submit(self.stack, corners))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def stack(self, corners: np.ndarray) -> np.ndarray:
        """Cut the windows at `corners` (n, 3), in voxels of the padded image: (n, *roi, in)."""
        at = corners[:, self.axis] - self.before[self.axis]
        self._keep(max(int(at.min()), 0), min(int(at.max()) + self.settings.roi[self.axis], self.shape[self.axis]))
        return np.stack([self._window(corner) for corner in corners])

    def _keep(self, start: int, stop: int) -> None:
        end = self.first + (0 if self.planes is None else self.planes.shape[self.axis])
        if self.planes is None or start >= end:
            self.first, self.planes = start, self.slab(self.axis, start, stop)
        elif stop > end:
            old = np.moveaxis(self.planes, self.axis, 0)[start - self.first :]
            new = np.moveaxis(self.slab(self.axis, end, stop), self.axis, 0)
            self.first, self.planes = start, np.moveaxis(np.concatenate([old, new]), 0, self.axis)

    def _window(self, corner: np.ndarray) -> np.ndarray:
        assert self.planes is not None
        roi = self.settings.roi
        low = [int(c) - b for c, b in zip(corner, self.before, strict=True)]
        kept = [max(start, 0) for start in low]
        box = [slice(k, min(start + r, n)) for k, start, r, n in zip(kept, low, roi, self.shape, strict=True)]
        part = box[self.axis]
        box[self.axis] = slice(part.start - self.first, part.stop - self.first)
        window = self.planes[tuple(box)]
        if not np.issubdtype(window.dtype, np.floating):
            window = window.astype(np.float32)
        front = [k - start for k, start in zip(kept, low, strict=True)]
        widths = [(f, r - n - f) for f, r, n in zip(front, roi, window.shape[:3], strict=True)] + [(0, 0)]
        if not any(map(any, widths)):
            return window
        if self.settings.padding_mode == "edge":
            return np.pad(window, widths, mode="edge")
        return np.pad(window, widths, mode="constant", constant_values=self.settings.padding_value)


class Tiling:
    """How a volume, no axis shorter than a window, is cut into tiles.

    axis: along which windows come in order. edge: voxels from one tile to the next; a tile holds one more along each
    axis. parts: FINE or COARSE. few: see FEW_VOXELS.
    """

    def __init__(
        self, shape: Sequence[int], roi: Sequence[int], parts: tuple[int, int] = FINE, few: int = FEW_VOXELS
    ) -> None:
        self.shape, self.roi = tuple(shape), tuple(roi)
        longest = max(range(3), key=lambda a: shape[a] / roi[a])
        self.axis = 2 if math.prod(shape[:2]) * roi[2] <= few else longest
        self.edge = tuple(-(-r // parts[a != self.axis]) for a, r in enumerate(roi))
        self.count = tuple(-(-n // e) for n, e in zip(shape, self.edge, strict=True))

    def start(self, index: Index) -> tuple[int, ...]:
        """First voxel of a tile."""
        return tuple(i * e for i, e in zip(index, self.edge, strict=True))

    def touched(self, corner: Sequence[int]) -> product:
        """Indices of the tiles that share voxels with a window."""
        ranges = [
            range(max(-(-int(c) // e) - 1, 0), min((int(c) + r - 1) // e + 1, n))
            for c, r, e, n in zip(corner, self.roi, self.edge, self.count, strict=True)
        ]
        return product(*ranges)

    def is_whole(self, index: Index, next_corner: int | None) -> bool:
        """Whether no window from `next_corner` on along the axis touches the tile; None: no window is left."""
        return next_corner is None or (index[self.axis] + 1) * self.edge[self.axis] < next_corner

    def bytes_alive(self, classes: int, itemsize: int = 4) -> int:
        """Most that the tiles of one network take at a time, each with its sum of weights."""
        # One more than a window covers, and one that a call with windows at two places along the axis may add.
        layers = min(-(-self.roi[self.axis] // self.edge[self.axis]) + 2, self.count[self.axis])
        tiles = layers * math.prod(n for a, n in enumerate(self.count) if a != self.axis)
        return tiles * math.prod(e + 1 for e in self.edge) * (classes + 1) * itemsize


class Tiles:
    """Sums of weight * prediction and of weight for one network, on one device."""

    def __init__(
        self, tiling: Tiling, weights: np.ndarray, predicted: jax.Array, device_bytes: float | None, networks: int
    ) -> None:
        """predicted: any (n, *roi, classes) of the network. device_bytes: for the sums of all `networks`."""
        self.tiling, self.size, self.classes = tiling, tuple(e + 1 for e in tiling.edge), predicted.shape[-1]
        self.dtype = jnp.promote_types(predicted.dtype, jnp.float32)
        device = next(iter(predicted.devices()))
        needed = networks * tiling.bytes_alive(self.classes, self.dtype.itemsize)
        fits = needed <= (device_budget(device) if device_bytes is None else device_bytes)
        self.device = device if fits else jax.local_devices(backend="cpu")[0]
        self.weights = jax.device_put(weights.astype(self.dtype), self.device)
        self.alive: dict[Index, Sums] = {}
        # Arrays to use again: new ones between those that are freed leave holes, half a GiB of them on a CPU.
        self.spare: list[Sums] = []

    def add(self, predicted: jax.Array, corners: np.ndarray) -> jax.Array:
        """Add predictions (n, *roi, classes), of which the first len(corners) count; return what can be waited for."""
        predicted = jax.device_put(predicted, self.device)
        touching: dict[Index, list[int]] = defaultdict(list)
        for number, corner in enumerate(corners):
            for index in self.tiling.touched(corner):
                touching[index].append(number)
        done = predicted
        for index, numbers in touching.items():
            which = np.zeros(predicted.shape[0], np.int32)
            which[: len(numbers)] = numbers
            shifts = (corners[which] - self.tiling.start(index)).astype(np.int32)
            total, weight = self.alive.get(index) or self._zeros()
            *sums, done = _add(total, weight, predicted, self.weights, which, shifts, len(numbers))
            self.alive[index] = (sums[0], sums[1])
        return done

    def _zeros(self) -> Sums:
        if self.spare:
            return _cleared(*self.spare.pop())
        total = jnp.zeros((*self.size, self.classes), self.dtype, device=self.device)
        return total, jnp.zeros(self.size, self.dtype, device=self.device)


def device_budget(device: jax.Device) -> float:
    """Bytes that sums may take on a device: half of what it has left."""
    statistics = device.memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return UNKNOWN_DEVICE_BUDGET
    # The other half is for the network's own activations and for bringing the result back to the scan's grid.
    return 0.5 * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))


@partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
def _cleared(total, weight):
    return jnp.zeros_like(total), jnp.zeros_like(weight)


@partial(jax.jit, donate_argnums=(0, 1))
def _add(total, weight, predicted, weights, which, shifts, count):
    """Add to a tile the windows which[:count], whose corners lie at `shifts` (n, 3) in it."""

    def one(k, sums):
        total, weight = sums
        places = jnp.ix_(*(jnp.arange(n) - shifts[k, axis] for axis, n in enumerate(weight.shape)))
        inside = jnp.ones((), bool)
        for place, size in zip(places, weights.shape, strict=True):
            inside &= (place >= 0) & (place < size)
        # A gather, as a slice cannot begin outside of the window.
        at = tuple(jnp.clip(place, 0, size - 1) for place, size in zip(places, weights.shape, strict=True))
        share = jnp.where(inside, weights[at], 0)
        window = predicted[(which[k], *at)].astype(total.dtype)
        return total + share[..., None] * window, weight + share

    total, weight = jax.lax.fori_loop(0, count, one, (total, weight))
    return total, weight, weight[0, 0, 0]


class Replica(NamedTuple):
    """A network on a device; None: wherever JAX puts it."""

    device: jax.Device | None
    predict: Predict


class TileTarget(Protocol):
    """What is made of tiles."""

    def begin(self, tiling: Tiling, before: Sequence[int]) -> None:
        """Learn the tiles, which also cover the padding: `before` voxels in front of each axis."""

    def parts(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        """Start what a tile contributes, the sums of each network given."""

    def store(self, place: Place, values: np.ndarray) -> None:
        """Put values where `parts` said."""


def predict_tiled(
    networks: Sequence[Sequence[Replica]],
    slab: Slab,
    shape: Sequence[int],
    settings: WindowSettings,
    targets: Sequence[TileTarget],
    progress: Progress | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> None:
    """Predict an image window by window, and give each tile to the targets once no window touches it any more.

    Where a device runs out of memory, all begins anew with fewer windows in a call, and at last with sums on the host.
    networks: each on every device that takes part; `progress` counts the windows of all; `say` is told of less memory.
    Raises ConfigError (predictions of a wrong shape) and CheckpointError (predictions that are not finite).
    """

    def predict(settings: WindowSettings) -> None:
        padded = tuple(max(n, r) for n, r in zip(shape, settings.roi, strict=True))
        before = tuple((p - n) // 2 for p, n in zip(padded, shape, strict=True))
        tiling = Tiling(padded, settings.roi, parts_for(networks[0][0].device))
        windows = Windows(slab, shape, tiling.axis, before, settings)
        for target in targets:
            target.begin(tiling, before)
        pending: deque[tuple[TileTarget, Part]] = deque()
        for index, sums in _whole_tiles(networks, windows, tiling, progress):
            pending.extend((target, part) for target in targets for part in target.parts(index, sums))
            while len(pending) > _PENDING:
                _finish(*pending.popleft())
        while pending:
            _finish(*pending.popleft())

    while True:
        try:
            return predict(settings)
        except jax.errors.JaxRuntimeError as error:
            smaller = with_less_memory(settings) if is_out_of_memory(error) else None
            if smaller is None:
                raise
        # Only now, as the traceback of the error held what lies on the device.
        gc.collect()
        trying = "sums on the host" if smaller.device_bytes == 0 else f"{smaller.sw_batch_size} in a call"
        say(f"out of device memory with {settings.sw_batch_size} windows in a call of the network; trying {trying}")
        settings = smaller


def without_copies(settings: WindowSettings, shape: Sequence[int]) -> WindowSettings:
    """Lower a large sw_batch_size to what a volume can fill, to a power of two: each other shape is compiled."""
    padded = [max(n, r) for n, r in zip(shape, settings.roi, strict=True)]
    count = len(window_starts(padded, settings.roi, settings.overlap, settings.mode))
    most = max(1 << (count - 1).bit_length(), _FILLED_UP)
    return replace(settings, sw_batch_size=min(settings.sw_batch_size, most))


def with_less_memory(settings: WindowSettings) -> WindowSettings | None:
    """Half of the windows in a call, then sums on the host unless their place was chosen; None: nothing is left."""
    if settings.sw_batch_size > 1:
        return replace(settings, sw_batch_size=settings.sw_batch_size // 2)
    return replace(settings, device_bytes=0) if settings.device_bytes is None else None


def parts_for(device: jax.Device | None) -> tuple[int, int]:
    """How finely volumes are cut for a device, see FINE. None: the default one."""
    return FINE if (jax.default_backend() if device is None else device.platform) == "cpu" else COARSE


def _finish(target: TileTarget, part: Part) -> None:
    place, inside, (values, finite) = part
    if not np.asarray(finite).all():
        count, number = len(finite), int(np.flatnonzero(~np.asarray(finite))[0]) + 1
        which = "the network" if count == 1 else f"network {number} of {count}"
        action = "Try --precision fp32; if that does not help, the weights are damaged."
        raise CheckpointError(f"{which} gave NaN or infinite logits for a scan of finite voxels. {action}")
    target.store(place, np.asarray(values)[inside])


def _whole_tiles(
    networks: Sequence[Sequence[Replica]], windows: Windows, tiling: Tiling, progress: Progress | None
) -> Iterator[tuple[Index, list[Sums]]]:
    settings, batch = windows.settings, windows.settings.sw_batch_size
    starts = window_starts(tiling.shape, settings.roi, settings.overlap, settings.mode)
    starts = starts[np.argsort(starts[:, tiling.axis], kind="stable")]
    # The last call is filled up, so that all have one shape.
    calls = [starts[first : first + batch] for first in range(0, len(starts), batch)]
    filled = (np.concatenate([c, np.repeat(c[-1:], batch - len(c), axis=0)]) for c in calls)
    weights = importance_map(settings.roi, settings.mode, settings.sigma_scale)
    sums: list[Tiles] = []
    running: deque[jax.Array] = deque()
    done = 0
    for number, (corners, stacked) in enumerate(zip(calls, windows.stacks(filled), strict=True)):
        for member, replicas in enumerate(networks):
            replica = replicas[number % len(replicas)]
            predicted = jnp.asarray(replica.predict(jax.device_put(stacked, replica.device)))
            _check(predicted, stacked, sums)
            if len(sums) == member:
                sums.append(Tiles(tiling, weights, predicted, settings.device_bytes, len(networks)))
            running.append(sums[member].add(predicted, corners))
            # One call in flight more than there are devices keeps them busy; others would only hold their windows in
            # the memory of the first. A CPU would run both at a time, no faster, and need the memory of both.
            on_cpu = next(iter(predicted.devices())).platform == "cpu"
            del predicted
            while len(running) > len(replicas) + (-1 if on_cpu else 1):
                running.popleft().block_until_ready()
            done += len(corners)
            if progress is not None:
                progress(done, len(starts) * len(networks))
        next_corner = int(calls[number + 1][0, tiling.axis]) if number + 1 < len(calls) else None
        for index in [index for index in sums[0].alive if tiling.is_whole(index, next_corner)]:
            taken = [tiles.alive.pop(index) for tiles in sums]
            yield index, taken
            for tiles, used in zip(sums, taken, strict=True):
                tiles.spare.append(used)


def _check(predicted: jax.Array, windows: np.ndarray, sums: Sequence[Tiles]) -> None:
    if predicted.ndim != 5 or predicted.shape[:4] != windows.shape[:4]:
        expected = (*windows.shape[:4], "classes")
        raise ConfigError(f"predict gave shape {predicted.shape} for windows {windows.shape}; expected {expected}")
    if sums and predicted.shape[-1] != sums[0].classes:
        raise ConfigError(f"models of one ensemble gave {sums[0].classes} and {predicted.shape[-1]} classes")
