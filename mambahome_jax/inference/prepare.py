"""A scan as the network takes it: reoriented, resampled and normalised, whole or slab by slab."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from mambahome_jax.config import Mirror
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.geometry import Box, reorient, resample_to, resampled_grid
from mambahome_jax.imaging.intensity import IntensityStatistics, statistics_of_parts
from mambahome_jax.imaging.nifti import usable_affine
from mambahome_jax.imaging.normalisation import CtNormalisation, Normalisation, ct_to_json
from mambahome_jax.imaging.volume import Volume

# An image of the network that takes more than this is made slab by slab when its windows are due: float32 of
# 512 x 512 x 512 voxels. More would gain little, as making it takes a small part of the network's time.
WHOLE_BYTES = 512 << 20
_SLAB_BYTES = 32 << 20


@dataclass(frozen=True)
class SegmentSettings:
    """How a scan is brought to the network and back.

    spacing: (3,) mm at which the network works, None or 0 keeps the scan's own. orientation: of its axes.
    normalisation: how intensities reach it. roi_size: window in voxels, an entry <= 0 takes the whole axis.
    chain: "trained" resamples first and normalises what came out, as preprocess.py and train.py do, and blends windows
    by a Gaussian. "published" is what the published inference script does: intensity window first, equal weights, zeros
    beyond the border, nearest logits on the way back.
    mirrors: axes along which each window is mirrored too, see `with_mirrors`.
    """

    spacing: Sequence[float] | None
    orientation: str
    normalisation: Normalisation
    roi_size: Sequence[int]
    overlap: float | Sequence[float] = 0.5
    sw_batch_size: int = 4
    chain: Literal["trained", "published"] = "trained"
    mirrors: tuple[Mirror, ...] = ()

    def __post_init__(self) -> None:
        if self.chain not in ("trained", "published"):
            raise ConfigError(f"chain is {self.chain!r}; expected trained or published")
        if len(self.roi_size) != 3:
            raise ConfigError(f"roi_size is {tuple(self.roi_size)}; expected three numbers of voxels")

    def to_json(self) -> dict[str, Any]:
        """As run.json has it: the normalisation as "modality" and "ct_scale"."""
        content = asdict(self) | {"modality": self.normalisation.modality, "ct_scale": None}
        if isinstance(self.normalisation, CtNormalisation):
            content["ct_scale"] = ct_to_json(self.normalisation)
        del content["normalisation"]
        return content


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """A scan as the network takes it, with what is needed to go back.

    scan: (D, H, W, in) in any real type, reoriented. affine, shape: the network's grid.
    file_affine: (4, 4) of the scan.
    statistics: what `settings.normalisation` takes. kept: (*shape, in) float32, None where slabs are made
      on demand.
    """

    scan: Volume
    affine: np.ndarray
    shape: tuple[int, int, int]
    file_affine: np.ndarray
    settings: SegmentSettings
    statistics: IntensityStatistics | None = None
    kept: np.ndarray | None = None

    @property
    def oriented_affine(self) -> np.ndarray:
        """(4, 4) of the scan after reorientation."""
        return self.scan.affine

    @property
    def oriented_shape(self) -> tuple[int, int, int]:
        """Of the scan after reorientation."""
        return self.scan.shape

    @property
    def nbytes(self) -> int:
        """Of the scan and what is kept beside it."""
        return self.scan.array.nbytes + (0 if self.kept is None else self.kept.nbytes)

    @property
    def image(self) -> np.ndarray:
        """(*shape, in) float32, whole."""
        return self.slab(0, 0, self.shape[0])

    def slab(self, axis: int, start: int, stop: int) -> np.ndarray:
        """The planes start to stop (exclusive) of the image along an axis: float32, the other axes whole."""
        box = tuple(slice(start, stop) if a == axis else slice(0, n) for a, n in enumerate(self.shape))
        if self.kept is not None:
            return self.kept[box]
        return self._box((box[0], box[1], box[2]), partial(self.settings.normalisation, statistics=self.statistics))

    def _box(self, box: Box, then: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A part of the image, `then` done to it where its settings normalise."""
        published = self.settings.chain == "published"
        grid = resample_to(self.scan, self.affine, self.shape, box=box, before=then if published else None)
        return grid.array if published else then(grid.array)

    def _raw(self) -> Iterator[np.ndarray]:
        """The values that the statistics are of, part by part: those of the grid on which they are normalised."""
        if self.settings.chain == "published":
            yield from (self.scan.array[rows] for rows in _rows(self.scan.array.shape))
        else:
            whole = [slice(0, n) for n in self.shape]
            for rows in _rows((*self.shape, self.scan.array.shape[3])):
                yield self._box((rows, whole[1], whole[2]), np.asarray)


def network_grid(oriented: Volume, settings: SegmentSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (4, 4) and shape of the grid on which the network works, of a scan in its orientation."""
    spacing = settings.spacing if settings.spacing is not None else (0.0, 0.0, 0.0)
    return resampled_grid(oriented.affine, oriented.shape, spacing)


def prepare(
    volume: Volume, settings: SegmentSettings, channels: int | None = None, *, whole_bytes: int = WHOLE_BYTES
) -> NetworkInput:
    """Reorient, resample and normalise a scan (D0, D1, D2[, C]). NumPy only, so that threads can do it ahead.

    whole_bytes: an image that takes more is made slab by slab when it is asked for; its values are the same.
    Raises DatasetError for voxels that are not finite or not real, for another number of `channels` and for an affine
    that places no voxels.
    """
    array = volume.array if volume.array.ndim == 4 else volume.array[..., None]
    if channels is not None and array.shape[-1] != channels:
        several = "Put the channels on the fourth axis of one file, or into files <case>_0000, <case>_0001, ..."
        action = "Give one volume a file." if channels == 1 else several
        expected = f"{channels}, as the model takes"
        raise DatasetError(f"{array.shape[-1]} channels or time points", expected=expected, action=action)
    if 0 in array.shape:
        raise DatasetError(f"empty volume {array.shape}", expected="at least one voxel")
    if array.dtype.kind not in "biuf":
        raise DatasetError(f"voxels of type {array.dtype}", expected="real numbers")
    usable_affine(None, volume.affine)
    if array.dtype.kind == "f" and not np.isfinite(array.sum(dtype=np.float64)):
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise DatasetError(f"{count} voxels are NaN or infinite", expected="finite numbers")
    oriented = reorient(replace(volume, array=array), settings.orientation)
    affine, shape = network_grid(oriented, settings)
    prepared = NetworkInput(oriented, affine, shape, volume.affine, settings)
    if settings.normalisation.needs_statistics:
        prepared = replace(prepared, statistics=statistics_of_parts(prepared._raw()))
    size = (*shape, array.shape[-1])
    if 4 * math.prod(size) > whole_bytes:
        return prepared
    kept = np.empty(size, np.float32)
    for rows in _rows(size):
        kept[rows] = prepared.slab(0, rows.start, rows.stop)
    return replace(prepared, kept=kept)


def _rows(shape: Sequence[int]) -> Iterator[slice]:
    """The first axis in parts that are small beside the whole."""
    height = max(_SLAB_BYTES // (4 * math.prod(shape[1:])), 1)
    return (slice(first, min(first + height, shape[0])) for first in range(0, shape[0], height))
