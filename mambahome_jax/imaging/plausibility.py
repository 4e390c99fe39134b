"""Files that cannot be what they are taken for: label maps that are images, intensities that their modality does not
have, and sizes, intensities and structures far from all that a network was trained on. For every command alike.

Every rule is for values that no scan of the modality has, not for rare ones: crops, padding, metal and contrast agent
pass. What is said of good scans is soon read of none.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.imaging.geometry import axis_order, orientation_of
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles, sorted_quantile
from mambahome_jax.ranges import SAMPLE_PERCENTILES, ScanRanges
from mambahome_jax.support.console import counted

AXES = ("R-L", "A-P", "S-I")
_NAMES: dict[Modality, str] = {"ct": "CT", "mr": "MR", "us": "ultrasound"}
_HU = "Hounsfield units, water at 0 and air near -1000"
_UNDO = "Undo the offset (often 1024) or scaling if it is a CT; else it needs another modality or model."

_AIR_BELOW = -500.0  # lungs and air are below it, fat at -100 and all other tissue above
_BYTE = 255.0
# Noise alone makes the least and largest value of soft tissue differ by more.
_LEAST_SPAN = 30.0
# Soft tissue of a scan that is 1000 or 1024 too high, fat to enhanced vessels. In Hounsfield units it is compact bone
# and metal, never most of what is above 500.
_SHIFTED, _SHIFTED_ABOVE, _SHIFTED_SHARE, _SHIFTED_BODY = (850.0, 1250.0), 500.0, 0.6, 0.1
# Where it is not too high, fat, lung or air is below -50; where it is, the noise of air alone.
_NO_FAT = 0.05
# Nothing is less dense than air; filters and reconstruction leave few values below -1150, padding one single value.
_BELOW_AIR = -1150.0
# The noise of sharp filters at a low dose ends before; air of a scan that is twice too dense lies beyond.
_FAR_BELOW_AIR = -1500.0
# Enhanced vessels and organs stay below it: a crop inside the body without a value below 0 has them alone.
_SOFT_BELOW, _SOFT_SPREAD = 500.0, 0.3
# A background of 0, with what noise and interpolation put below it: a quarter of the scan is dark, some of it bright.
# Water is no such background, as the noise of a CT is more than a twentieth of what is bright.
_SLIGHT, _BRIGHT = 0.05, 100.0
# Compact bone ends near 3000, and metal never fills a twentieth of a scan.
_DENSEST = 4000.0
# Scanners pad with -1024, -2000, -2048 or -3024.
_PADDING = -4100.0
# Share of the values that has to lie near air, and in soft tissue, for a scan to be a CT.
_CT_AIR, _CT_TISSUE = 0.1, 0.05
# Crops and whole bodies beside the usual field of view are within a factor of two; a localiser, a wrong unit or
# another part of the body is not.
_EXTENT_FACTOR = 2.0
_WIDTH_FACTOR = 4.0
# Organs of sick people differ by some times in volume; what is missed or flooded does by far more.
_LEAST_FACTOR, _MOST_FACTOR = 10.0, 3.0
_NAMED = 3
# Of a label map, neighbours within structures nearly always agree; of an image with noise, a tenth or fewer do.
_FEWEST_VALUES, _FEWEST_EQUAL = 20, 0.5


@dataclass(frozen=True)
class Remark:
    """One thing that is odd about a scan, as a line: what was found; expected what; what to do."""

    found: str
    expected: str
    action: str

    def __str__(self) -> str:
        return f"{self.found}; expected {self.expected}. {self.action}"


def scan_remark(
    array: np.ndarray, affine: np.ndarray, modality: Modality, ranges: ScanRanges | None = None
) -> Remark | None:
    """What is odd about a scan as it was read, None where nothing is.

    array (D, H, W) or (D, H, W, C) in any real type, not normalised; affine (4, 4), voxel to RAS mm; ranges: of the
    scans of this modality that the network was trained on, None to go by the modality alone.
    """
    channels = array if array.ndim == 4 else array[..., None]
    remark = intensity_remark(intensity_sample(channels), modality, ranges)
    if remark is not None or ranges is None:
        return remark
    return extent_remark(extent_mm(array.shape, affine), ranges)


def intensity_remarks(sample: np.ndarray) -> dict[Modality, Remark]:
    """Tell what is odd about the intensities of a scan, by the modality that it is taken for."""
    remarks = {modality: intensity_remark(sample, modality) for modality in get_args(Modality)}
    return {modality: remark for modality, remark in remarks.items() if remark is not None}


def intensity_remark(sample: np.ndarray, modality: Modality, ranges: ScanRanges | None = None) -> Remark | None:
    """What is odd about the intensities of a scan; sample (n, C) as of `intensity_sample`."""
    for channel, values in enumerate(sample.T):
        if values[0] == values[-1]:
            action = "Export or download it again, or leave the case out."
            remark: Remark | None = Remark(f"all voxels are {float(values[0]):g}", "a scan", action)
        else:
            remark = _ct_remark(values) if modality == "ct" else _other_remark(values, modality)
        if remark is None and ranges is not None and channel < len(ranges.percentiles):
            remark = _trained_remark(values, modality, ranges.percentiles[channel])
        if remark is not None:
            where = f"channel {channel}: " if sample.shape[1] > 1 else ""
            return Remark(where + remark.found, remark.expected, remark.action)
    return None


def extent_mm(shape: Sequence[int], affine: np.ndarray) -> tuple[float, float, float]:
    """Size of a grid in mm along R-L, A-P and S-I; shape (D, H, W[, C]), affine (4, 4), voxel to RAS mm."""
    sizes = np.array(shape[:3]) * np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    a, b, c = (float(sizes[axis]) for axis in axis_order(orientation_of(np.asarray(affine))))
    return a, b, c


def extent_remark(extent: Sequence[float], ranges: ScanRanges) -> Remark | None:
    """Whether a scan is under half the size of any of training along an axis, or over twice. extent (3,) mm."""
    far = [
        axis
        for axis, mm, (least, most) in zip(AXES, extent, ranges.extent_mm, strict=True)
        if mm < least / _EXTENT_FACTOR or mm > most * _EXTENT_FACTOR
    ]
    if not far:
        return None
    size = " x ".join(f"{mm:.4g}" for mm in extent)
    trained = " x ".join(_between(*pair) for pair in ranges.extent_mm)
    action = "Is it the part of the body that the model is for, and is the spacing right? Look at the result."
    found = f"{size} mm along {' x '.join(AXES)}, far off along {', '.join(far)}"
    return Remark(found, f"about {trained} mm, as in training", action)


def volume_remark(volumes_ml: Mapping[str, float], ranges: ScanRanges | None) -> Remark | None:
    """Whether a result has far more or less of a structure than any label map of training. volumes_ml: by name."""
    odd = []
    for item in ranges.structures if ranges is not None else ():
        ml = volumes_ml.get(item.name)
        # Where training showed it in some cases only, none of it is a result like any.
        missed = item.present == item.labelled > 0 and ml is not None and ml < item.least / _LEAST_FACTOR
        if ml is not None and item.present and (missed or ml > item.most * _MOST_FACTOR):
            odd.append((item, ml))
    if not odd:
        return None
    found = ", ".join(f"{item.name} {ml:.3g} ml" for item, ml in odd[:_NAMED])
    more = f" and {counted(len(odd) - _NAMED, 'more structure')}" if len(odd) > _NAMED else ""
    expected = ", ".join(_between(item.least, item.most) for item, _ in odd[:_NAMED])
    return Remark(f"found {found}{more}", f"about {expected} ml, as in training", "Look at the result before its use.")


def modality_remark(modality: Modality, trained: Collection[Modality]) -> Remark | None:
    """Whether a network never saw a scan of this modality; trained: those that it saw, none where that is unknown."""
    if not trained or modality in trained:
        return None
    expected = f"{' or '.join(sorted(_NAMES[name] for name in trained))}, as in training"
    return Remark(f"taken for {_NAMES[modality]}", expected, "It needs another modality or model.")


def guessed_modality(extremes: Sequence[tuple[float, float]]) -> Modality:
    """CT where at least half of the scans have values of air in Hounsfield units, else MR.

    extremes: least and largest value of each scan. Those scaled to a byte or to 1 may be of any modality.
    """
    telling = [low for low, high in extremes if high > _BYTE or low < -max(1.5, 0.1 * high)]
    return "ct" if telling and 2 * sum(low < _AIR_BELOW for low in telling) >= len(telling) else "mr"


def same_voxels(label: np.ndarray, image: np.ndarray, values: int = 0) -> bool:
    """Whether a label map (D0, D1, D2) equals a channel of an image (D0, D1, D2[, C]), voxel by voxel.

    values: how many the label map has; of many, an image whose fractions were cut off or rounded is equal too.
    """
    channels = image if image.ndim == 4 else image[..., None]
    if channels.shape[:3] != label.shape:
        return False
    equal = np.array_equal if values <= _FEWEST_VALUES else _equal_but_for_fractions
    # Plane by plane: the first tells of nearly every pair.
    return any(
        all(equal(label[:, :, k], channels[:, :, k, c]) for k in range(label.shape[2]))
        for c in range(channels.shape[3])
    )


def _equal_but_for_fractions(label: np.ndarray, image: np.ndarray) -> bool:
    return bool((np.abs(label - image.astype(np.float32)) < 1).all())


def resembles_image(array: np.ndarray, values: int) -> bool:
    """Whether a label map (D0, D1, D2) of so many `values` is rather an image: neighbours in structures differ."""
    if values <= _FEWEST_VALUES:
        return False
    pairs = equal = 0
    for k in range(array.shape[2]):
        plane = array[:, :, k]
        labelled = (plane[1:] > 0) & (plane[:-1] > 0)
        pairs += int(np.count_nonzero(labelled))
        equal += int(np.count_nonzero(labelled & (plane[1:] == plane[:-1])))
    return equal < _FEWEST_EQUAL * pairs


def _ct_remark(values: np.ndarray) -> Remark | None:
    """Of one channel that is taken for CT, values (n,) ascending."""
    low, high = float(values[0]), float(values[-1])
    extremes = f"values from {low:.4g} to {high:.4g}"
    if high - low < _LEAST_SPAN:
        return Remark(extremes, _HU, _UNDO)
    # Padding, and air that was clipped, are one value.
    inner = values[np.searchsorted(values, values[0], "right") :]
    dense = _share(inner, _SHIFTED_ABOVE, np.inf)
    shifted = _share(inner, *_SHIFTED) >= _SHIFTED_SHARE * dense and _share(inner, _BELOW_AIR, -50.0) < _NO_FAT
    if dense >= _SHIFTED_BODY and shifted:
        middle = sorted_quantile(inner[np.searchsorted(inner, _SHIFTED_ABOVE) :], 0.5)
        return Remark(f"{extremes}, most of the body near {middle:.4g}", _HU, _UNDO)
    sunken = _share(inner, -np.inf, _BELOW_AIR) >= 0.1 or (
        low < _BELOW_AIR and _share(inner, -np.inf, _AIR_BELOW - 200) >= 0.5
    )
    if sunken and _share(values, -200.0, np.inf) < 0.02:
        return Remark(f"{extremes}, nearly all below -200", _HU, _UNDO)
    bottom, top, most = (sorted_quantile(values, share) for share in (0.05, 0.95, 0.995))
    beyond = inner[: np.searchsorted(inner, _FAR_BELOW_AIR)]
    # Two kinds of padding are two values.
    spread = beyond.size >= 0.1 * inner.size and sorted_quantile(beyond, 0.25) < sorted_quantile(beyond, 0.75)
    if spread:
        return Remark(f"{extremes}, {beyond.size / inner.size:.0%} below {_FAR_BELOW_AIR:.0f}", _HU, _UNDO)
    if low >= 0 and not (most <= _SOFT_BELOW and bottom >= _SOFT_SPREAD * top):
        return Remark(f"{extremes}, none below 0", _HU, _UNDO)
    least, quarter = sorted_quantile(values, 0.005), sorted_quantile(values, 0.25)
    if top >= _BRIGHT and least >= -_SLIGHT * top and quarter <= 2 * _SLIGHT * top:
        return Remark(f"{extremes}, background near 0", _HU, _UNDO)
    if top > _DENSEST:
        return Remark(f"{extremes}, one in twenty above {top:.4g}", _HU, _UNDO)
    return None


def _other_remark(values: np.ndarray, modality: Modality) -> Remark | None:
    """Of one channel that is taken for MR or ultrasound: whether it is a CT, the one that has units."""
    low = float(values[0])
    padding = _share(values, low, low) if low < -1100 else 0.0
    air, tissue = _share(values, -1100.0, -850.0) + padding, _share(values, -200.0, 300.0)
    # Phase images, which have negative values too, are as frequent between air and tissue.
    between = _share(values, -850.0, -200.0)
    if low < _PADDING or air < _CT_AIR or tissue < _CT_TISSUE or between > air + tissue:
        return None
    found = f"values from {low:.4g} to {float(values[-1]):.4g}, with air and tissue where CT has them"
    return Remark(found, f"intensities of {_NAMES[modality]}", "A CT needs another modality or model.")


def _trained_remark(values: np.ndarray, modality: Modality, ranges: Sequence[tuple[float, float]]) -> Remark | None:
    """Of one channel, by the ranges of SAMPLE_PERCENTILES in training."""
    found = dict(zip(SAMPLE_PERCENTILES, sample_percentiles(values[:, None])[0], strict=True))
    trained = dict(zip(SAMPLE_PERCENTILES, ranges, strict=True))
    text = f"values from {found[0.5]:.4g} to {found[99.5]:.4g}"
    expected = f"about {_between(trained[0.5][0], trained[99.5][1])}, as in training"
    if modality != "ct":
        # Each scan is scaled by itself, so that only the sign tells: normalised twice, or of another kind.
        negative = found[5.0] < -0.01 * abs(found[99.5]) and trained[0.5][0] >= 0
        action = "Give the scan as it was before its values were changed."
        return Remark(f"{text}, many below 0", "none below 0, as in training", action) if negative else None
    width = found[99.5] - found[0.5]
    narrowest, widest = trained[99.5][0] - trained[0.5][1], trained[99.5][1] - trained[0.5][0]
    apart = found[5.0] > trained[95.0][1] or found[95.0] < trained[5.0][0]
    if apart or width < narrowest / _WIDTH_FACTOR or width > widest * _WIDTH_FACTOR:
        return Remark(text, expected, "Is it such a scan, in Hounsfield units? Look at the result.")
    return None


def _share(values: np.ndarray, low: float, high: float) -> float:
    """Of ascending values, the share from low to high, both included."""
    if not values.size:
        return 0.0
    first, last = np.searchsorted(values, low, "left"), np.searchsorted(values, high, "right")
    return float(last - first) / values.size


def _between(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:.3g}"
