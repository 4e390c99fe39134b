"""What the scans of a training were like: sizes, intensities and volumes of structures, for judging later scans."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambahome_jax.forms import entries, text
from mambahome_jax.imaging.normalisation import Modality

# Percentiles of a sample of a scan. Its least and largest value may be single voxels of metal or of padding.
SAMPLE_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


@dataclass(frozen=True)
class StructureRange:
    """Volume of a structure in ml, from `least` to `most` over the `present` cases of those whose dataset labels it."""

    name: str
    labelled: int
    present: int
    least: float
    most: float

    def joined(self, other: "StructureRange") -> "StructureRange":
        """Return the range of the cases of both."""
        ranges = [item for item in (self, other) if item.present]
        least, most = min((item.least for item in ranges), default=0.0), max((i.most for i in ranges), default=0.0)
        return StructureRange(self.name, self.labelled + other.labelled, self.present + other.present, least, most)


@dataclass(frozen=True)
class ScanRanges:
    """What the scans of one modality were like in training: (least, largest) value over the cases.

    extent_mm: along R-L, A-P and S-I. percentiles: for each channel, of each of SAMPLE_PERCENTILES; () where they are
    not known of every case.
    """

    modality: Modality
    cases: int
    extent_mm: tuple[tuple[float, float], ...]
    percentiles: tuple[tuple[tuple[float, float], ...], ...] = ()
    structures: tuple[StructureRange, ...] = ()

    def joined(self, other: "ScanRanges") -> "ScanRanges":
        """Return the ranges of both together, of the same modality; what only one of them knows is left out."""
        theirs = {item.name: item for item in other.structures}
        known = len(self.percentiles) == len(other.percentiles)
        channels = zip(self.percentiles, other.percentiles, strict=True) if known else ()
        return ScanRanges(
            self.modality,
            self.cases + other.cases,
            tuple(map(_span, self.extent_mm, other.extent_mm)),
            tuple(tuple(map(_span, ours, others)) for ours, others in channels),
            tuple(item.joined(theirs[item.name]) for item in self.structures if item.name in theirs),
        )

    @classmethod
    def from_json(cls, modality: Modality, values: Mapping[str, Any]) -> "ScanRanges":
        """Read what `to_json` gives. Raises TypeError, ValueError or KeyError for anything else."""
        structures = tuple(
            StructureRange(
                text(name), operator.index(entry["labelled"]), operator.index(entry["present"]), *_range(entry["ml"])
            )
            for name, entry in values["volumes_ml"].items()
        )
        percentiles = entries(entries(_range, len(SAMPLE_PERCENTILES)))(values["percentiles"])
        extent_mm = entries(_range, 3)(values["extent_mm"])
        return cls(modality, operator.index(values["cases"]), extent_mm, percentiles, structures)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of "ranges" in config.json, whose key is the modality."""
        return {
            "cases": self.cases,
            "extent_mm": self.extent_mm,
            "percentiles": self.percentiles,
            "volumes_ml": {
                item.name: {"labelled": item.labelled, "present": item.present, "ml": (item.least, item.most)}
                for item in self.structures
            },
        }


def _span(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return min(one[0], other[0]), max(one[1], other[1])


def _range(values: Any) -> tuple[float, float]:
    low, high = entries(float, 2)(values)
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{low} to {high} is no range")
    return low, high
