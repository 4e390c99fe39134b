"""Weighted sums of windows in tiles of one size, each of which exists only while windows touch it.

Whatever the volume, the arrays on the device have the shape of a tile or a window: nothing is compiled for a volume's
size, and memory is needed for little more than one window's depth of the volume. Neighbouring tiles share a plane of
voxels, so that what lies between two voxels can be interpolated from one tile.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.inference.ensemble import joined
from mambahome_jax.inference.sliding_window import budget

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
    logits = jnp.einsum("ai,bj,ck,ijkn->abcn", *matrices, joined(means), precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(logits, axis=-1).astype(dtype), finite


@jax.jit
def probabilities_of_tile(sums):
    """float16 softmax of a tile, without the planes that it shares with the next ones."""
    means, finite = _means(sums)
    return jax.nn.softmax(joined(means)[:-1, :-1, :-1], axis=-1).astype(jnp.float16), finite


@partial(jax.jit, static_argnames="dtype")
def label_points(sums, low, share, dtype):
    """As `label_tile`, of single points in a tile.

    low: (n, 3), the voxel below each point along every axis. share: (n, 3), what that above it counts.
    """
    means, finite = _means(sums)
    tile = joined(means)
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
