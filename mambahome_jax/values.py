"""Values of JSON that anybody may have written, into the types that the configuration needs, or a typed error."""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.normalisation import Modality as Modality

Precision = Literal["fp32", "tf32", "bf16"]
# What metrics of distance count: voxels of the surface, or its area.
Surface = Literal["voxels", "area"]
# Axes of the body; each is named by the two letters that an orientation such as "RAS" has for it.
AnatomicalAxis = Literal["LR", "AP", "IS"]
# "window": -175 to 250 HU, as published; "percentiles": by the labelled voxels of the dataset, see `CtScale`.
CtIntensity = Literal["window", "percentiles"]


# Of a sample of a scan; its least and largest value may be those of a single voxel of metal or of padding.
SAMPLE_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


@dataclass(frozen=True)
class StructureRange:
    """A structure in the label maps of training: volume in ml from `least` to `most` over the cases that show it.

    labelled: cases whose dataset labels it at all; present: those of them that show it.
    """

    name: str
    labelled: int
    present: int
    least: float
    most: float

    def joined(self, other: "StructureRange") -> "StructureRange":
        """Of the cases of both."""
        seen = [(item.least, item.most) for item in (self, other) if item.present]
        least, most = functools.reduce(_span, seen) if seen else (0.0, 0.0)
        return StructureRange(self.name, self.labelled + other.labelled, self.present + other.present, least, most)


@dataclass(frozen=True)
class ScanRanges:
    """What the scans of one modality were like in training: (least, largest) value over the cases.

    extent_mm: along R-L, A-P and S-I. percentiles: for each channel, of each of `SAMPLE_PERCENTILES`; () where they
    are not known of every case.
    """

    modality: Modality
    cases: int
    extent_mm: tuple[tuple[float, float], ...]
    percentiles: tuple[tuple[tuple[float, float], ...], ...] = ()
    structures: tuple[StructureRange, ...] = ()

    def joined(self, other: "ScanRanges") -> "ScanRanges":
        """Ranges of both together, of the same modality; what only one of them knows is left out."""
        theirs = {item.name: item for item in other.structures}
        percentiles = (
            tuple(
                tuple(map(_span, ours, others))
                for ours, others in zip(self.percentiles, other.percentiles, strict=True)
            )
            if len(self.percentiles) == len(other.percentiles)
            else ()
        )
        return ScanRanges(
            self.modality,
            self.cases + other.cases,
            tuple(map(_span, self.extent_mm, other.extent_mm)),
            percentiles,
            tuple(item.joined(theirs[item.name]) for item in self.structures if item.name in theirs),
        )

    @classmethod
    def from_json(cls, modality: Modality, values: Mapping[str, Any]) -> "ScanRanges":
        """From what `to_json` gives. Raises TypeError, ValueError or KeyError: anything else."""
        structures = tuple(
            StructureRange(
                text(name),
                operator.index(entry["labelled"]),
                operator.index(entry["present"]),
                *_range(entry["ml"]),
            )
            for name, entry in values["volumes_ml"].items()
        )
        extent_mm = three(values["extent_mm"], _range)
        percentiles = tuple(tuple(map(_range, entries(channel))) for channel in entries(values["percentiles"]))
        if any(len(channel) != len(SAMPLE_PERCENTILES) for channel in percentiles):
            raise ValueError(f"not {len(SAMPLE_PERCENTILES)} percentiles in each channel")
        return cls(modality, operator.index(values["cases"]), extent_mm, percentiles, structures)

    def to_json(self) -> dict[str, Any]:
        """As an entry of "ranges" in config.json, whose key is the modality."""
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
    low, high = (float(value) for value in entries(values))
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{low} to {high} is no range")
    return low, high


def converted(name: str, value: Any, convert: Callable[[Any], Any], expected: str) -> Any:
    """convert(value). Raises ConfigError where it cannot be: the value is of another type or form."""
    try:
        return convert(value)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{name} is {value!r}; expected {expected}") from error


def entries(value: Any) -> list[Any] | tuple[Any, ...]:
    """A list or tuple as it is. Raises TypeError: anything else, text too."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{type(value).__name__} is no list")
    return value


def text(value: Any) -> str:
    """Text as it is. Raises TypeError: anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def one_of(value: Any, choices: Sequence[Any]) -> Any:
    """A value that is among the choices. Raises ValueError: it is not."""
    if value not in choices:
        raise ValueError(f"{value!r} is none of {choices}")
    return value


def integers(value: Any) -> tuple[int, ...]:
    """A list of whole numbers as a tuple. Raises TypeError: anything else."""
    return tuple(operator.index(entry) for entry in entries(value))


def three(value: Any, convert: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """Three values, each converted, one an axis. Raises TypeError or ValueError: another number or type."""
    a, b, c = (convert(entry) for entry in entries(value))
    return a, b, c
