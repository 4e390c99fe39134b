"""What a dataset is like in numbers, and the settings that these suggest. Reads no file."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Dataset
from mambahome_jax.imaging.plausibility import guessed_modality
from mambahome_jax.preprocessing.findings import SCANS, CaseFacts

_ANISOTROPIC = 3.0
_PATCH_VOXELS = 96**3  # as the published patch
_PATCH_STEP = 16
_FINER = ", of the coarsest axis the lowest tenth"
# Voxels below which an axis that the network halves four times has hardly more than one left.
_FEWEST_SLICES = 24


@dataclass(frozen=True)
class Range:
    """Least, median and largest value of the cases; (3,) for what has axes: R-L, A-P, S-I."""

    min: tuple[float, ...]
    median: tuple[float, ...]
    max: tuple[float, ...]


@dataclass(frozen=True)
class Structure:
    """One label: in how many cases it occurs, and its volume there in ml."""

    value: int
    name: str
    cases: int
    ml: Range | None


@dataclass(frozen=True)
class Intensities:
    """Of one modality and channel, the median over the cases of each percentile, of all voxels and of labelled ones."""

    modality: str
    channel: str
    percentiles: tuple[float, ...]
    foreground: tuple[float, ...] | None


@dataclass(frozen=True)
class Suggestion:
    """spacing in mm of the axes of a volume in RAS; patch_size in voxels at that spacing; modality None: by case."""

    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    modality: Modality | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class DatasetSummary:
    """Numbers of a dataset. cases: (split, modality, cases, of these labelled); unknown ones are "-"."""

    cases: tuple[tuple[str, str, int, int], ...]
    spacing_mm: Range | None = None
    shape: Range | None = None
    extent_mm: Range | None = None
    intensities: tuple[Intensities, ...] = ()
    structures: tuple[Structure, ...] = ()
    suggestion: Suggestion | None = None


def summarise_dataset(dataset: Dataset, facts: Sequence[CaseFacts]) -> DatasetSummary:
    """Sum up the cases that can be used; what was not read is left out."""
    usable = [fact for fact in facts if fact.usable and fact.shape is not None and fact.spacing is not None]
    kinds = [(fact.split or "-", fact.modality or "-", fact.labelled) for fact in usable]
    cases = Counter((split, modality) for split, modality, _ in kinds)
    labelled = Counter((split, modality) for split, modality, has_label in kinds if has_label)
    rows = tuple((*kind, cases[kind], labelled[kind]) for kind in sorted(cases))
    if not usable:
        return DatasetSummary(rows)
    spacing = np.array([fact.spacing for fact in usable], float)
    shape = np.array([fact.shape[:3] for fact in usable if fact.shape is not None], float)
    return DatasetSummary(
        cases=rows,
        spacing_mm=_range(spacing),
        shape=_range(shape),
        extent_mm=_range(spacing * shape),
        intensities=_intensities(dataset, usable),
        structures=_structures(dataset, usable),
        # Without labels there is nothing to preprocess for a training.
        suggestion=None if dataset.layout == SCANS else _suggest(usable, spacing, shape),
    )


def suggest_spacing(spacing: np.ndarray) -> tuple[float, ...]:
    """Take the median of spacings (cases, 3) in mm; where one axis is far coarser than the others, its lowest tenth."""
    median = np.median(spacing, axis=0)
    coarse = int(median.argmax())
    if median[coarse] > _ANISOTROPIC * np.delete(median, coarse).max():
        # The coarse axis of most scans would lose half of what the finer scans show.
        finer = float(np.percentile(spacing[:, coarse], 10))
        median[coarse] = max(finer, np.delete(median, coarse).max())
    return tuple(float(f"{mm:.3g}") for mm in median)


def slice_parts(spacing: tuple[float, ...], shape: np.ndarray) -> tuple[int, int]:
    """Find the axis of thick slices, and into how many each of them is resampled, 1 to leave it as it is.

    spacing: (3,) mm; shape: (3,) voxels of the median scan at that spacing. Slices are cut where a scan has so few of
    them that halving four times leaves one voxel, and not thinner than the voxels within them.
    """
    coarse = int(np.argmax(spacing))
    within = max(mm for axis, mm in enumerate(spacing) if axis != coarse)
    wanted = math.ceil(_FEWEST_SLICES / max(shape[coarse], 1))
    return coarse, max(1, min(wanted, int(spacing[coarse] / within)))


def suggest_patch(shape: np.ndarray, budget: int = _PATCH_VOXELS) -> tuple[int, ...]:
    """Take multiples of 16 in about the proportions of a scan of `shape` (3,): at most `budget` voxels, none beyond it.

    An axis of more than 16 voxels has at least 32, as halving four times would leave one of 16.
    """
    largest = np.maximum(np.ceil(shape / _PATCH_STEP), 1).astype(int)
    patch = np.minimum(largest, 2)
    # The axis that covers least of its scan grows, as long as the budget allows.
    while True:
        order = np.argsort(patch * _PATCH_STEP / shape, kind="stable")
        for axis in order:
            grown = patch.copy()
            grown[axis] += 1
            if grown[axis] <= largest[axis] and int(np.prod(grown * _PATCH_STEP)) <= budget:
                patch = grown
                break
        else:
            return tuple(int(n) * _PATCH_STEP for n in patch)


def _suggest(usable: Sequence[CaseFacts], spacing: np.ndarray, shape: np.ndarray) -> Suggestion:
    new = suggest_spacing(spacing)
    median_mm = np.median(spacing, axis=0)
    coarse = int(median_mm.argmax())
    finer = _FINER if new[coarse] < 0.99 * median_mm[coarse] else ""
    median = np.median(shape * spacing / np.array(new), axis=0)
    axis, parts = slice_parts(new, median)
    if parts > 1:
        thick, slices = new[axis], median[axis]
        new = tuple(float(f"{mm / parts:.3g}") if index == axis else mm for index, mm in enumerate(new))
        median[axis] *= parts
        finer += (
            f"; slices of {thick:g} mm in {parts} parts, as the network would halve {slices:.0f} of them four times "
            f"(or keep {thick:g} mm, and train.py --strides auto leaves them whole)"
        )
    modality, why = likely_modality(usable)
    size = " x ".join(f"{voxels:g}" for voxels in np.round(median))
    reasons = (
        f"spacing: the median of the cases{finer}",
        f"patch size: in the proportions of the median scan, {size} voxels at that spacing",
        f"modality: {why}",
    )
    return Suggestion(new, suggest_patch(median), modality, reasons)


def likely_modality(usable: Sequence[CaseFacts]) -> tuple[Modality | None, str]:
    """Give the modality that all cases are of, None where they are of several or do not tell; and why."""
    named = {fact.modality for fact in usable if fact.modality is not None}
    if len(named) > 1:
        return None, "each case has its own"
    if named:
        return next(iter(named)), "as the dataset says"
    extremes = [(row[0], row[-1]) for fact in usable for row in fact.percentiles or ()]
    if not extremes:
        return None, "the headers do not tell"
    lows, highs = zip(*extremes, strict=True)
    why = f"guessed from the lowest values, about {np.median(lows):g}"
    if guessed_modality(extremes) == "ct":
        return "ct", f"{why}: Hounsfield units of air"
    if min(lows) >= 0 and max(highs) <= 255:
        return "mr", "guessed from the values, 0 to 255, which might as well be ultrasound (us)"
    return "mr", f"{why}: no Hounsfield units of air"


def _intensities(dataset: Dataset, usable: Sequence[CaseFacts]) -> tuple[Intensities, ...]:
    items = []
    for modality in sorted({fact.modality or "-" for fact in usable}):
        group = [fact for fact in usable if (fact.modality or "-") == modality]
        for index, channel in enumerate(dataset.channels):
            rows, inner = (
                [row[index] for row in table if row and index < len(row)]
                for table in ([fact.percentiles for fact in group], [fact.foreground for fact in group])
            )
            if rows:
                items.append(Intensities(modality, channel, _median(rows), _median(inner) if inner else None))
    return tuple(items)


def _structures(dataset: Dataset, usable: Sequence[CaseFacts]) -> tuple[Structure, ...]:
    volumes = [fact.volumes_ml for fact in usable if fact.volumes_ml is not None]
    values = sorted({value for volume in volumes for value in volume})
    names: Mapping[int, str] = dataset.labels or {value: f"label_{value}" for value in values}
    structures = []
    for value, name in names.items() if volumes else ():
        ml = [[volume[value]] for volume in volumes if value in volume]
        structures.append(Structure(value, name, len(ml), _range(np.array(ml)) if ml else None))
    return tuple(structures)


def _range(values: np.ndarray) -> Range:
    low, middle, high = (function(values, axis=0) for function in (np.min, np.median, np.max))
    return Range(*(tuple(float(f"{v:.6g}") for v in part) for part in (low, middle, high)))


def _median(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in np.median(np.array(rows), axis=0))
