"""From a scan to its label map, on the scan's own grid: prepare, run the network, bring the result back."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from mambahome_jax.config import DataProperties, Mirror, Modality, ModelConfig, Triple
from mambahome_jax.datasets.structures import AXES
from mambahome_jax.errors import ConfigError, DatasetError, ScanWarning
from mambahome_jax.imaging.geometry import Order, coarse_remark, orientation_of, positions_on, reorient
from mambahome_jax.imaging.normalisation import normalisation_for
from mambahome_jax.imaging.plausibility import modality_remark, scan_remark, volume_remark
from mambahome_jax.imaging.volume import Volume, replace_values
from mambahome_jax.inference.ensemble import (
    check_members,
    is_published,
    members_of,
    metadata_of,
    modalities_of,
    ranges_of,
)
from mambahome_jax.inference.mirrors import mirrored, mirrors_for
from mambahome_jax.inference.postprocess import ALL, postprocess, values_named, volumes_ml
from mambahome_jax.inference.prepare import NetworkInput, SegmentSettings, prepare
from mambahome_jax.inference.probabilities import write_probabilities
from mambahome_jax.inference.sliding_window import PADDING_MODE
from mambahome_jax.inference.targets import Labels, ShearedLabels, Whole
from mambahome_jax.inference.tiled import Replica, Stitching, Tiling, predict_tiled, probabilities_of_tile
from mambahome_jax.support.devices import compiler_options
from mambahome_jax.support.paths import openable_path

Progress = Callable[[int, int], None]
PUBLISHED_ROI = (192, 192, 48)


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
    devices: Sequence[jax.Device] | None = None,
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
    devices: to spread the windows over; None takes the one where the model is.

    Memory is needed for the scan and for a window's depth of the logits, not for the logits of a whole volume, save
    where `save_probabilities` asks for them.

    Warns (ScanWarning) of a scan whose intensities cannot be those of its modality, or whose intensities, size or
    structures are far from all that the model was trained on.

    Returns the label map, uint8 (uint16 beyond 255), with the shape and affine of `volume`. As those that infer writes,
    it holds the values that the label maps of the training data store, 255 for a mask of 0 and 255: see
    `label_names_of`.
    Raises DatasetError (no Volume, voxels that are not finite or not real, wrong number of channels, an affine that
    places no voxels), ConfigError (settings that cannot work, structures that there are not, models that do not fit
    together), CheckpointError (logits that are not finite) and OutputError (probabilities that cannot be written).
    """
    check_members(members_of(model))
    if not isinstance(volume, Volume):
        action = "Give the affine of its voxels too, np.diag([*spacing, 1]) where nothing else is known."
        raise DatasetError(f"volume is a {type(volume).__name__}", expected="Volume(array, affine)", action=action)
    if sw_batch_size < 1:
        raise ConfigError(f"sw_batch_size is {sw_batch_size}; expected 1 or more")
    if save_probabilities is not None:
        save_probabilities = openable_path(save_probabilities)
        if save_probabilities.suffix != ".npz":
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
    take = None if save_probabilities is None else found.append
    result = postprocess(label(model, prepared, settings, progress, take, devices=devices), only, largest)
    coarse = coarse_remark(prepared.oriented_shape, prepared.shape)
    if coarse is not None:
        warnings.warn(coarse, ScanWarning, stacklevel=2)
    if save_probabilities is not None:
        write_probabilities(save_probabilities, found[0], prepared.affine, class_names_of(model))
    # A callable that says nothing of its training, called without a modality, may be for anything.
    if modality is not None or metadata_of(model) is not None or is_published(model):
        names = {value: name for value, name in label_names_of(model).items() if only is None or value in only}
        odd = case_remark(model, volume, settings.normalisation.modality, volumes_ml(result, names) if names else {})
        if odd is not None:
            warnings.warn(odd, ScanWarning, stacklevel=2)
    return result


def case_remark(
    model: Any, volume: Volume, modality: Modality, structures_ml: Mapping[str, float] | None = None
) -> str | None:
    """What is odd about a scan as it was read and about its result, in one line; None where nothing is.

    structures_ml: volume of each structure in the result that was asked for, by name.
    """
    ranges = ranges_of(model, modality)
    remark = scan_remark(volume.array, volume.affine, modality, ranges)
    remark = remark or modality_remark(modality, modalities_of(model)) or volume_remark(structures_ml or {}, ranges)
    return None if remark is None else str(remark)


def settings_for(model: Any, *, modality: Modality | None = None, **changes: Any) -> SegmentSettings:
    """Settings with which the model was trained, those of `changes` that are not None put in their place.

    A network without metadata, which is one of published weights, gets the published values and chain. Of an ensemble,
    here and below, the first network speaks for all.
    """
    data = metadata_of(model) or DataProperties()
    trained: dict[str, Any] = {
        "spacing": data.spacing,
        "orientation": data.orientation,
        "normalisation": normalisation_for(modality or data.modality, data.ct_normalisation),
        "roi_size": data.patch_size or PUBLISHED_ROI,
        "chain": "published" if is_published(model) else "trained",
    }
    return SegmentSettings(**(trained | {key: value for key, value in changes.items() if value is not None}))


def with_mirrors(model: Any, settings: SegmentSettings) -> tuple[SegmentSettings, tuple[str, ...]]:
    """Settings with every axis mirrored that training mirrored and the labels allow, and a remark for each other one.

    Of an ensemble those that all were trained with; of a callable that is no network those that the labels allow.
    """
    networks = [member for member in members_of(model) if isinstance(member, nnx.Module)]
    trained = set(AXES).intersection(*(_mirrored_in_training(network) for network in networks))
    records = [data.mirror_pairs if (data := metadata_of(network)) else None for network in networks]
    mirrors, remarks = mirrors_for(class_names_of(model), settings.orientation, trained, records)
    return replace(settings, mirrors=mirrors), remarks


def _mirrored_in_training(network: nnx.Module) -> tuple[str, ...]:
    """Nothing for bare weights: the published training mirrors nothing."""
    data = metadata_of(network)
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


def multiples_of(model: Any) -> Triple:
    """What a window is a multiple of along each axis, so that every network of an ensemble takes it; of a callable
    that does not say, that of the published network."""
    configs = [getattr(member, "config", None) or ModelConfig() for member in members_of(model)]
    a, b, c = (max(sizes) for sizes in zip(*(config.multiples for config in configs), strict=True))
    return a, b, c


def label_names_of(model: Any) -> dict[int, str]:
    """Value in label maps -> name of the structures that a model was trained on; empty where it does not say."""
    stored = stored_values_of(model)
    return {stored.get(value, value): name for value, name in class_names_of(model).items()}


def class_names_of(model: Any) -> dict[int, str]:
    """Class, as the network's output counts them, -> name of its structure; empty where the model does not say."""
    data = metadata_of(model)
    return dict(data.labels) if data is not None else {}


def stored_values_of(model: Any) -> dict[int, int]:
    """Class -> value in label maps, without the background; empty where the two are the same."""
    data = metadata_of(model)
    return dict(data.values) if data is not None else {}


def label(
    model: Any,
    prepared: NetworkInput,
    settings: SegmentSettings,
    progress: Progress | None = None,
    with_probabilities: Callable[[np.ndarray], None] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    device_bytes: float | None = None,
) -> Volume:
    """Label map of a prepared scan, on the scan's own grid. Raises as `segment`.

    with_probabilities: called with those of all classes on the network's grid, (D, H, W, classes) float16.
    devices: over which the windows are spread, the sums on the first; None: where the model is. A model that is no
      nnx.Module stays where it is. device_bytes: as in `Stitching`.
    """
    published = settings.chain == "published"
    sizes = zip(settings.roi_size, prepared.shape, multiples_of(model), strict=True)
    how = Stitching(
        roi=tuple(r if r > 0 else -(-n // multiple) * multiple for r, n, multiple in sizes),
        overlap=settings.overlap,
        mode="constant" if published else "gaussian",
        padding_mode=PADDING_MODE,
        sw_batch_size=settings.sw_batch_size,
        device_bytes=device_bytes,
    )
    order: Order = "nearest" if published else "linear"
    grid = (prepared.affine, prepared.shape)
    positions = positions_on(*grid, prepared.oriented_affine, prepared.oriented_shape)
    made: list[Any] = []

    def targets(tiling: Tiling, before: Sequence[int]) -> list[Any]:
        made.append(
            ShearedLabels(tiling, before, *grid, prepared.oriented_affine, prepared.oriented_shape, order)
            if positions is None
            else Labels(tiling, before, positions, order)
        )
        if with_probabilities is not None:
            made.append(Whole(tiling, before, prepared.shape, probabilities_of_tile))
        return made

    networks = [replicas(member, settings.mirrors, devices) for member in members_of(model)]
    predict_tiled(networks, prepared.slab, prepared.shape, how, targets, progress)
    labels, stored = made[0].result, stored_values_of(model)
    if stored:
        labels = replace_values(labels, stored)
    if with_probabilities is not None:
        with_probabilities(made[1].result)
    back = reorient(Volume(labels, prepared.oriented_affine), orientation_of(prepared.file_affine))
    # Undoing the flips moves the affine by rounding only; the scan's own is exact.
    header = prepared.scan.header
    # What the scan's values are says nothing of labels.
    return Volume(back.array, prepared.file_affine, None if header is None else replace(header, intent=0))


def replicas(model: Any, mirrors: Sequence[Mirror] = (), devices: Sequence[jax.Device] | None = None) -> list[Replica]:
    """A network as a function of windows (n, *roi, in), on each device; averaged over mirrored windows.

    An nnx.Module is compiled, once for each shape of windows; any other callable is taken as it is, on no device.
    """
    if not isinstance(model, nnx.Module):
        return [Replica(None, mirrored(model, mirrors))]
    graph, state = nnx.split(model)
    if devices is None:
        return [Replica(None, mirrored(partial(apply_network, graph, state), mirrors))]
    on_each = [partial(apply_network, graph, jax.device_put(state, device)) for device in devices]
    return [Replica(device, mirrored(network, mirrors)) for device, network in zip(devices, on_each, strict=True)]


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
