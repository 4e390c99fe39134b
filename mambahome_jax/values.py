"""Values of JSON that anybody may have written, into the types that the configuration needs, or a typed error."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mambahome_jax.errors import ConfigError

Modality = Literal["ct", "mr", "us"]
Precision = Literal["fp32", "tf32", "bf16"]
# What metrics of distance count: voxels of the surface, or its area.
Surface = Literal["voxels", "area"]
# Axes of the body; each is named by the two letters that an orientation such as "RAS" has for it.
AnatomicalAxis = Literal["LR", "AP", "IS"]
# "window": -175 to 250 HU, as published; "percentiles": by the labelled voxels of the dataset, see `CtScale`.
CtIntensity = Literal["window", "percentiles"]


@dataclass(frozen=True)
class CtScale:
    """How a dataset's own values bring its CT to the network: clipped to [low, high], then (x - mean) / std.

    In HU, one entry a channel: the 0.5 and 99.5 percentiles, mean and standard deviation of its labelled voxels.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CtScale":
        """From {"low": [...], ...}. Raises TypeError, ValueError or KeyError: anything else, or numbers of no use."""
        columns = [tuple(float(value) for value in entries(values[field.name])) for field in fields(cls)]
        if not columns[0] or len({len(column) for column in columns}) != 1:
            raise ValueError("not as many entries in each as there are channels")
        scale = cls(*columns)
        ordered = all(low <= high for low, high in zip(scale.low, scale.high, strict=True))
        if not all(map(math.isfinite, sum(columns, ()))) or min(scale.std) <= 0 or not ordered:
            raise ValueError("numbers that cannot be")
        return scale


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
