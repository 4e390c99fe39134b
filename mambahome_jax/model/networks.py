"""The networks, each made by its configuration."""

from collections.abc import Callable
from typing import Any

from mambahome_jax.config import ModelConfig, NetworkConfig, PlainUNetConfig, ResEncUNetConfig, SegMambaConfig
from mambahome_jax.model.baselines.segmamba import SegMamba
from mambahome_jax.model.baselines.unet import PlainUNet, ResEncUNet
from mambahome_jax.model.network import MambaHoME, Network

_MAKERS: dict[type[NetworkConfig], Callable[..., Network]] = {
    ModelConfig: MambaHoME,
    SegMambaConfig: lambda config, **arguments: SegMamba(**vars(config), **arguments),
    PlainUNetConfig: lambda config, **arguments: PlainUNet(**vars(config), **arguments),
    ResEncUNetConfig: lambda config, **arguments: ResEncUNet(**vars(config), **arguments),
}


def make_network(config: NetworkConfig, **arguments: Any) -> Network:
    """The network of a configuration; rngs, param_dtype, precision and metadata as its constructor takes them."""
    return _MAKERS[type(config)](config, **arguments)
