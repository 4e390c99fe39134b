"""Test-time augmentation by mirrors: each window as it is and mirrored, the logits brought back and averaged."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import compress, product

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.config import Mirror, MirrorPairs
from mambahome_jax.datasets.structures import AXES, axis_along, sides, swap_table
from mambahome_jax.errors import ConfigError
from mambahome_jax.inference.tiled import Predict

_WORDS = {"LR": "left-right", "AP": "front-back", "IS": "head-feet"}


def mirrors_for(
    labels: Mapping[int, str],
    orientation: str,
    trained: Collection[str] = AXES,
    records: Sequence[MirrorPairs | None] = (),
) -> tuple[tuple[Mirror, ...], tuple[str, ...]]:
    """Find the axes to mirror, each with the label values that trade places, and a remark for each axis left out.

    labels: value -> name. trained: anatomical axes along which the network saw mirrored scans: others would make it
    worse. records: the label values that each network says traded places in training; None: those of the names.
    """
    mirrors, remarks = [], []
    for anatomical in AXES:
        axis = axis_along(anatomical, orientation)
        pairs, alone = sides(labels, anatomical)
        known = {dict(record or ()).get(anatomical, pairs) for record in records}
        if known and None not in records:
            alone = ()
        if anatomical not in trained:
            why = f"the model was not trained on mirrored scans (train.py --mirror {anatomical})"
        elif anatomical == "LR" and not labels:
            why = "the model has no names of structures, so that left and right cannot be told apart"
        elif len(known) > 1:
            why = "in the training of these networks different labels traded places"
        elif alone:
            why = f"the model has no counterpart of {', '.join(alone)}"
        else:
            mirrors.append((axis, known.pop() if known else pairs))
            continue
        remarks.append(f"tta leaves the {_WORDS[anatomical]} axis out: {why}")
    return tuple(sorted(mirrors)), tuple(remarks)


def mirrored(predict: Predict, mirrors: Sequence[Mirror]) -> Predict:
    """Average `predict` over every combination of mirrors, 2 ** len(mirrors) calls, each brought back and swapped.

    As logits are added, the mean over windows and the mean over mirrors may be taken in any order.
    """
    if not mirrors:
        return predict
    chosen = [tuple(compress(mirrors, use)) for use in product((False, True), repeat=len(mirrors))]

    def one(windows: jax.Array, combination: tuple[Mirror, ...]) -> jax.Array:
        axes = tuple(axis + 1 for axis, _ in combination)
        logits = jnp.asarray(predict(jnp.flip(windows, axes) if axes else windows))
        return _back(logits, class_order(combination, logits.shape[-1]), axes) if axes else logits

    def mean(windows: jax.Array) -> jax.Array:
        total = one(windows, chosen[0])
        for combination in chosen[1:]:
            total = total + one(windows, combination)
        return total / len(chosen)

    return mean


def class_order(mirrors: Sequence[Mirror], classes: int) -> np.ndarray:
    """(classes,) int32: the class of the mirrored window that each class of the window itself is.

    Raises ConfigError: a label value that the network has no class for.
    """
    order = np.arange(classes, dtype=np.int32)
    for _, pairs in mirrors:
        largest = max((max(pair) for pair in pairs), default=0)
        if largest >= classes:
            raise ConfigError(f"the labels name {largest}, but the network has {classes} classes")
        order = order[swap_table(pairs, classes)]
    return order


@partial(jax.jit, static_argnames="axes")
def _back(logits, order, axes):
    return jnp.flip(jnp.take(logits, order, axis=-1), axes)
