"""Along which axes a training mirrors, and which labels trade places there: by the names, then by the label maps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mambahome_jax.config import AnatomicalAxis, Mirror
from mambahome_jax.datasets.prepared import Prepared
from mambahome_jax.datasets.structures import (
    FEWEST_VOXELS,
    Shape,
    axis_along,
    choose_swaps,
    mirror_pairs,
    shape_of,
    sides,
)
from mambahome_jax.patches.store import Store
from mambahome_jax.weights.checkpoint import read_checkpoint_config

# Cases whose label maps are looked at; reading the positions of two structures takes some milliseconds a case.
_CASES = 20
Pair = tuple[int, int]


def choose_mirrors(
    axes: Sequence[AnatomicalAxis | str], prepared: Prepared, structures: Mapping[int, str], explicit: bool
) -> tuple[tuple[Mirror, ...], tuple[str, ...]]:
    """The mirrors of a training and what to say of them.

    Every labelled case but those of the test split is looked at, so that networks which hold out others agree.
    Raises ConfigError where a side has no counterpart among the labels and the axis was asked for (`explicit`); that of
    a recipe is left out then, and said.
    """
    mirrors: list[Mirror] = []
    lines: list[str] = []
    for name in axes:
        if name == "none":
            continue
        pairs, alone = sides(structures, name)
        if alone and explicit:
            mirror_pairs(structures, name)
        if alone:
            lines.append(f"Not mirrored along {name}: the labels have no counterpart of {', '.join(alone)}")
            continue
        axis = axis_along(name, prepared.orientation)
        swapped, more = choose_swaps(structures, pairs, _shapes(prepared, pairs), axis)
        mirrors.append((axis, swapped))
        lines += more
    return tuple(mirrors), tuple(lines)


def recorded_mirrors(run: Path) -> tuple[Mirror, ...]:
    """The mirrors that an earlier part of the run trained with, by its last checkpoint. Raises CheckpointError."""
    found = read_checkpoint_config(run / "checkpoints" / "last").get("training", {}).get("mirror", ())
    return tuple((axis, tuple((one, other) for one, other in pairs)) for axis, pairs in found)


def _shapes(prepared: Prepared, pairs: Sequence[Pair]) -> dict[Pair, list[tuple[Shape, Shape]]]:
    """The shapes of both structures of each pair, in up to _CASES cases that have both."""
    if not pairs:
        return {}
    store = Store(prepared.store)
    usable = [case.id for case in prepared.cases if case.label is not None and case.split != "test"]
    counts = {case: store.entry(case).foreground_counts for case in usable}
    chosen: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        both = [case for case in usable if min(counts[case].get(value, 0) for value in pair) >= FEWEST_VOXELS]
        for index in np.unique(np.linspace(0, len(both) - 1, min(len(both), _CASES)).astype(int)):
            chosen[both[index]].append(pair)
    shapes = defaultdict(list)
    for case, those in chosen.items():
        spacing = store.entry(case).spacing
        for pair in those:
            one, other = (shape_of(store.class_positions(case, v), counts[case][v], spacing) for v in pair)
            shapes[pair].append((one, other))
    return shapes
