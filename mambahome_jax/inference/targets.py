"""What is made of tiles of logits: labels on another grid, or an array on their own."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.imaging.geometry import Order
from mambahome_jax.inference.ensemble import log_mean_softmax
from mambahome_jax.inference.tiled import Index, Part, Place, Sums, Tiling

# Voxels that are labelled in one call, at most and at least, and looked through at a time for those in a tile.
_POINTS, _FEW, _LOOKED = 1 << 17, 1 << 12, 1 << 20
# Rows of the target along an axis, and the share (edge, edge + 1) that each voxel of the tile has in them.
_Rows = tuple[slice, np.ndarray]


class OnHost:
    """A `tiled.TileTarget` that is one array on the host: `result`, None before the first tile."""

    result: np.ndarray | None = None

    def begin(self, tiling: Tiling, before: Sequence[int]) -> None:
        self.tiling, self.before = tiling, before

    def store(self, place: Place, values: np.ndarray) -> None:
        assert self.result is not None
        self.result[place] = values


class Whole(OnHost):
    """What `of_tile` makes of the sums of each tile, ((*edge, classes), finite), as one array (*shape, classes)."""

    def __init__(self, shape: Sequence[int], of_tile: Callable[[Sequence[Sums]], tuple[jax.Array, jax.Array]]) -> None:
        self.shape, self.of_tile = tuple(shape), of_tile

    def parts(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        starts = [start - b for start, b in zip(self.tiling.start(index), self.before, strict=True)]
        ends = [min(s + e, n) for s, e, n in zip(starts, self.tiling.edge, self.shape, strict=True)]
        place = tuple(slice(max(s, 0), e) for s, e in zip(starts, ends, strict=True))
        if all(part.start < part.stop for part in place):
            inside = tuple(slice(p.start - s, p.stop - s) for p, s in zip(place, starts, strict=True))
            values, finite = self.of_tile(sums)
            if self.result is None:
                self.result = np.empty((*self.shape, values.shape[-1]), values.dtype)
            yield place, inside, (values, finite)


class Labels(OnHost):
    """Class of the largest interpolated logit at each voxel of a grid whose axes run along the tiles'.

    With `regions`, which overlap, instead the value in them of each logit whose sigmoid exceeds 1/2, the last of these;
    0 leaves a logit out.
    positions: where the target's voxels lie along each axis of the logits' grid, in voxels, ascending and within it.
    result: (D, H, W), uint8, or uint16 for more than 256 classes; of equal logits the lower class wins.
    """

    def __init__(self, positions: Sequence[np.ndarray], order: Order, regions: Sequence[int] = ()) -> None:
        self.positions, self.order, self.regions = positions, order, tuple(regions)

    def begin(self, tiling: Tiling, before: Sequence[int]) -> None:
        self.rows = [
            [_rows_of(position, self.order, i * edge - b, edge) for i in range(count)]
            for position, b, edge, count in zip(self.positions, before, tiling.edge, tiling.count, strict=True)
        ]

    def parts(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        if self.result is None:
            self.result = _background([len(position) for position in self.positions], sums, self.regions)
        for (a, share_a), (b, share_b), (c, share_c) in product(
            *(rows[i] for rows, i in zip(self.rows, index, strict=True))
        ):
            inside = tuple(slice(0, rows.stop - rows.start) for rows in (a, b, c))
            yield (a, b, c), inside, _label_tile(sums, (share_a, share_b, share_c), self.result.dtype, self.regions)


def _background(shape: Sequence[int], sums: Sequence[Sums], regions: Sequence[int] = ()) -> np.ndarray:
    """Zeros of a type that holds every class of the sums, or value of regions."""
    return np.zeros(shape, np.uint8 if max(regions, default=sums[0][0].shape[-1] - 1) <= 255 else np.uint16)


def _rows_of(position: np.ndarray, order: Order, start: int, edge: int) -> list[_Rows]:
    """The rows whose lower neighbour is one of the tile's `edge` voxels from `start` on, at most `edge` at a time."""
    low = (np.rint(position) if order == "nearest" else np.floor(position)).astype(np.int64)
    weight = np.zeros(len(low)) if order == "nearest" else position - low
    begin, end = np.searchsorted(low, [start, start + edge])
    found = []
    for first in range(int(begin), int(end), edge):
        rows = slice(first, min(first + edge, int(end)))
        shares = np.zeros((edge, edge + 1), np.float32)
        number = np.arange(rows.stop - rows.start)
        shares[number, low[rows] - start] = 1 - weight[rows]
        shares[number, low[rows] - start + 1] += weight[rows].astype(np.float32)
        found.append((rows, shares))
    return found


class ShearedLabels(OnHost):
    """As `Labels`, for a grid of any axes: a tile labels the voxels whose lower neighbour is one of its own.

    source: shape (D, H, W) of the logits' grid. shape: of the grid to label. matrix: (4, 4), voxels of the grid to
    label -> of the logits'. Beyond the outermost logits their values go on. result: as of `Labels`.
    """

    def __init__(self, source: Sequence[int], shape: Sequence[int], matrix: np.ndarray, order: Order) -> None:
        self.source, self.shape, self.order = tuple(source), tuple(shape), order
        self._matrix = matrix
        self._back = np.linalg.inv(self._matrix)
        corners = np.array(list(product(*((0, n - 1) for n in self.shape))))
        reached = corners @ self._matrix[:3, :3].T + self._matrix[:3, 3]
        self._span = reached.min(axis=0), reached.max(axis=0)

    def parts(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        if self.result is None:
            self.result = _background(self.shape, sums)
        start = np.array(self.tiling.start(index)) - self.before
        for voxels, low, share in self._inside(start):
            for first in range(0, len(low), _POINTS):
                part = slice(first, min(first + _POINTS, len(low)))
                # A few sizes for all, so that little is compiled.
                size = min(max(_FEW, 1 << (part.stop - part.start - 1).bit_length()), _POINTS)
                filled = ((0, size - (part.stop - part.start)), (0, 0))
                values = _label_points(sums, np.pad(low[part], filled), np.pad(share[part], filled), self.result.dtype)
                place = tuple(axis[part] for axis in voxels)
                yield place, (slice(0, part.stop - part.start),), values

    def _inside(self, start: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]]:
        """Voxels of the target that a tile labels, a part at a time: their indices, (n,) an axis; the lower neighbour
        (n, 3) int32, counted from the tile's first voxel; the share (n, 3) float32 of the upper one."""
        box = self._box(start)
        height = max(_LOOKED // max(math.prod(rows.stop - rows.start for rows in box[1:]), 1), 1)
        for first in range(box[0].start, box[0].stop, height):
            rows = (slice(first, min(first + height, box[0].stop)), *box[1:])
            grid = np.ogrid[rows]
            inside, lows, shares = np.ones([r.stop - r.start for r in rows], bool), [], []
            for axis, edge in enumerate(self.tiling.edge):
                steps = self._matrix[axis]
                position = steps[0] * grid[0] + steps[1] * grid[1] + steps[2] * grid[2] + steps[3]
                # Rounding to 1e-9 voxel makes ties exact, whatever the noise of the matrix product.
                position = np.clip(np.round(position, 9), 0, self.source[axis] - 1)
                low = np.floor(position + 0.5 if self.order == "nearest" else position)
                inside &= (low >= start[axis]) & (low < start[axis] + edge)
                lows.append(low)
                shares.append(np.zeros_like(low) if self.order == "nearest" else position - low)
            found = np.nonzero(inside)
            if len(found[0]):
                low = np.stack([each[inside] for each in lows], axis=1) - start
                share = np.stack([each[inside] for each in shares], axis=1)
                voxels = tuple((at + r.start).astype(np.int32) for at, r in zip(found, rows, strict=True))
                yield voxels, low.astype(np.int32), share.astype(np.float32)

    def _box(self, start: np.ndarray) -> tuple[slice, slice, slice]:
        """The part of the target in which the voxels of a tile lie; outermost tiles have what lies beyond them too."""
        end = start + self.tiling.edge
        low = np.where(start <= 0, np.minimum(self._span[0], start), start) - 1
        high = np.where(end >= self.source, np.maximum(self._span[1], end), end) + 1
        corners = np.array(list(product(*zip(low, high, strict=True)))) @ self._back[:3, :3].T + self._back[:3, 3]
        first = np.clip(np.floor(corners.min(axis=0)), 0, self.shape).astype(int)
        last = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, self.shape).astype(int)
        a, b, c = (slice(int(one), int(other)) for one, other in zip(first, last, strict=True))
        return a, b, c


@partial(jax.jit, static_argnames=("dtype", "regions"))
def _label_tile(sums, matrices, dtype, regions):
    """Labels of interpolated logits; matrices: (outputs, voxels of the tile) an axis, each voxel's shares."""
    means, finite = _means(sums)
    mean = log_mean_softmax(means, bool(regions))
    logits = jnp.einsum("ai,bj,ck,ijkn->abcn", *matrices, mean, precision=jax.lax.Precision.HIGHEST)
    if not regions:
        return jnp.argmax(logits, axis=-1).astype(dtype), finite
    labels = jnp.zeros(logits.shape[:-1], dtype)
    for output, value in enumerate(regions):
        if value == 0:  # not asked for; over the others it would cut a hole into them
            continue
        labels = jnp.where(jax.nn.sigmoid(logits[..., output]) > 0.5, jnp.array(value, dtype), labels)
    return labels, finite


@partial(jax.jit, static_argnames="dtype")
def _label_points(sums, low, share, dtype):
    """As `_label_tile`, of points (n, 3) between the voxels `low` and those above, which count `share`."""
    means, finite = _means(sums)
    tile = log_mean_softmax(means)
    logits = jnp.zeros((low.shape[0], tile.shape[-1]), tile.dtype)
    for corner in product((0, 1), repeat=3):
        at = low + jnp.array(corner)
        weight = jnp.where(jnp.array(corner) == 1, share, 1 - share).prod(axis=1)
        logits += weight[:, None] * tile[at[:, 0], at[:, 1], at[:, 2]]
    return jnp.argmax(logits, axis=-1).astype(dtype), finite


@partial(jax.jit, static_argnames="regions")
def probabilities_of_tile(sums, regions=False):
    """float16 softmax, or sigmoid of `regions`, of a tile, without the planes that it shares with the next ones."""
    means, finite = _means(sums)
    logits = log_mean_softmax(means, regions)[:-1, :-1, :-1]
    return (jax.nn.sigmoid(logits) if regions else jax.nn.softmax(logits, axis=-1)).astype(jnp.float16), finite


@jax.jit
def mean_of_tile(sums):
    """Weighted mean of one network's predictions, whatever they are, without the planes that tiles share."""
    means, finite = _means(sums)
    return means[0][:-1, :-1, :-1], jnp.ones_like(finite)


def _means(sums: Sequence[Sums]) -> tuple[list[jax.Array], jax.Array]:
    # Voxels beyond the volume have no weight.
    means = [total / jnp.where(weight > 0, weight, 1)[..., None] for total, weight in sums]
    # A sum is finite if all of its terms are.
    return means, jnp.stack([jnp.isfinite(mean.sum()) for mean in means])
