"""What is made of tiles of logits: labels on another grid, or an array on their own."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mambahome_jax.imaging.geometry import Order
from mambahome_jax.inference.stitch import Part, Place
from mambahome_jax.inference.tiles import Index, Sums, Tiling, label_tile

# Rows of the target along an axis, and the share (edge, edge + 1) that each voxel of the tile has in them.
_Rows = tuple[slice, np.ndarray]


class OnHost:
    """A target that is one array on the host: `result`, None before the first tile."""

    result: np.ndarray | None = None

    def store(self, place: Place, values: np.ndarray) -> None:
        """See `stitch.Target`."""
        assert self.result is not None
        self.result[place] = values


def no_labels(shape: Sequence[int], sums: Sequence[Sums]) -> np.ndarray:
    """Zeros of a type that holds every class of the sums: uint8, or uint16 for more than 256."""
    return np.zeros(shape, np.uint8 if sums[0][0].shape[-1] <= 256 else np.uint16)


class Labels(OnHost):
    """Class of the largest interpolated logit at each voxel of a grid whose axes run along the tiles'.

    tiling, before: of the tiles, and the voxels in them that lie in front of the logits' grid along each axis.
    positions: where the target's voxels lie along each axis of the logits' grid, in voxels, ascending and within it.
    order: "linear" or "nearest". result: (D, H, W), uint8, or uint16 for more than 256 classes, None before the first
    tile; of equal logits the lower class wins.
    """

    def __init__(self, tiling: Tiling, before: Sequence[int], positions: Sequence[np.ndarray], order: Order) -> None:
        self.shape = tuple(len(position) for position in positions)
        self.rows = [
            [_rows_of(position, order, i * edge - b, edge) for i in range(count)]
            for position, b, edge, count in zip(positions, before, tiling.edge, tiling.count, strict=True)
        ]

    def begin(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        """See `stitch.Target`."""
        if self.result is None:
            self.result = no_labels(self.shape, sums)
        first, second, third = (rows[i] for rows, i in zip(self.rows, index, strict=True))
        for a, share_a in first:
            for b, share_b in second:
                for c, share_c in third:
                    inside = tuple(slice(0, rows.stop - rows.start) for rows in (a, b, c))
                    yield (a, b, c), inside, label_tile(sums, (share_a, share_b, share_c), self.result.dtype)


class Whole(OnHost):
    """What `of_tile` makes of the voxels of each tile, as one array on the host.

    of_tile: sums of each network -> ((*edge, classes), finite). shape: of the logits' grid.
    result: (*shape, classes), None before the first tile.
    """

    def __init__(
        self,
        tiling: Tiling,
        before: Sequence[int],
        shape: Sequence[int],
        of_tile: Callable[[Sequence[Sums]], tuple[jax.Array, jax.Array]],
    ) -> None:
        self.tiling, self.before, self.shape, self.of_tile = tiling, before, tuple(shape), of_tile

    def begin(self, index: Index, sums: Sequence[Sums]) -> Iterator[Part]:
        """See `stitch.Target`."""
        starts = [start - b for start, b in zip(self.tiling.start(index), self.before, strict=True)]
        ends = [min(s + e, n) for s, e, n in zip(starts, self.tiling.edge, self.shape, strict=True)]
        place = tuple(slice(max(s, 0), e) for s, e in zip(starts, ends, strict=True))
        if all(part.start < part.stop for part in place):
            inside = tuple(slice(p.start - s, p.stop - s) for p, s in zip(place, starts, strict=True))
            values, finite = self.of_tile(sums)
            if self.result is None:
                self.result = np.empty((*self.shape, values.shape[-1]), values.dtype)
            yield place, inside, (values, finite)


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
