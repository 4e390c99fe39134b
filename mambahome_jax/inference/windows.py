"""Windows of an image that is made slab by slab, in the order in which they are due."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mambahome_jax.inference.sliding_window import PaddingMode, pad

Slab = Callable[[int, int, int], np.ndarray]
# Calls of the network for which windows are cut while it is at work: making a slab takes as long as a few.
_AHEAD = 4


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
