"""Loss at lower resolutions too (Lee et al. 2015; weights as in nnU-Net): heads that training alone knows.

They lie beside the network and not in it, so that checkpoints and exported weights are those of the network.
"""

from typing import Any

import jax
from flax import nnx

from mambahome_jax.config import Precision
from mambahome_jax.model.layers import ChannelDropout, Conv3d, Numerics
from mambahome_jax.training.losses import LossFunction

HEADS = 2
NETWORK = "network"


class DeepSupervision(nnx.Module):
    """A network and a 1x1x1 convolution on its decoder's volumes at 1/2 and 1/4 of the grid.

    model(x): (batch, D, H, W, in) -> [logits (batch, D, H, W, classes), the same at 1/2, at 1/4].
    `network.with_levels(x)` gives logits and the volumes, (batch, D / 2, H / 2, W / 2, feat_size[1]) and so on.
    """

    def __init__(self, network: Any, *, rngs: nnx.Rngs, precision: Precision = "fp32"):
        config = network.config
        self.network = network
        self.heads = nnx.List(
            [
                Conv3d(width, config.out_chans, 1, bias=True, rngs=rngs, numerics=Numerics(precision=precision))
                for width in config.feat_size[1 : 1 + HEADS]
            ]
        )

    def __call__(self, x: jax.Array, *dropout: ChannelDropout) -> list[jax.Array]:
        logits, levels = self.network.with_levels(x, *dropout)
        return [logits, *(head(level) for head, level in zip(self.heads, levels[:HEADS], strict=True))]


def network_params(params: Any) -> Any:
    """The network's own part of parameters that may have heads beside it."""
    return params.get(NETWORK, params)


def at_all_levels(loss_fn: LossFunction) -> LossFunction:
    """The loss of a list of logits, each on a coarser grid than the one before, half as fine as published; it weighs
    half as much.

    The labels of a coarse grid are every so-manieth voxel along each axis. The weights sum to 1.
    """

    def loss(outputs: list[jax.Array], labels: jax.Array, *more: jax.Array) -> jax.Array:
        weights = [0.5**level for level in range(len(outputs))]
        terms = []
        for logits, weight in zip(outputs, weights, strict=True):
            a, b, c = (n // m for n, m in zip(labels.shape[1:4], logits.shape[1:4], strict=True))
            terms.append(weight / sum(weights) * loss_fn(logits, labels[:, ::a, ::b, ::c], *more))
        return sum(terms[1:], start=terms[0])

    return loss
