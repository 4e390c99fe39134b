"""Which labels trade places when a volume is mirrored: left and right organs, and MVSeg's two leaflets."""

import re
from collections.abc import Iterable, Mapping
from typing import get_args

import numpy as np

from mambahome_jax.config import AnatomicalAxis
from mambahome_jax.errors import ConfigError

AXES: tuple[str, ...] = get_args(AnatomicalAxis)
_SIDES = {"LR": {"left": "right", "l": "r", "lt": "rt", "lh": "rh"}, "AP": {}, "IS": {}}
# Anterior and posterior tell two structures apart by their place here; elsewhere (hippocampus) by their form too.
_LEAFLET_SIDES = {"anterior": "posterior"}


def axis_along(name: str, orientation: str) -> int:
    """Array axis that runs along an anatomical one ("LR", "AP" or "IS"), for an orientation such as "RAS"."""
    return next(axis for axis, letter in enumerate(orientation.upper()) if letter in name)


def swap_table(pairs: Iterable[tuple[int, int]], size: int) -> np.ndarray:
    """(size,) int32: the label value, below `size`, that each becomes where those of a pair trade places."""
    table = np.arange(size, dtype=np.int32)
    for one, other in pairs:
        table[[one, other]] = other, one
    return table


def words_of(name: str) -> tuple[str, ...]:
    """The words of a structure's name in lower case: ("kidney", "left") of kidney_left, Kidney-Left and KidneyLeft."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word)


def mirror_pairs(labels: Mapping[int, str], axis: str) -> tuple[tuple[int, int], ...]:
    """Pairs of label values to swap where a volume is mirrored along an anatomical axis.

    labels: value -> name. axis: "LR", "AP" or "IS". Names are pairs where they differ in one word alone: left and right
    (also l and r, lt and rt, lh and rh) along LR, anterior and posterior of leaflets along AP.
    Raises ConfigError where a structure of one side has no counterpart in the table.
    """
    pairs, alone = sides(labels, axis)
    if alone:
        raise ConfigError(
            f"--mirror {axis}: {', '.join(alone)} would become a structure that the labels do not have. "
            f"Leave {axis} out of --mirror"
        )
    return pairs


def sides(labels: Mapping[int, str], axis: str) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """The pairs of `mirror_pairs`, and the names of the structures of one side that have no counterpart."""
    words = {value: words_of(name) for value, name in labels.items()}
    by_words = {name: value for value, name in words.items()}
    pairs, alone = [], []
    for value, name in words.items():
        other_side = dict(_SIDES[axis])
        if axis == "AP" and any(word.startswith("leaflet") for word in name):
            other_side |= _LEAFLET_SIDES
        other_side |= {b: a for a, b in other_side.items()}
        if not any(word in other_side for word in name):
            continue
        other = by_words.get(tuple(other_side.get(word, word) for word in name))
        if other is None:
            alone.append(labels[value])
        elif value < other:
            pairs.append((value, other))
    return tuple(pairs), tuple(alone)
