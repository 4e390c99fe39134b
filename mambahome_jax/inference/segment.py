"""From a scan to its label map, on the scan's own grid: prepare, run the network, bring the result back."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.compiler import compiler_options
from mambahome_jax.config import DataProperties, Modality
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError
from mambahome_jax.imaging.geometry import orientation_of, reorient, resample
from mambahome_jax.imaging.intensity import normalise, statistics
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.restore import labels_on_grid
from mambahome_jax.inference.sliding_window import sliding_window
from mambahome_jax.model.network import MULTIPLE

Progress = Callable[[int, int], None]
PUBLISHED_ROI = (192, 192, 48)


@dataclass(frozen=True)
class SegmentSettings:
    """How a scan is brought to the network and back.

    spacing: (3,) mm at which the network works, None or 0 keeps the scan's own. orientation: of its axes. modality:
    how intensities are normalised. roi_size: window in voxels, an entry <= 0 takes the whole axis.
    chain: "trained" resamples first and normalises what came out, as preprocess.py and train.py do, and blends windows
    by a Gaussian. "published" is what the published inference script does: intensity window first, equal weights, zeros
    beyond the border, nearest logits on the way back.
    """

    spacing: Sequence[float] | None
    orientation: str
    modality: Modality
    roi_size: Sequence[int]
    overlap: float | Sequence[float] = 0.5
    sw_batch_size: int = 4
    chain: Literal["trained", "published"] = "trained"

    def __post_init__(self) -> None:
        if self.modality not in ("ct", "mr", "us"):
            raise ConfigError(f"modality is {self.modality!r}; expected ct, mr or us")
        if self.chain not in ("trained", "published"):
            raise ConfigError(f"chain is {self.chain!r}; expected trained or published")
        if len(self.roi_size) != 3:
            raise ConfigError(f"roi_size is {tuple(self.roi_size)}; expected three numbers of voxels")


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """A scan as the network takes it, with what is needed to go back.

    image: (D, H, W, in) float32 on the grid `affine`. oriented_affine, oriented_shape: the grid after reorientation.
    file_affine: (4, 4) of the scan.
    """

    image: np.ndarray
    affine: np.ndarray
    oriented_affine: np.ndarray
    oriented_shape: tuple[int, int, int]
    file_affine: np.ndarray


def segment(
    model: Any,
    volume: Volume,
    *,
    spacing: Sequence[float] | None = None,
    orientation: str | None = None,
    modality: Modality | None = None,
    roi_size: Sequence[int] | None = None,
    overlap: float | Sequence[float] = 0.5,
    sw_batch_size: int = 4,
    chain: Literal["trained", "published"] | None = None,
    progress: Progress | None = None,
) -> Volume:
    """Label every voxel of a scan.

    model: what `load_model` gives; or any callable on windows (n, *roi, in) -> (n, *roi, classes).
    volume: (D0, D1, D2), or (D0, D1, D2, C) for a model of C channels, on any grid.
    spacing, orientation, modality, roi_size, chain: None takes what the model was trained with, and for bare weights
      the published values and chain (see `SegmentSettings`).
    progress: called with (windows done, windows in all).

    Returns the label map, uint8 (uint16 above 256 classes), with the shape and affine of `volume`.
    Raises DatasetError (NaN or infinite voxels, wrong number of channels), ConfigError (settings that cannot work) and
    CheckpointError (logits that are not finite).
    """
    settings = settings_for(
        model,
        spacing=spacing,
        orientation=orientation,
        modality=modality,
        roi_size=roi_size,
        overlap=overlap,
        sw_batch_size=sw_batch_size,
        chain=chain,
    )
    return label(model, prepare(volume, settings, channels_of(model)), settings, progress)


def settings_for(model: Any, **changes: Any) -> SegmentSettings:
    """Settings with which the model was trained, those of `changes` that are not None put in their place.

    A network without metadata, which is one of published weights, gets the published values and chain.
    """
    bare = isinstance(model, nnx.Module) and getattr(model, "metadata", None) is None
    data = getattr(model, "metadata", None) or DataProperties()
    trained: dict[str, Any] = {
        "spacing": data.spacing,
        "orientation": data.orientation,
        "modality": data.modality,
        "roi_size": data.patch_size or PUBLISHED_ROI,
        "chain": "published" if bare else "trained",
    }
    return SegmentSettings(**(trained | {key: value for key, value in changes.items() if value is not None}))


def channels_of(model: Any) -> int | None:
    """Input channels of a model, None where it does not say."""
    return getattr(getattr(model, "config", None), "in_chans", None)


def label_names_of(model: Any) -> dict[int, str]:
    """Label value -> name of the structures that a model was trained on; empty where it does not say."""
    data = getattr(model, "metadata", None)
    return dict(data.labels) if data is not None else {}


def prepare(volume: Volume, settings: SegmentSettings, channels: int | None = None) -> NetworkInput:
    """Reorient, resample and normalise a scan (D0, D1, D2[, C]). NumPy only, so that threads can do it ahead.

    Raises DatasetError for voxels that are not finite and for another number of `channels`.
    """
    array = volume.array if volume.array.ndim == 4 else volume.array[..., None]
    if channels is not None and array.shape[-1] != channels:
        several = "Put the channels on the fourth axis of one file, or into files <case>_0000, <case>_0001, ..."
        action = "Give one volume a file." if channels == 1 else several
        expected = f"{channels}, as the model takes"
        raise DatasetError(f"{array.shape[-1]} channels or time points", expected=expected, action=action)
    if 0 in array.shape:
        raise DatasetError(f"empty volume {array.shape}", expected="at least one voxel")
    if not np.isfinite(array.sum(dtype=np.float64)):
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise DatasetError(f"{count} voxels are NaN or infinite", expected="finite numbers")
    oriented = reorient(Volume(array, volume.affine), settings.orientation)
    spacing = settings.spacing if settings.spacing is not None else (0.0, 0.0, 0.0)
    if settings.chain == "published":
        grid = resample(_normalised(oriented, settings.modality), spacing)
    else:
        grid = _normalised(resample(oriented, spacing), settings.modality)
    image = np.ascontiguousarray(grid.array, np.float32)
    return NetworkInput(image, grid.affine, oriented.affine, oriented.shape, volume.affine)


def label(model: Any, prepared: NetworkInput, settings: SegmentSettings, progress: Progress | None = None) -> Volume:
    """Label map of a prepared scan, on the scan's own grid. Raises as `segment`."""
    published = settings.chain == "published"
    shape = prepared.image.shape[:3]
    logits = sliding_window(
        predictor(model),
        prepared.image,
        [r if r > 0 else -(-n // MULTIPLE) * MULTIPLE for r, n in zip(settings.roi_size, shape, strict=True)],
        settings.overlap,
        "constant" if published else "gaussian",
        settings.sw_batch_size,
        "constant" if published else "edge",
        progress=progress,
    )
    if not _finite(logits):
        action = "Try --precision fp32; if that does not help, the weights are damaged."
        raise CheckpointError(f"the network gave NaN or infinite logits for a scan of finite voxels. {action}")
    labels = labels_on_grid(
        logits,
        prepared.affine,
        prepared.oriented_affine,
        prepared.oriented_shape,
        "nearest" if published else "linear",
    )
    back = reorient(Volume(labels, prepared.oriented_affine), orientation_of(prepared.file_affine))
    # Undoing the flips moves the affine by rounding only; the scan's own is exact.
    return Volume(back.array, prepared.file_affine)


def predictor(model: Any) -> Callable[[jax.Array], Any]:
    """The model as a function of windows (n, *roi, in); an nnx.Module compiled, once for each shape of windows."""
    if not isinstance(model, nnx.Module):
        return model
    return partial(apply_network, *nnx.split(model))


def apply_network(graph: nnx.GraphDef, state: Any, windows: jax.Array) -> jax.Array:
    """Logits of windows. Validation calls it too, so that inference finds it compiled in the cache."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, windows))):
        return _logits(graph, state, windows)  # a part of what the caller compiles, which may not have own options
    return compiled_network()(graph, state, windows)


def _logits(graph: nnx.GraphDef, state: Any, windows: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(windows)


@functools.cache
def compiled_network() -> Any:
    """jit of (graphdef, state, windows) -> logits."""
    return jax.jit(_logits, static_argnums=0, compiler_options=compiler_options())


def _normalised(volume: Volume, modality: Modality) -> Volume:
    return Volume(normalise(volume.array, modality, statistics(volume.array)), volume.affine)


def _finite(logits: jax.Array | np.ndarray) -> bool:
    # A sum is finite if all of its terms are, and needs no mask of the logits' size.
    return bool(np.isfinite((np if isinstance(logits, np.ndarray) else jnp).sum(logits)))
