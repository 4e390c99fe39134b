"""From windows to labels tile by tile: no array has all classes of a whole volume, on the device or the host.

An image made slab by slab is cut into windows, their predictions are added up in tiles of one size, and each tile
exists only while windows touch it. Whatever the volume, the arrays on the device have the shape of a tile or a window:
nothing is compiled for a volume's size, and memory is needed for little more than one window's depth of the volume.
Neighbouring tiles share a plane of voxels, so that what lies between two voxels can be interpolated from one tile.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.inference.ensemble import log_mean_softmax
from mambahome_jax.inference.sliding_window import (
    Mode,
    PaddingMode,
    Predict,
    budget,
    importance_map,
    pad,
    window_starts,
)

Slab = Callable[[int, int, int], np.ndarray]
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

Index = tuple[int, int, int]
Sums = tuple[jax.Array, jax.Array]
# Results of tiles that may be on their way to the host while the device goes on.
_PENDING = 64

Slices = tuple[slice, ...]
# A box, or the indices of single voxels along each axis.
Place = tuple[slice, ...] | tuple[np.ndarray, ...]
# Where values go, which of the tile's they are, and the values with whether those of each network are finite.
Part = tuple[Place, Slices, tuple[jax.Array, jax.Array]]


class Windows:
    """Cuts windows out of an image of which only the planes that they need are kept.

    slab: (axis, start, stop) -> these planes, (D, H, W, in) with the other axes whole. shape: of the image.
    axis: along which no window begins before the first one of the call before. before: voxels of padding in front of
    each axis; it goes on behind as far as the window does.
    """

    def __init__(
        self, slab: Slab, shape: Sequence[int], axis: int, roi: Sequence[int], before: Sequence[int], mode: PaddingMode
    ) -> None:
        self.slab, self.shape, self.axis, self.roi, self.before, self.mode = slab, shape, axis, roi, before, mode
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
        """(n, *roi, in) of the windows at `corners` (n, 3), in voxels of the padded image."""
        at = corners[:, self.axis] - self.before[self.axis]
        self._keep(max(int(at.min()), 0), min(int(at.max()) + self.roi[self.axis], self.shape[self.axis]))
        return np.stack([self._window(corner) for corner in corners])

    def _keep(self, start: int, stop: int) -> None:
        there = self.first + (0 if self.planes is None else self.planes.shape[self.axis])
        if self.planes is None or start >= there:
            self.first, self.planes = start, self.slab(self.axis, start, stop)
        elif stop > there:
            old = np.moveaxis(self.planes, self.axis, 0)[start - self.first :]
            new = np.moveaxis(self.slab(self.axis, there, stop), self.axis, 0)
            self.first, self.planes = start, np.moveaxis(np.concatenate([old, new]), 0, self.axis)

    def _window(self, corner: np.ndarray) -> np.ndarray:
        assert self.planes is not None
        low = [int(c) - b for c, b in zip(corner, self.before, strict=True)]
        kept = [max(start, 0) for start in low]
        box = [slice(k, min(start + r, n)) for k, start, r, n in zip(kept, low, self.roi, self.shape, strict=True)]
        part = box[self.axis]
        box[self.axis] = slice(part.start - self.first, part.stop - self.first)
        return pad(
            self.planes[tuple(box)], [k - start for k, start in zip(kept, low, strict=True)], self.roi, self.mode
        )


class Tiling:
    """How a volume is cut.

    shape: of the volume in voxels, no axis shorter than `roi`, the window. axis: along which windows come in order.
    edge: voxels from one tile to the next; a tile holds one more along each axis. parts: FINE or COARSE. few: see
    FEW_VOXELS.
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
        self,
        tiling: Tiling,
        weights: np.ndarray,
        predicted: jax.Array,
        device_bytes: float | None = None,
        networks: int = 1,
    ) -> None:
        """weights: (*roi) of a window's voxels. predicted: any (n, *roi, classes) of the network.

        device_bytes: what the sums of all `networks` may take where it predicts; None: half of what is free there. If
        they would take more, they are kept by the host.
        """
        self.tiling, self.size, self.classes = tiling, tuple(e + 1 for e in tiling.edge), predicted.shape[-1]
        self.dtype = jnp.promote_types(predicted.dtype, jnp.float32)
        device = next(iter(predicted.devices()))
        fits = networks * tiling.bytes_alive(self.classes, self.dtype.itemsize) <= (
            budget(device) if device_bytes is None else device_bytes
        )
        self.device = device if fits else jax.local_devices(backend="cpu")[0]
        self.weights = jax.device_put(weights.astype(self.dtype), self.device)
        self.alive: dict[Index, Sums] = {}
        # Arrays to use again: new ones between those that are freed leave holes, half a GiB of them on a CPU.
        self.spare: list[Sums] = []

    def add(self, predicted: jax.Array, corners: np.ndarray) -> jax.Array:
        """Add predictions (n, *roi, classes), of which the first len(corners) count; returns what can be waited for."""
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

    def take(self, index: Index) -> Sums:
        """The sums of a tile, (*size, classes) and size, no longer kept here. Put them into `spare` after use."""
        return self.alive.pop(index)

    def _zeros(self) -> Sums:
        if self.spare:
            return _cleared(*self.spare.pop())
        total = jnp.zeros((*self.size, self.classes), self.dtype, device=self.device)
        return total, jnp.zeros(self.size, self.dtype, device=self.device)


@partial(jax.jit, static_argnames="dtype")
def label_tile(sums, matrices, dtype):
    """Largest class of interpolated logits, and whether each network's logits are finite.

    sums: (total, weight) of each network. matrices: (outputs, voxels of the tile) an axis, the shares of each voxel.
    """
    means, finite = _means(sums)
    logits = jnp.einsum("ai,bj,ck,ijkn->abcn", *matrices, log_mean_softmax(means), precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(logits, axis=-1).astype(dtype), finite


@jax.jit
def probabilities_of_tile(sums):
    """float16 softmax of a tile, without the planes that it shares with the next ones."""
    means, finite = _means(sums)
    return jax.nn.softmax(log_mean_softmax(means)[:-1, :-1, :-1], axis=-1).astype(jnp.float16), finite


@partial(jax.jit, static_argnames="dtype")
def label_points(sums, low, share, dtype):
    """As `label_tile`, of single points in a tile.

    low: (n, 3), the voxel below each point along every axis. share: (n, 3), what that above it counts.
    """
    means, finite = _means(sums)
    tile = log_mean_softmax(means)
    logits = jnp.zeros((low.shape[0], tile.shape[-1]), tile.dtype)
    for corner in product((0, 1), repeat=3):
        at = low + jnp.array(corner)
        weight = jnp.where(jnp.array(corner) == 1, share, 1 - share).prod(axis=1)
        logits += weight[:, None] * tile[at[:, 0], at[:, 1], at[:, 2]]
    return jnp.argmax(logits, axis=-1).astype(dtype), finite


def _means(sums: Sequence[Sums]) -> tuple[list[jax.Array], jax.Array]:
    # Voxels beyond the volume have no weight.
    means = [total / jnp.where(weight > 0, weight, 1)[..., None] for total, weight in sums]
    # A sum is finite if all of its terms are.
    return means, jnp.stack([jnp.isfinite(mean.sum()) for mean in means])


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


@dataclass(frozen=True)
class Replica:
    """A network on a device; None: wherever JAX puts it."""

    device: jax.Device | None
    predict: Predict


@dataclass(frozen=True)
class Stitching:
    """How a volume is cut into windows, and where their predictions are added.

    roi: window in voxels. overlap, mode, padding_mode, sw_batch_size: as in `sliding_window`.
    device_bytes: sums that take more are kept by the host, which is slower; None: half of what the device has left.
    """

    roi: tuple[int, ...]
    overlap: float | Sequence[float]
    mode: Mode
    padding_mode: PaddingMode
    sw_batch_size: int
    device_bytes: float | None = None


class Target(Protocol):
    """What is made of tiles."""

    def begin(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        """Start what a tile contributes, the sums of each network given."""

    def store(self, place: Place, values: np.ndarray) -> None:
        """Put values where `begin` said."""


def predict_tiled(
    networks: Sequence[Sequence[Replica]],
    slab: Slab,
    shape: Sequence[int],
    how: Stitching,
    targets: Callable[[Tiling, Sequence[int]], Sequence[Target]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predict an image window by window, and give each tile to the targets once no window touches it any more.

    networks: each on every device that takes part. slab, shape: the image, as `Windows` takes it.
    targets: made from the tiling and the voxels of padding in front of each axis, which the tiles cover too.
    progress: called with (windows done, windows in all), the windows of every network counted.
    Raises ConfigError (predictions of a wrong shape) and CheckpointError (predictions that are not finite).
    """
    padded = tuple(max(n, r) for n, r in zip(shape, how.roi, strict=True))
    before = tuple((p - n) // 2 for p, n in zip(padded, shape, strict=True))
    tiling = Tiling(padded, how.roi, parts_for(networks[0][0].device))
    chosen = targets(tiling, before)
    pending: deque[tuple[Target, Part]] = deque()
    for index, sums in _whole_tiles(
        networks, Windows(slab, shape, tiling.axis, how.roi, before, how.padding_mode), tiling, how, progress
    ):
        pending.extend((target, part) for target in chosen for part in target.begin(index, sums))
        while len(pending) > _PENDING:
            _finish(*pending.popleft())
    while pending:
        _finish(*pending.popleft())


def parts_for(device: jax.Device | None) -> tuple[int, int]:
    """How finely volumes are cut for a device, see FINE. None: the default one."""
    return FINE if (jax.default_backend() if device is None else device.platform) == "cpu" else COARSE


def _finish(target: Target, part: Part) -> None:
    place, inside, (values, finite) = part
    if not np.asarray(finite).all():
        count, number = len(finite), int(np.flatnonzero(~np.asarray(finite))[0]) + 1
        which = "the network" if count == 1 else f"network {number} of {count}"
        action = "Try --precision fp32; if that does not help, the weights are damaged."
        raise CheckpointError(f"{which} gave NaN or infinite logits for a scan of finite voxels. {action}")
    target.store(place, np.asarray(values)[inside])


def _whole_tiles(
    networks: Sequence[Sequence[Replica]],
    windows: Windows,
    tiling: Tiling,
    how: Stitching,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Index, list[Sums]]]:
    starts = window_starts(tiling.shape, how.roi, how.overlap)
    starts = starts[np.argsort(starts[:, tiling.axis], kind="stable")]
    # The last call is filled up, so that all have one shape.
    calls = [starts[first : first + how.sw_batch_size] for first in range(0, len(starts), how.sw_batch_size)]
    filled = (np.concatenate([c, np.repeat(c[-1:], how.sw_batch_size - len(c), axis=0)]) for c in calls)
    weights = importance_map(how.roi, how.mode)
    sums: list[Tiles] = []
    running: deque[jax.Array] = deque()
    done = 0
    for number, (corners, stacked) in enumerate(zip(calls, windows.stacks(filled), strict=True)):
        for member, replicas in enumerate(networks):
            replica = replicas[number % len(replicas)]
            predicted = jnp.asarray(replica.predict(jax.device_put(stacked, replica.device)))
            _check(predicted, stacked, sums)
            if len(sums) == member:
                sums.append(Tiles(tiling, weights, predicted, how.device_bytes, len(networks)))
            running.append(sums[member].add(predicted, corners))
            # One call in flight more than there are devices keeps them busy; others would only hold their windows in
            # the memory of the first. A CPU would run both at a time, no faster, and need the memory of both.
            most = len(replicas) + (-1 if _is_cpu(predicted) else 1)
            del predicted
            while len(running) > most:
                running.popleft().block_until_ready()
            done += len(corners)
            if progress is not None:
                progress(done, len(starts) * len(networks))
        next_corner = int(calls[number + 1][0, tiling.axis]) if number + 1 < len(calls) else None
        for index in [index for index in sums[0].alive if tiling.is_whole(index, next_corner)]:
            taken = [tiles.take(index) for tiles in sums]
            yield index, taken
            for tiles, used in zip(sums, taken, strict=True):
                tiles.spare.append(used)


def _is_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"


def _check(predicted: jax.Array, windows: np.ndarray, sums: Sequence[Tiles]) -> None:
    if predicted.ndim != 5 or predicted.shape[:4] != windows.shape[:4]:
        expected = (*windows.shape[:4], "classes")
        raise ConfigError(f"predict gave shape {predicted.shape} for windows {windows.shape}; expected {expected}")
    if sums and predicted.shape[-1] != sums[0].classes:
        raise ConfigError(f"models of one ensemble gave {sums[0].classes} and {predicted.shape[-1]} classes")
