"""From a scan to its label map, on the scan's own grid: onto the network's grid, through the network, and back."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import numpy as np

from mambahome_jax.config import PUBLISHED_ROI, Mirror, Modality, Resampling, triple
from mambahome_jax.errors import ConfigError, DatasetError, ScanWarning
from mambahome_jax.imaging.geometry import (
    Box,
    Order,
    coarse_remark,
    cubic_limits,
    orientation_of,
    positions_on,
    reorient,
    resample_to,
    resampled_grid,
    row_slabs,
)
from mambahome_jax.imaging.header import usable_affine
from mambahome_jax.imaging.intensity import statistics_of_parts
from mambahome_jax.imaging.nnunet import NnunetPreparation, NnunetScan
from mambahome_jax.imaging.normalisation import (
    CtNormalisation,
    Normalisation,
    PerChannel,
    ct_to_json,
    normalisation_for,
)
from mambahome_jax.imaging.plausibility import modality_remark, scan_remark, volume_remark
from mambahome_jax.imaging.volume import Volume, replace_values, require_volume
from mambahome_jax.inference.ensemble import Ensemble, is_network, replicas
from mambahome_jax.inference.postprocess import ALL, NONE, postprocess, values_named, volumes_ml, write_probabilities
from mambahome_jax.inference.targets import Labels, ShearedLabels, Whole, probabilities_of_tile
from mambahome_jax.inference.tiled import Progress, TileTarget, WindowSettings, predict_tiled, without_copies
from mambahome_jax.support.console import counted, counting, say_once
from mambahome_jax.support.devices import keep_programs
from mambahome_jax.support.keywords import from_keywords, shows_keywords, typed_value
from mambahome_jax.support.paths import openable_path

if TYPE_CHECKING:
    from mambahome_jax.keywords import SegmentKeywords

# An image of the network that takes more than this is made slab by slab when its windows are due: float32 of
# 512 x 512 x 512 voxels. More would gain little, as making it takes a small part of the network's time.
WHOLE_BYTES = 512 << 20

Chain = Literal["trained", "published"]
_BY_PLANS = ("spacing", "modality", "chain")  # options that nnU-Net's plans leave no choice of
_AS_STORED = (
    "nnU-Net takes the axes of a scan as its file has them, and its plans do not say how those of training were; "
    "--orientation with theirs, such as LAS, turns scans that are stored otherwise"
)
_REGIONS = (
    "where regions overlap, a voxel has the value of the last one that holds it, and counts to the volume of each"
)


@dataclass(frozen=True)
class SegmentOptions:
    """What a caller chooses; None takes what the model was trained with, for bare weights the published values.

    spacing: (3,) mm at which the network works, 0 keeps an axis of the scan. orientation: of its axes. modality: of the
    scan, which decides how intensities are normalised. roi_size: window in voxels, an entry <= 0 takes the whole axis.
    chain: see `SegmentSettings`. tta: mean of the logits over mirrored windows. labels: names of the structures to
    keep; none keeps all. keep_largest: names of those of which only the largest connected part is kept, "all", "none".
    """

    spacing: Sequence[float] | None = None
    orientation: str | None = None
    modality: Modality | None = None
    roi_size: Sequence[int] | None = None
    overlap: float | Sequence[float] = 0.5
    sw_batch_size: int = 4
    chain: Chain | None = None
    tta: bool = False
    labels: Sequence[str] = ()
    keep_largest: str | Sequence[str] = ()


@dataclass(frozen=True)
class SegmentSettings:
    """How scans are brought to the network and back, every choice resolved; mirrors: of each window, for the mean.

    chain: "trained" resamples first, as `resampling` says, and normalises what came out, as preprocess.py and train.py
    do, and blends windows by a Gaussian. "published" is what the published inference script does: intensity window
    first, linear resampling, equal weights, zeros beyond the border, nearest logits on the way back. nnunet: in place
    of all this, what nnU-Net does.
    """

    spacing: Sequence[float] | None
    orientation: str
    normalisation: Normalisation
    roi_size: Sequence[int]
    overlap: float | Sequence[float] = 0.5
    sw_batch_size: int = 4
    chain: Chain = "trained"
    mirrors: tuple[Mirror, ...] = ()
    resampling: Resampling = "linear"
    nnunet: NnunetPreparation | None = None

    def __post_init__(self) -> None:
        if self.chain not in ("trained", "published"):
            raise ConfigError(f"chain is {self.chain!r}; expected trained or published")
        if len(self.roi_size) != 3:
            raise ConfigError(f"roi_size is {tuple(self.roi_size)}; expected three numbers of voxels")

    @property
    def published(self) -> bool:
        """Whether the chain is the published one."""
        return self.chain == "published"

    @property
    def regions(self) -> tuple[int, ...]:
        """The value that each output writes, later ones over earlier, 0: none; () where the largest is the label."""
        return () if self.nnunet is None else self.nnunet.regions

    def to_json(self) -> dict[str, Any]:
        """Make the form of run.json, which has the normalisation as "modality" and "ct_scale"."""
        content, normalisation = vars(self).copy(), self.normalisation
        del content["normalisation"], content["nnunet"]
        ct_scale = ct_to_json(normalisation) if isinstance(normalisation, CtNormalisation) else None
        if self.nnunet is not None:
            content |= {"chain": "nnunet", "orientation": self.nnunet.orientation, "nnunet": asdict(self.nnunet)}
        return content | {"modality": normalisation.modality, "ct_scale": ct_scale}


@dataclass(frozen=True, eq=False)
class Segmenter:
    """Networks and settings, resolved once for any number of scans.

    only, largest: label values as `postprocess` takes them. remarks: on what was asked for and cannot be.
    """

    networks: Ensemble
    settings: SegmentSettings
    only: tuple[int, ...] | None
    largest: tuple[int, ...] | None
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any, options: SegmentOptions) -> "Segmenter":
        """Resolve the options for a model. Raises ConfigError: settings that cannot work, no such structure."""
        networks = Ensemble.of(model)
        data, known = networks.data, (networks.label_names, networks.classes)
        only = values_named(options.labels, *known, "labels") if options.labels else None
        wanted = (options.keep_largest,) if isinstance(options.keep_largest, str) else tuple(options.keep_largest)
        wanted = () if wanted == (NONE,) else wanted
        largest = None if wanted == (ALL,) else values_named(wanted, *known, "keep_largest")
        roi_size = networks.window or data.patch_size or PUBLISHED_ROI
        if networks.window is not None and len(options.roi_size or ()) == 3:
            networks.check_window(triple(options.roi_size or ()))
        own = normalisation_for(options.modality or data.modality, data.ct_normalisation)
        nnunet = data.nnunet
        if nnunet is not None:
            if given := [name for name in _BY_PLANS if getattr(options, name) is not None]:
                raise ConfigError(f"{given[0]} was given, but nnU-Net's plans say how scans are prepared. Leave it out")
            regions = tuple(value if only is None or value in only else 0 for value in nnunet.regions)
            nnunet = replace(nnunet, orientation=options.orientation or nnunet.orientation, regions=regions)
        settings = SegmentSettings(
            spacing=data.spacing if options.spacing is None else options.spacing,
            orientation=data.orientation if options.orientation is None else options.orientation,
            normalisation=own if nnunet is None else nnunet.normalisation,
            roi_size=roi_size if options.roi_size is None else options.roi_size,
            overlap=options.overlap,
            sw_batch_size=options.sw_batch_size,
            chain=options.chain or ("published" if networks.published else "trained"),
            resampling=data.resampling,
            nnunet=nnunet,
        )
        remarks: tuple[str, ...] = ()
        if options.tta:
            mirrors, remarks = networks.mirrors(settings.orientation)
            settings = replace(settings, mirrors=mirrors)
        return cls(networks, settings, only, largest, remarks)

    @property
    def names(self) -> dict[int, str]:
        """Value -> structure, of those that results may hold."""
        names = self.networks.label_names
        return {value: name for value, name in names.items() if self.only is None or value in self.only}

    @property
    def regions(self) -> dict[int, tuple[int, ...]]:
        """Value -> the label values in the structure, of those of nnU-Net's regions that results may hold."""
        nnunet = self.settings.nnunet
        pairs = zip(nnunet.regions, nnunet.region_values, strict=False) if nnunet is not None else ()
        return {value: held for value, held in pairs if value in self.names}

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the results of any scan."""
        nnunet = self.settings.nnunet
        turned = nnunet is None or nnunet.orientation is not None
        return (() if turned else (_AS_STORED,)) + ((_REGIONS,) if self.settings.regions else ())

    def remark(self, volume: Volume, modality: Modality, structures_ml: Mapping[str, float]) -> str | None:
        """Say what is odd about a scan as it was read, or about the volumes of its result; None where nothing is."""
        ranges = self.networks.ranges(modality)
        # Channels of several modalities are not all what any one of these is.
        several = isinstance(self.settings.normalisation, PerChannel) and self.settings.normalisation.several
        odd = None if several else scan_remark(volume.array, volume.affine, modality, ranges)
        odd = odd or modality_remark(modality, self.networks.modalities) or volume_remark(structures_ml, ranges)
        return None if odd is None else str(odd)


@shows_keywords(SegmentOptions)
def segment(
    model: Any,
    volume: Volume,
    *,
    save_probabilities: Path | str | None = None,
    progress: Progress | bool | None = None,
    devices: Sequence[jax.Device] | None = None,
    **options: "Unpack[SegmentKeywords]",
) -> Volume:
    """Label every voxel of a scan.

    Memory is needed for the scan and for a window's depth of the logits, not for the logits of a whole volume, save
    where `save_probabilities` asks for them. Says once on stderr that a network is compiled, and keeps that for the
    next process where the user's cache can be written (JAX_COMPILATION_CACHE_DIR names another folder).

    Warns (ScanWarning) of a scan whose intensities cannot be those of its modality, or whose intensities, size or
    structures are far from all that the model was trained on; and of an axis that `tta` cannot mirror.

    Args:
        model: what `load_model` gives; or any callable on windows (n, *roi, in) -> (n, *roi, classes). A list of
            several is an ensemble: the mean of their softmax probabilities, with the first one's roi_size.
        volume: (D0, D1, D2), or (D0, D1, D2, C) for a model of C channels, on any grid.
        save_probabilities: .npz to write the probabilities of all classes to, on the network's grid, before `labels`
            and `keep_largest` (see `write_probabilities`).
        progress: called with (windows done, windows in all), the windows of every model counted; True shows a bar.
        devices: to spread the windows over; None takes the one where the model is.
        options: spacing, orientation, modality, roi_size, overlap=0.5, sw_batch_size=4, chain, tta=False, labels and
            keep_largest, as in `SegmentOptions`.

    Returns:
        The label map, uint8 (uint16 beyond 255), with the shape and affine of `volume`. It holds the values that the
        label maps of the training data store, 255 for a mask of 0 and 255.

    Raises:
        DatasetError: no Volume, voxels that are not finite or not real, wrong number of channels, an affine that places
            no voxels.
        ConfigError: settings that cannot work, no such structure, models that do not fit together.
        CheckpointError: logits that are not finite.
        OutputError: probabilities that cannot be written.
    """
    require_volume("volume", volume)
    typed_value("progress", progress, bool | Progress | None)
    if not typed_value("devices", devices, Sequence[jax.Device] | None) and devices is not None:
        raise ConfigError("devices names none; expected devices of JAX, or None for that of the model")
    chosen = from_keywords(SegmentOptions, options)
    if chosen.sw_batch_size < 1:
        raise ConfigError(f"sw_batch_size is {chosen.sw_batch_size}; expected 1 or more")
    if save_probabilities is not None:
        save_probabilities = openable_path(save_probabilities)
        if save_probabilities.suffix != ".npz":
            raise ConfigError(f"save_probabilities is {save_probabilities}; expected a file name that ends in .npz")
    segmenter = Segmenter.of(model, chosen)
    networks, modality = segmenter.networks, segmenter.settings.normalisation.modality
    scan = to_network_grid(volume, segmenter.settings, networks.channels)
    for remark in segmenter.remarks:
        warnings.warn(remark, stacklevel=2)
    write = None
    if save_probabilities is not None:
        write = partial(write_probabilities, save_probabilities, affine=scan.affine, names=networks.class_names)
    _announce_compiling(networks, segmenter.settings)
    with counting(progress, "windows") as show:
        labels = label(networks, scan, show, write, devices=devices)
    labels = postprocess(labels, segmenter.only, segmenter.largest, segmenter.regions)
    if scan.remark is not None:
        warnings.warn(scan.remark, ScanWarning, stacklevel=2)
    # A callable that says nothing of its training, called without a modality, may be for anything.
    if chosen.modality is not None or networks.knows_its_scans:
        structures_ml = volumes_ml(labels, segmenter.names, segmenter.regions) if segmenter.names else {}
        odd = segmenter.remark(volume, modality, structures_ml)
        if odd is not None:
            warnings.warn(odd, ScanWarning, stacklevel=2)
    return labels


def _announce_compiling(networks: Ensemble, settings: SegmentSettings) -> None:
    """Say once in a process that a network is compiled for its windows, and where that is kept for the next process."""
    kept = keep_programs()
    for member in networks.members:
        if is_network(member):
            size = " x ".join(str(n) if n > 0 else "all" for n in settings.roi_size)
            where = f"kept in {kept}" if kept else "not kept, as no folder for it is known"
            say_once(f"{type(member).__name__}: compiling for windows of {size}, once; {where}")


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """A scan as the network takes it, with what is needed to go back.

    oriented: the scan (D, H, W, in) in any real type, its axes as the network has them. affine, shape: the network's
    grid. file_affine: (4, 4) of the scan as it was read. part: makes a box of the image, (d, h, w, in) float32.
    positions: of the voxels of `crop` on the network's grid, see `positions_on`. crop: the box of the oriented scan
    beyond which all is background; None: all of it. kept: (*shape, in) float32, None where parts are made on demand.
    """

    oriented: Volume
    affine: np.ndarray
    shape: tuple[int, int, int]
    file_affine: np.ndarray
    settings: SegmentSettings
    part: Callable[[Box], np.ndarray]
    positions: list[np.ndarray] | None
    crop: Box | None = None
    kept: np.ndarray | None = None

    @property
    def image(self) -> np.ndarray:
        """(*shape, in) float32, whole."""
        return self.slab(0, 0, self.shape[0])

    def slab(self, axis: int, start: int, stop: int) -> np.ndarray:
        """The planes start to stop (exclusive) of the image along an axis: float32, the other axes whole."""
        a, b, c = (slice(start, stop) if at == axis else slice(0, n) for at, n in enumerate(self.shape))
        return self.part((a, b, c)) if self.kept is None else self.kept[a, b, c]

    @property
    def remark(self) -> str | None:
        """What to say of a scan of which resampling leaves next to nothing."""
        return coarse_remark(self.oriented.array[self.crop or ()].shape, self.shape)

    def target(self) -> Labels | ShearedLabels:
        """Make what labels the reoriented scan, or the crop of it, of logits on the network's grid."""
        order: Order = "nearest" if self.settings.published else "linear"
        if self.positions is not None:
            return Labels(self.positions, order, self.settings.regions)
        matrix = np.linalg.inv(self.affine) @ self.oriented.affine
        return ShearedLabels(self.shape, self.oriented.shape, matrix, order)

    def back(self, labels: np.ndarray) -> Volume:
        """Labels of what `target` labels as a volume of the scan as it was read."""
        if self.crop is not None:
            cropped, labels = labels, np.zeros(self.oriented.shape, labels.dtype)
            labels[self.crop] = cropped
        file_order = reorient(Volume(labels, self.oriented.affine), orientation_of(self.file_affine))
        header = self.oriented.header
        # Undoing the flips moves the affine by rounding only; the scan's own is exact. What its values are (the
        # header's intent) says nothing of labels.
        return Volume(file_order.array, self.file_affine, None if header is None else replace(header, intent=0))


def to_network_grid(
    volume: Volume, settings: SegmentSettings, channels: int | None = None, *, whole_bytes: int = WHOLE_BYTES
) -> NetworkInput:
    """Reorient, resample and normalise a scan (D0, D1, D2[, C]). NumPy only, so that threads can do it ahead.

    whole_bytes: an image that takes more is made slab by slab when it is asked for; its values are the same.
    Raises DatasetError: voxels that are not finite or not real, other `channels`, an affine that places no voxels.
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
        raise DatasetError(f"{counted(count, 'voxel', 'are')} NaN or infinite", expected="finite numbers")
    volume = replace(volume, array=array)
    scan = _trained_or_published(volume, settings) if settings.nnunet is None else _of_nnunet(volume, settings)
    size = (*scan.shape, array.shape[-1])
    if 4 * math.prod(size) > whole_bytes:
        return scan
    kept = np.empty(size, np.float32)
    for rows in row_slabs(size):
        kept[rows] = scan.slab(0, rows.start, rows.stop)
    return replace(scan, kept=kept)


def _trained_or_published(volume: Volume, settings: SegmentSettings) -> NetworkInput:
    """A scan (D0, D1, D2, C) in the chains of our own networks."""
    oriented = reorient(volume, settings.orientation)
    spacing = (0.0, 0.0, 0.0) if settings.spacing is None else settings.spacing
    affine, shape = resampled_grid(oriented.affine, oriented.shape, spacing)
    cubic = settings.resampling == "cubic" and not settings.published
    limits = cubic_limits(oriented, affine) if cubic else None

    def sample(box: Box, then: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A part of the image, `then` done to it where its settings normalise."""
        if settings.published:
            return resample_to(oriented, affine, shape, box=box, before=then).array
        return then(resample_to(oriented, affine, shape, settings.resampling, box=box, limits=limits).array)

    def raw_parts() -> Iterator[np.ndarray]:
        """The values that the statistics are of: those of the grid on which they are normalised."""
        if settings.published:
            yield from (oriented.array[rows] for rows in row_slabs(oriented.array.shape))
        else:
            for rows in row_slabs((*shape, oriented.array.shape[3])):
                yield sample((rows, slice(0, shape[1]), slice(0, shape[2])), np.asarray)

    statistics = statistics_of_parts(raw_parts()) if settings.normalisation.needs_statistics else None
    part = partial(sample, then=partial(settings.normalisation, statistics=statistics))
    positions = positions_on(affine, shape, oriented.affine, oriented.shape)
    return NetworkInput(oriented, affine, shape, volume.affine, settings, part, positions)


def _of_nnunet(volume: Volume, settings: SegmentSettings) -> NetworkInput:
    """A scan (D0, D1, D2, C) as nnU-Net prepares it."""
    assert settings.nnunet is not None and settings.spacing is not None
    scan = NnunetScan.of(volume, settings.spacing, settings.nnunet)
    return NetworkInput(
        scan.oriented, scan.affine, scan.shape, volume.affine, settings, scan.part, scan.positions(), scan.crop
    )


def label(
    model: Any,
    scan: NetworkInput,
    progress: Progress | None = None,
    with_probabilities: Callable[[np.ndarray], None] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    device_bytes: float | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Volume:
    """Predict a scan on the network's grid, and label it on its own. Raises as `segment`.

    with_probabilities: gets those of all classes on the network's grid, (D, H, W, classes) float16.
    devices: that share the windows, the sums on the first; None: where the model is. device_bytes: `WindowSettings`.
    say: told where a device has too little memory for the settings.
    """
    networks, settings = Ensemble.of(model), scan.settings
    sizes = zip(settings.roi_size, scan.shape, networks.multiples, strict=True)
    windows = WindowSettings(
        roi=tuple(r if r > 0 else -(-n // multiple) * multiple for r, n, multiple in sizes),
        overlap=settings.overlap,
        mode="nnunet" if settings.nnunet is not None else "constant" if settings.published else "gaussian",
        sw_batch_size=settings.sw_batch_size,
        device_bytes=device_bytes,
    )
    windows = without_copies(windows, scan.shape)
    labels = scan.target()
    probabilities = Whole(scan.shape, partial(probabilities_of_tile, regions=bool(settings.regions)))
    targets: list[TileTarget] = [labels] if with_probabilities is None else [labels, probabilities]
    voters = [replicas(voter, settings.mirrors, devices) for voter in networks.voters]
    predict_tiled(voters, scan.slab, scan.shape, windows, targets, progress, say)
    assert labels.result is not None
    if with_probabilities is not None:
        assert probabilities.result is not None
        with_probabilities(probabilities.result)
    stored = dict(networks.data.values)
    return scan.back(replace_values(labels.result, stored) if stored else labels.result)
