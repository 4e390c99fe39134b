"""What a dataset is like in numbers, and the plan that follows from them. Reads no file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Dataset
from mambahome_jax.imaging.plausibility import guessed_modality
from mambahome_jax.preprocessing.findings import SCANS, CaseFacts
from mambahome_jax.preprocessing.fingerprint import Fingerprint, measure_labels
from mambahome_jax.preprocessing.plan import Machine, Plan, make_plan


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
class DatasetSummary:
    """Numbers of a dataset, and the settings that follow from them.

    cases: (split, modality, cases, of these labelled); unknown ones are "-". plan: None without labels, as there is
    nothing to preprocess for a training. modality: None where each case has its own, or the headers do not tell.
    """

    cases: tuple[tuple[str, str, int, int], ...]
    spacing_mm: Range | None = None
    shape: Range | None = None
    extent_mm: Range | None = None
    intensities: tuple[Intensities, ...] = ()
    structures: tuple[Structure, ...] = ()
    plan: Plan | None = None
    modality: Modality | None = None
    modality_reason: str = ""


def summarise_dataset(dataset: Dataset, facts: Sequence[CaseFacts], machine: Machine) -> DatasetSummary:
    """Sum up the cases that can be used, and plan for the machine; what was not read is left out."""
    usable = [fact for fact in facts if fact.usable and fact.shape is not None and fact.spacing is not None]
    kinds = [(fact.split or "-", fact.modality or "-", fact.labelled) for fact in usable]
    cases = Counter((split, modality) for split, modality, _ in kinds)
    labelled = Counter((split, modality) for split, modality, has_label in kinds if has_label)
    rows = tuple((*kind, cases[kind], labelled[kind]) for kind in sorted(cases))
    if not usable:
        return DatasetSummary(rows)
    spacing = np.array([fact.spacing for fact in usable], float)
    shape = np.array([fact.shape[:3] for fact in usable if fact.shape is not None], float)
    plan = None
    if dataset.layout != SCANS:
        sides = measure_labels(dataset.labels)
        patients = len({fact.patient for fact in usable if fact.labelled and fact.split != "test"})
        plan = make_plan(Fingerprint(spacing, shape, **sides, patients=patients), machine)
    modality, reason = likely_modality(usable)
    return DatasetSummary(
        cases=rows,
        spacing_mm=_range(spacing),
        shape=_range(shape),
        extent_mm=_range(spacing * shape),
        intensities=_intensities(dataset, usable),
        structures=_structures(dataset, usable),
        plan=plan,
        modality=modality,
        modality_reason=reason,
    )


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
