"""One text for a network's weights and for what it says of itself, however its files are called or written."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
from flax import nnx


def digest_of(model: Any) -> str:
    """SHA-256 of the parameters of a network, its configuration and what it says of its data.

    The same for a checkpoint folder and for what `convert` makes of it. Fields that have their default are left out, so
    that a version which adds some gives the same. Empty for a callable that is no network.
    """
    if not isinstance(model, nnx.Module):
        return ""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for path, leaf in sorted(leaves, key=lambda entry: jax.tree_util.keystr(entry[0])):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    for said in (getattr(model, "config", None), getattr(model, "metadata", None)):
        digest.update(json.dumps(_fields(said), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _fields(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
    return {name: _fields(found) for name, (found, default) in fields.items() if found != default}
