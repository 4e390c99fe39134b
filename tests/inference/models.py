"""Small networks with known answers."""

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import ModelConfig


class Levels(nnx.Module):
    """Classes are levels of the intensity: class c where the input is nearest to levels[c]."""

    def __init__(self, levels, in_chans=1, metadata=None):
        self.levels = nnx.Param(jnp.asarray(levels, jnp.float32))
        self.config = ModelConfig(in_chans=in_chans)
        if metadata is not None:
            self.metadata = metadata

    def __call__(self, x):
        # Linear in x, so that interpolating logits is interpolating intensities.
        return 2 * x[..., :1] * self.levels[...] - self.levels[...] ** 2


class Convolution(nnx.Module):
    """3 x 3 x 3 correlation with zero padding at the window's border, times a factor for each voxel of the window."""

    def __init__(self, weight, bias, factor):
        self.weight = nnx.Param(jnp.asarray(weight, jnp.float32).transpose(2, 3, 4, 1, 0))
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
        self.factor = nnx.Param(jnp.asarray(factor, jnp.float32))

    def __call__(self, x):
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        y = jax.lax.conv_general_dilated(x, self.weight[...], (1, 1, 1), "SAME", dimension_numbers=numbers)
        return (y + self.bias[...]) * self.factor[..., None]
