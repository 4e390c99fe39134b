"""Weights to start from, of the same network trained for other structures or other channels."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mambahome_jax.config import DataProperties, ModelConfig
from mambahome_jax.errors import CheckpointError
from mambahome_jax.weights.names import dotted
from mambahome_jax.weights.weights import Weights

OUTPUT = "decoder.out"
# What sees the channels of the scan.
INPUTS = ("encoder.stages.0.downsample", "decoder.skips.0.conv1", "decoder.skips.0.conv3")


@dataclass(frozen=True)
class Transfer:
    """Names of parameters: taken from the checkpoint; started anew; in the checkpoint and not taken."""

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        anew = ", ".join(self.reinitialised) or "none"
        return (
            f"{len(self.loaded)} parameters loaded, re-initialised: {anew}; left out: {', '.join(self.left) or 'none'}"
        )


def transfer(
    weights: Weights, fresh: Any, config: ModelConfig, data: DataProperties, source: str
) -> tuple[Any, Transfer]:
    """Parameters to start from: those of `weights`, but for the output layer of other structures and the first
    convolutions of another number of channels, which stay `fresh`.

    Args:
        fresh: nested dict of initial parameters of the network of `config`.
        data: of this training. The output layer is taken over where the number of classes is the same and the
            checkpoint, if it names its structures, names the same.

    Raises CheckpointError, field by field, where the network differs in anything else.
    """
    _check(weights.config, config, source)
    anew = [] if weights.config.in_chans == config.in_chans else list(INPUTS)
    tables = weights.data and weights.data.labels
    if weights.config.out_chans != config.out_chans or (tables and tables != data.labels):
        anew.append(OUTPUT)
    leaves, structure = jax.tree_util.tree_flatten_with_path(fresh)
    taken: list[Any] = []
    loaded, reinitialised = [], []
    for path, leaf in leaves:
        name = dotted(tuple(key.key for key in path))
        if name.rpartition(".")[0] in anew:
            reinitialised.append(name)
            taken.append(leaf)
        else:
            loaded.append(name)
            taken.append(_fitting(weights.params, name, leaf, source))
    left = [name for name in weights.params if name not in set(loaded)]
    return jax.tree.unflatten(structure, taken), Transfer(tuple(loaded), tuple(reinitialised), tuple(left))


def _check(found: ModelConfig, wanted: ModelConfig, source: str) -> None:
    before, now = (dataclasses.asdict(config) for config in (found, wanted))
    differ = [
        f"{name} is {before[name]}, expected {now[name]}"
        for name in now
        if before[name] != now[name] and name not in ("in_chans", "out_chans", "use_checkpoint")
    ]
    if differ:
        advice = "Choose --model and --feature_size as they were"
        raise CheckpointError(f"{source} is of another configuration: {'; '.join(differ)}. {advice}")


def _fitting(params: Mapping[str, np.ndarray], name: str, leaf: Any, source: str) -> np.ndarray:
    array = params.get(name)
    if array is None or array.shape != tuple(leaf.shape):
        found = "missing" if array is None else f"of shape {array.shape}"
        raise CheckpointError(f"{source}: {name} is {found}, expected {tuple(leaf.shape)}. Use another checkpoint")
    return array.astype(leaf.dtype)
