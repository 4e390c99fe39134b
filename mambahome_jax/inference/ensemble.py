"""Several networks as one: the mean of their softmax probabilities, computed one network after the other."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError

Logits = jax.Array | np.ndarray


def members_of(model: Any) -> tuple[Any, ...]:
    """The networks of an ensemble, given as a list or tuple; of a single network itself. Raises ConfigError: none."""
    members = tuple(model) if isinstance(model, list | tuple) else (model,)
    if not members:
        raise ConfigError("no model; expected one, or several as an ensemble")
    return members


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


def log_mean(members: Iterable[Logits]) -> Logits:
    """Logits (D, H, W, classes) whose softmax is the mean of the members' softmax; of one member its own logits.

    members: logits of one shape, taken one at a time, so that no more than two are held. On the host if one of them is.
    As the logits of one network they may be interpolated: several members with equal logits give its labels exactly.
    Raises ConfigError: members of different shapes.
    """
    total: Logits | None = None
    alone = True
    for logits in members:
        if total is None:
            total = logits
            continue
        if logits.shape != total.shape:
            raise ConfigError(f"models of one ensemble gave {total.shape[-1]} and {logits.shape[-1]} classes")
        if alone:
            total, alone = _start(total), False
        total = _join(total, logits)
    assert total is not None
    return total


def _traits(model: Any) -> dict[str, Any]:
    """What must be equal, in words; None where the model does not say."""
    config = getattr(model, "config", None)
    metadata = getattr(model, "metadata", None)
    data = metadata or DataProperties()
    bare = isinstance(model, nnx.Module) and metadata is None
    spacing = "of the scan" if data.spacing is None else " x ".join(f"{s:g}" for s in data.spacing) + " mm"
    return {
        "classes": getattr(config, "out_chans", None),
        "input channels": getattr(config, "in_chans", None),
        "labels": ", ".join(f"{value} {name}" for value, name in sorted(data.labels)) or "without names",
        "spacing": spacing,
        "orientation": data.orientation,
        "modality": data.modality,
        "preparation of scans": "published" if bare else "trained",
    }


def _start(logits: Logits) -> Logits:
    """log softmax; the first member's logits belong to whoever made them for us, so that they may be changed."""
    return _log_softmax_on_host(logits) if isinstance(logits, np.ndarray) else _log_softmax(logits)


def _join(total: Logits, logits: Logits) -> Logits:
    """log(exp(total) + softmax(logits)), in the place of `total`."""
    if not isinstance(total, np.ndarray) and not isinstance(logits, np.ndarray):
        return _add(total, logits)
    # A copy, as what a jax.Array shows of itself is read-only.
    total = total if isinstance(total, np.ndarray) else np.array(total)
    for row in range(total.shape[0]):
        own = _log_softmax_on_host(np.array(logits[row]))
        np.logaddexp(total[row], own, out=total[row])
    return total


def _log_softmax_on_host(logits: np.ndarray) -> np.ndarray:
    """In place, row by row."""
    for row in logits:
        row -= row.max(axis=-1, keepdims=True)
        row -= np.log(np.exp(row).sum(axis=-1, keepdims=True))
    return logits


@partial(jax.jit, donate_argnums=0)
def _log_softmax(logits):
    return jax.nn.log_softmax(logits, axis=-1)


@partial(jax.jit, donate_argnums=0)
def _add(total, logits):
    return jnp.logaddexp(total, jax.nn.log_softmax(logits, axis=-1))
