"""Arguments of functions: those that are a command's flags, and of others what their annotations say."""

import dataclasses
import difflib
import functools
import inspect
import operator
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mambahome_jax.errors import ConfigError
from mambahome_jax.support.paths import typed_path

Config = TypeVar("Config")
Function = TypeVar("Function", bound=Callable[..., Any])


def from_keywords(kind: type[Config], flags: Mapping[str, Any]) -> Config:
    """Make a command's configuration of its flags as keywords, its paths of text as `typed_path` makes them.

    Raises ConfigError: as `typed_path`; a flag that there is not, one that is missing, a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "given"}  # type: ignore[arg-type]
    for name in flags:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise ConfigError(f"{name}: there is no such keyword{f'; did you mean {near[0]}?' if near else ''}")
    if missing := [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in flags]:
        raise ConfigError(f"{', '.join(missing)}: required, but not given")
    hints = get_type_hints(kind)
    values = {name: typed_value(name, value, hints[name]) for name, value in flags.items()}
    return kind(**values, **({"given": tuple(sorted(flags))} if "given" in hints else {}))


def typed_value(name: str, value: Any, kind: Any) -> Any:
    """The value of a keyword as its annotation has it: sequences as tuples, text of a path as a Path.

    Raises ConfigError: of another type, or a path that cannot be opened.
    """
    try:
        return _read(value, kind)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; expected {described(kind)}") from error


def checked(function: Function) -> Function:
    """Have a function refuse, by name, what cannot be one of its numbers, texts, names or sequences of these.

    Arrays, scans and networks are left to the function.
    """

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            given = inspect.signature(function).bind(*args, **keywords).arguments
        except TypeError:
            return function(*args, **keywords)  # says so itself
        hints = get_type_hints(function)
        for name, value in given.items():
            if _is_plain(hints[name]):
                typed_value(name, value, hints[name])
        return function(*args, **keywords)

    return call  # type: ignore[return-value]


def _is_plain(kind: Any) -> bool:
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return Path not in arguments and any(map(_is_plain, arguments))
    if origin in (tuple, Sequence, Collection):
        return _is_plain(arguments[0])
    return origin in (Literal, Mapping, Callable) or kind in (int, float, bool, str)


def described(kind: Any) -> str:
    """Say what values an annotation takes."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is Mapping:
        return f"a mapping of {' to '.join(map(described, arguments))}"
    if origin is Callable or kind is Callable:
        return "a function"
    if origin in (tuple, Sequence, Collection):
        count = f"{len(arguments)} x " if origin is tuple and Ellipsis not in arguments else ""
        return f"a sequence of {count}{described(arguments[0])}"
    return {Path: "a path", str: "text", type(None): "None"}.get(kind, getattr(kind, "__name__", "another type"))


def _read(value: Any, kind: Any) -> Any:
    """The value of a keyword as its annotation has it: sequences as tuples, text of a path as a Path.

    Raises TypeError or ValueError: no value of this kind.
    """
    arguments, origin = get_args(kind), get_origin(kind)
    value = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value  # array of one
    if origin in (Union, types.UnionType):
        for each in arguments:
            try:
                return _read(value, each)
            except (TypeError, ValueError):
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is Mapping:
        if isinstance(value, Mapping):
            return {_read(key, arguments[0]): _read(each, arguments[1]) for key, each in value.items()}
    elif origin is Callable:
        if callable(value):
            return value
    elif origin in (tuple, Sequence, Collection):
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping):
            each = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
            return tuple(_read(part, one) for part, one in zip(value, each, strict=True))
    elif kind is Path:
        if isinstance(value, str | Path):
            return typed_path(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is float:
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if not isinstance(value, bool):
            return operator.index(value)
    elif kind is str:
        if isinstance(value, str | Path):
            return str(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not hasattr(kind, "tolist"):
        return value
    raise TypeError(f"{type(value).__name__} is not {kind}")


def shows_keywords(kind: type) -> Callable[[Function], Function]:
    """Have help() and the completion of notebooks show the fields of a dataclass in the place of `**flags`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        hints = get_type_hints(kind)  # without what is for the command line alone
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(kind)
            if field.name != "given"
        ]
        positional = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        only = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=[*positional, *keywords, *only])  # type: ignore[attr-defined]
        return function

    return decorate
