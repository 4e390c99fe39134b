"""How values are read that anybody may have written into a file: a reader raises where one is of another form."""

import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mambahome_jax.errors import ConfigError

Convert = Callable[[Any], Any]


def converted(name: str, value: Any, convert: Convert, expected: str) -> Any:
    """convert(value). Raises ConfigError where it cannot be: the value is of another type or form."""
    try:
        return convert(value)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{name} is {value!r}; expected {expected}") from error


def entries(convert: Convert, count: int | None = None) -> Convert:
    """Read a list or tuple, each entry by `convert`; `count`: of how many."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{type(value).__name__} is no list")
        if count is not None and len(value) != count:
            raise ValueError(f"{len(value)} entries are not {count}")
        return tuple(map(convert, value))

    return read


def optional(convert: Convert) -> Convert:
    """Let None pass a conversion."""
    return lambda value: None if value is None else convert(value)


def among(choices: Collection[Any]) -> Convert:
    """Read a value that is one of the choices, and of their type."""

    def read(value: Any) -> Any:
        if value not in choices or isinstance(value, bool) != any(isinstance(choice, bool) for choice in choices):
            raise ValueError(f"{value!r} is none of {choices}")
        return value

    return read


def count_up_to(most: float) -> Convert:
    """Read an integer from 1 to `most`."""

    def read(value: Any) -> int:
        if not 1 <= (number := operator.index(value)) <= most:
            raise ValueError(f"{number} is not from 1 to {most}")
        return number

    return read


def positive(value: Any) -> float:
    """Read a number above 0 and below infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """Read an object with keys. Raises TypeError for anything else."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__} is no object")
    return value


def text(value: Any) -> str:
    """Read text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value
