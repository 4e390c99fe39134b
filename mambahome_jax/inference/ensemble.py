"""Several networks as one: the mean of their softmax probabilities."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import DataProperties, Modality, ScanRanges
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW

# Below it, half of what a network marks is wrong, or half of what there is is missed.
_POOR_DICE = 0.5


def members_of(model: Any) -> tuple[Any, ...]:
    """The networks of an ensemble, given as a list or tuple; of a single network itself. Raises ConfigError: none."""
    members = tuple(model) if isinstance(model, list | tuple) else (model,)
    if not members:
        raise ConfigError("no model; expected one, or several as an ensemble")
    return members


def metadata_of(model: Any) -> DataProperties | None:
    """What a model says of its training; of an ensemble, the first network. None where it says nothing."""
    return getattr(members_of(model)[0], "metadata", None)


def ranges_of(model: Any, modality: Modality) -> ScanRanges | None:
    """What the scans of a modality were like in training, over all networks; None where one of them does not say.

    Without the volumes of structures where the validation of a network found it poor: whatever the scan, its results
    are far from them.
    """
    found, scores = [], []
    for member in members_of(model):
        data = metadata_of(member)
        found.append(next((item for item in data.ranges if item.modality == modality), None) if data else None)
        scores.append(data.val_dice if data else None)
    known = [item for item in found if item is not None]
    if len(known) < len(found):
        return None
    ranges = functools.reduce(ScanRanges.joined, known)
    poor = any(score is not None and score < _POOR_DICE for score in scores)
    return dataclasses.replace(ranges, structures=()) if poor else ranges


def modalities_of(model: Any) -> frozenset[Modality]:
    """The modalities that a network was trained on, any of an ensemble; empty where one of them does not say."""
    found = [metadata_of(member) for member in members_of(model)]
    named = [frozenset(item.modality for item in data.ranges) if data else frozenset() for data in found]
    return frozenset().union(*named) if all(named) else frozenset()


def is_published(model: Any) -> bool:
    """Whether a network says nothing of its training, as one of published weights; a callable that is none is not."""
    return isinstance(members_of(model)[0], nnx.Module) and metadata_of(model) is None


def check_members(members: Sequence[Any], names: Sequence[str] | None = None) -> None:
    """Refuse networks that cannot vote together: other classes, labels, channels, or scans prepared in another way.

    names: what to call each network (default: model 1, model 2, ...).
    Raises ConfigError that names the first such network and everything that differs.
    """
    names = names or [f"model {n}" for n in range(1, len(members) + 1)]
    first = _traits(members[0])
    for name, member in zip(names[1:], members[1:], strict=True):
        found = _traits(member)
        differing = [
            f"{trait} {found[trait]} against {first[trait]}"
            for trait in first
            if found[trait] is not None and first[trait] is not None and found[trait] != first[trait]
        ]
        if differing:
            raise ConfigError(f"{name} cannot be joined with {names[0]}: {'; '.join(differing)}")


def log_mean_softmax(members: Sequence[jax.Array]) -> jax.Array:
    """Logits (D, H, W, classes) whose softmax is the mean of the members' softmax; of one member its own logits.

    As the logits of one network they may be interpolated: several members with equal logits give its labels.
    """
    if len(members) == 1:
        return members[0]
    total = jax.nn.log_softmax(members[0], axis=-1)
    for logits in members[1:]:
        total = jnp.logaddexp(total, jax.nn.log_softmax(logits, axis=-1))
    return total


def _traits(model: Any) -> dict[str, Any]:
    """What must be equal, in words; None where the model does not say."""
    config = getattr(model, "config", None)
    data = metadata_of(model) or DataProperties()
    spacing = "of the scan" if data.spacing is None else " x ".join(f"{s:g}" for s in data.spacing) + " mm"
    return {
        "classes": getattr(config, "out_chans", None),
        "input channels": getattr(config, "in_chans", None),
        "labels": ", ".join(f"{value} {name}" for value, name in sorted(data.labels)) or "without names",
        "stored label values": ", ".join(str(stored) for _, stored in sorted(data.values)) or "those of the labels",
        "spacing": spacing,
        "orientation": data.orientation,
        "modality": data.modality,
        "intensities of CT": "by the window" if data.ct_normalisation == PUBLISHED_WINDOW else data.ct_normalisation,
        "preparation of scans": "published" if is_published(model) else "trained",
    }
