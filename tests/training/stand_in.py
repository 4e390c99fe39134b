"""A network small enough to train in a test: two convolutions, the shapes of the real one."""

import jax
from flax import nnx

from mambahome_jax.model.layers import ChannelDropout


class SmallNet(nnx.Module):
    """(b, D, H, W, 1) -> (b, D, H, W, classes)."""

    def __init__(self, classes: int = 2, width: int = 16, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Conv(1, width, (3, 3, 3), rngs=rngs)
        self.middle = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)])
        self.last = nnx.Conv(width, classes, (1, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> jax.Array:
        x = jax.nn.relu(self.first(x))
        if dropout is not None:
            x = dropout(x, 0)
        for layer in self.middle:
            x = jax.nn.relu(layer(x))
        return self.last(x)
