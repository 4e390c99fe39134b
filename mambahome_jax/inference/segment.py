"""From a scan to its label map, on the scan's own grid: prepare, run the network, bring the result back."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.compiler import compiler_options
from mambahome_jax.config import DataProperties, Mirror, Modality
from mambahome_jax.datasets.mirror import AXIS_LETTERS
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError
from mambahome_jax.imaging.geometry import orientation_of, reorient, resample
from mambahome_jax.imaging.intensity import normalise, statistics
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.ensemble import Logits, check_members, log_mean, members_of
from mambahome_jax.inference.mirrors import mirrored, mirrors_for
from mambahome_jax.inference.postprocess import ALL, postprocess, values_named
from mambahome_jax.inference.probabilities import probabilities, write_probabilities
from mambahome_jax.inference.restore import labels_on_grid
from mambahome_jax.inference.sliding_window import PADDING_MODE, sliding_window
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
    mirrors: axes along which each window is mirrored too, see `with_mirrors`.
    """

    spacing: Sequence[float] | None
    orientation: str
    modality: Modality
    roi_size: Sequence[int]
    overlap: float | Sequence[float] = 0.5
    sw_batch_size: int = 4
    chain: Literal["trained", "published"] = "trained"
    mirrors: tuple[Mirror, ...] = ()

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
    tta: bool = False,
    labels: Sequence[str] = (),
    keep_largest: str | Sequence[str] = (),
    save_probabilities: Path | str | None = None,
    progress: Progress | None = None,
) -> Volume:
    """Label every voxel of a scan.

    model: what `load_model` gives; or any callable on windows (n, *roi, in) -> (n, *roi, classes). A list of several is
      an ensemble: the mean of their softmax probabilities, with the first one's roi_size.
    volume: (D0, D1, D2), or (D0, D1, D2, C) for a model of C channels, on any grid.
    spacing, orientation, modality, roi_size, chain: None takes what the model was trained with, and for bare weights
      the published values and chain (see `SegmentSettings`).
    tta: mean of the logits over mirrored windows; warns of an axis that cannot be mirrored (`with_mirrors`).
    labels: names of the structures to keep, the others become background; none keeps all.
    keep_largest: names of the structures of which only the largest connected part is kept, or "all".
    save_probabilities: .npz to write the probabilities of all classes to, on the network's grid, before `labels` and
      `keep_largest` (see `write_probabilities`).
    progress: called with (windows done, windows in all), the windows of every model counted.

    Returns the label map, uint8 (uint16 above 256 classes), with the shape and affine of `volume`.
    Raises DatasetError (NaN or infinite voxels, wrong number of channels), ConfigError (settings that cannot work,
    structures that there are not, models that do not fit together), CheckpointError (logits that are not finite) and
    OutputError (probabilities that cannot be written).
    """
    check_members(members_of(model))
    if save_probabilities is not None and Path(save_probabilities).suffix != ".npz":
        raise ConfigError(f"save_probabilities is {save_probabilities}; expected a file name that ends in .npz")
    only, largest = chosen_values(model, labels, keep_largest)
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
    prepared = prepare(volume, settings, channels_of(model))
    if tta:
        settings, remarks = with_mirrors(model, settings)
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)
    found: list[np.ndarray] = []
    take = None if save_probabilities is None else lambda logits: found.append(probabilities(logits))
    result = postprocess(label(model, prepared, settings, progress, take), only, largest)
    if save_probabilities is not None:
        write_probabilities(Path(save_probabilities), found[0], prepared.affine, label_names_of(model))
    return result


def settings_for(model: Any, **changes: Any) -> SegmentSettings:
    """Settings with which the model was trained, those of `changes` that are not None put in their place.

    A network without metadata, which is one of published weights, gets the published values and chain. Of an ensemble,
    here and below, the first network speaks for all.
    """
    model = members_of(model)[0]
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


def with_mirrors(model: Any, settings: SegmentSettings) -> tuple[SegmentSettings, tuple[str, ...]]:
    """Settings with every axis mirrored that training mirrored and the labels allow, and a remark for each other one.

    Of an ensemble those that all were trained with; of a callable that is no network those that the labels allow.
    """
    networks = [member for member in members_of(model) if isinstance(member, nnx.Module)]
    trained = set(AXIS_LETTERS).intersection(*(_mirrored_in_training(network) for network in networks))
    mirrors, remarks = mirrors_for(label_names_of(model), settings.orientation, trained)
    return replace(settings, mirrors=mirrors), remarks


def _mirrored_in_training(network: nnx.Module) -> tuple[str, ...]:
    """Nothing for bare weights: the published training mirrors nothing."""
    data = getattr(network, "metadata", None)
    return () if data is None else data.mirror


def chosen_values(
    model: Any, labels: Sequence[str], keep_largest: str | Sequence[str]
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """What `postprocess` takes, from the names that `segment` takes. Raises ConfigError: no such structure."""
    names, classes = label_names_of(model), classes_of(model)
    only = values_named(labels, names, classes, "labels") if labels else None
    if keep_largest == ALL or tuple(keep_largest) == (ALL,):
        return only, None
    return only, values_named(keep_largest, names, classes, "keep_largest") if keep_largest else ()


def channels_of(model: Any) -> int | None:
    """Input channels of a model, None where it does not say."""
    return getattr(getattr(members_of(model)[0], "config", None), "in_chans", None)


def classes_of(model: Any) -> int | None:
    """Classes of a model with the background, None where it does not say."""
    return getattr(getattr(members_of(model)[0], "config", None), "out_chans", None)


def label_names_of(model: Any) -> dict[int, str]:
    """Label value -> name of the structures that a model was trained on; empty where it does not say."""
    data = getattr(members_of(model)[0], "metadata", None)
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


def label(
    model: Any,
    prepared: NetworkInput,
    settings: SegmentSettings,
    progress: Progress | None = None,
    with_logits: Callable[[Logits], None] | None = None,
) -> Volume:
    """Label map of a prepared scan, on the scan's own grid. Raises as `segment`.

    with_logits: called with the logits (D, H, W, classes) on the network's grid, on the device or the host.
    """
    published = settings.chain == "published"
    logits = log_mean(_logits_of_each(members_of(model), prepared, settings, progress))
    if with_logits is not None:
        with_logits(logits)
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


def _logits_of_each(
    members: Sequence[Any], prepared: NetworkInput, settings: SegmentSettings, progress: Progress | None
) -> Iterator[Logits]:
    """Logits of one network after the other. Raises CheckpointError where they are not finite."""
    published = settings.chain == "published"
    sizes = zip(settings.roi_size, prepared.image.shape[:3], strict=True)
    roi = [r if r > 0 else -(-n // MULTIPLE) * MULTIPLE for r, n in sizes]

    for index, member in enumerate(members):

        def report(done: int, total: int, before: int = index) -> None:
            if progress is not None:
                progress(before * total + done, len(members) * total)

        logits = sliding_window(
            mirrored(predictor(member), settings.mirrors),
            prepared.image,
            roi,
            settings.overlap,
            "constant" if published else "gaussian",
            settings.sw_batch_size,
            PADDING_MODE,
            progress=report,
        )
        if not _finite(logits):
            which = "the network" if len(members) == 1 else f"network {index + 1} of {len(members)}"
            action = "Try --precision fp32; if that does not help, the weights are damaged."
            raise CheckpointError(f"{which} gave NaN or infinite logits for a scan of finite voxels. {action}")
        yield logits


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
