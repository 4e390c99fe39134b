"""Weights to start from, of the same network trained for other structures or other channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mambahome_jax.config import Contents, DataProperties, NetworkConfig, spaced
from mambahome_jax.errors import CheckpointError
from mambahome_jax.weights.names import dotted
from mambahome_jax.weights.weights import Weights

OUTPUTS = ("decoder.out", "decoder.heads")
# What sees the channels of the scan.
INPUTS = (
    "encoder.stages.0.downsample",
    "encoder.levels.0.stage.downsample",
    "decoder.skips.0.conv1",
    "decoder.skips.0.conv3",
    # of a U-Net, one of the two
    "encoder.stem.conv",
    "encoder.stages.0.0.conv",
)


@dataclass(frozen=True)
class Transfer:
    """Names of parameters: taken from the checkpoint; started anew; in the checkpoint and not taken.

    remark: on what else differs. trained_on: the scans that the checkpoint was trained on, see `DataProperties`.
    """

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    left: tuple[str, ...]
    trained_on: Contents = ()
    remark: str = ""

    def __str__(self) -> str:
        anew, left = (", ".join(names) or "none" for names in (self.reinitialised, self.left))
        return f"{len(self.loaded)} parameters loaded, re-initialised: {anew}; left out: {left}{self.remark}"


def transfer(
    weights: Weights, fresh: Any, config: NetworkConfig, data: DataProperties, source: str
) -> tuple[Any, Transfer]:
    """Parameters to start from: those of `weights`, except where they would not fit, which stay `fresh`.

    Those are the layers to classes, where number or names of the structures (of `data`) differ, and the first
    convolutions, where the number of channels does. A network of nnU-Net, which has the axes of a file in the order of
    its plans, is turned to ours. fresh: nested dict of initial parameters, of the network of `config`.
    Raises CheckpointError, field by field, where the network differs in anything else.
    """
    weights, turned = _along_our_axes(weights)
    _check(weights.config, config, source)
    anew = [] if weights.config.in_chans == config.in_chans else list(INPUTS)
    labels = weights.data and weights.data.labels
    if weights.config.out_chans != config.out_chans or (labels and labels != data.labels):
        anew.extend(OUTPUTS)
    loaded: list[str] = []
    reinitialised: list[str] = []

    def choose(path: tuple, leaf: Any) -> Any:
        name = dotted(tuple(key.key for key in path))
        fits = not name.startswith(tuple(f"{layer}." for layer in anew))
        (loaded if fits else reinitialised).append(name)
        return _fitting(weights.params, name, leaf, source) if fits else leaf

    params = jax.tree_util.tree_map_with_path(choose, fresh)
    left = tuple(name for name in weights.params if name not in set(loaded))
    known = None if weights.data is None else weights.data.trained_on
    # Weights that do not say have seen scans of which nothing is known.
    seen = ((),) if known is None else known
    remark = turned + _other_slices(weights.config, config)
    return params, Transfer(tuple(loaded), tuple(reinitialised), left, seen, remark)


def _along_our_axes(weights: Weights) -> tuple[Weights, str]:
    """Weights as they come, those of nnU-Net with their axes turned to ours; and a remark about that."""
    preparation = weights.data and weights.data.nnunet
    if not preparation:
        return weights, ""
    order = np.argsort(preparation.axes)  # the network's axis along each of the file's
    sizes = {
        name: tuple(tuple(size[axis] for axis in order) for size in getattr(weights.config, name))
        for name in ("strides", "kernel_sizes")
    }
    # Kernels alone have axes of the volume, three before those of the channels.
    params = {
        name: array.transpose(*order, 3, 4) if array.ndim == 5 else array for name, array in weights.params.items()
    }
    remark = f"; its axes are turned to ours, but its scans were prepared otherwise: {preparation}"
    return weights._replace(params=params, config=weights.config.replace(**sizes)), remark


def _other_slices(theirs: NetworkConfig, ours: NetworkConfig) -> str:
    """They follow the patch, and parameters serve any."""
    before, now = getattr(theirs, "num_slices", None), getattr(ours, "num_slices", None)
    return (
        "" if before is None or now is None or before == now else f"; num_slices was {spaced(before)}, is {spaced(now)}"
    )


def _check(theirs: NetworkConfig, ours: NetworkConfig, source: str) -> None:
    given, wanted = ({"network": "MambaHoME"} | config.to_json() for config in (theirs, ours))
    if given["network"] != wanted["network"]:
        raise CheckpointError(
            f"{source} is a {given['network']}, expected a {wanted['network']}. Choose --model as it was"
        )
    names = [name for name in wanted if name not in ("in_chans", "out_chans", "use_checkpoint", "num_slices")]
    differ = [f"{name} is {given[name]}, expected {wanted[name]}" for name in names if given[name] != wanted[name]]
    if differ:
        advice = "Choose --model, --feature_size, --mixer and --experts as they were"
        raise CheckpointError(f"{source} is of another configuration: {'; '.join(differ)}. {advice}")


def _fitting(params: Mapping[str, np.ndarray], name: str, leaf: Any, source: str) -> np.ndarray:
    array = params.get(name)
    if array is None or array.shape != tuple(leaf.shape):
        fault = "missing" if array is None else f"of shape {array.shape}"
        raise CheckpointError(f"{source}: {name} is {fault}, expected {tuple(leaf.shape)}. Use another checkpoint")
    return array.astype(leaf.dtype)
