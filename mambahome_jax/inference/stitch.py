"""From windows to labels tile by tile: no array has all classes of a whole volume, on the device or the host."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.inference.sliding_window import Mode, PaddingMode, Predict, importance_map, window_starts
from mambahome_jax.inference.tiles import COARSE, FINE, Index, Sums, Tiles, Tiling
from mambahome_jax.inference.windows import Slab, Windows

# Results of tiles that may be on their way to the host while the device goes on.
_PENDING = 64

Slices = tuple[slice, ...]
# A box, or the indices of single voxels along each axis.
Place = tuple[slice, ...] | tuple[np.ndarray, ...]
# Where values go, which of the tile's they are, and the values with whether those of each network are finite.
Part = tuple[Place, Slices, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Copy:
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


def stitch(
    networks: Sequence[Sequence[Copy]],
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
    """How finely volumes are cut for a device, see `tiles.FINE`. None: the default one."""
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
    networks: Sequence[Sequence[Copy]],
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
        for member, copies in enumerate(networks):
            copy = copies[number % len(copies)]
            predicted = jnp.asarray(copy.predict(jax.device_put(stacked, copy.device)))
            _check(predicted, stacked, sums)
            if len(sums) == member:
                sums.append(Tiles(tiling, weights, predicted, how.device_bytes, len(networks)))
            running.append(sums[member].add(predicted, corners))
            # One call in flight more than there are devices keeps them busy; others would only hold their windows in
            # the memory of the first. A CPU would run both at a time, no faster, and need the memory of both.
            most = len(copies) + (-1 if _is_cpu(predicted) else 1)
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
