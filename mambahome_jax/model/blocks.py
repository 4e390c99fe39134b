"""Convolutional blocks: gated spatial convolution (Xing et al. 2024), residual and up block (as in MONAI's UNETR)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import Precision
from mambahome_jax.model.layers import Conv3d, Upsample
from mambahome_jax.model.norms import norm_act

LEAKY_SLOPE = 0.01


class GatedSpatialConv(nnx.Module):
    """relu(IN(conv1(a + b))) + x with a from two 3x3x3 convolutions and b from a 1x1x1 one.

    The biases before the norms have no effect; they are kept for the exchange of weights.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        def conv(size: int) -> Conv3d:
            return Conv3d(
                channels,
                channels,
                size,
                padding=size // 2,
                bias=True,
                rngs=rngs,
                param_dtype=param_dtype,
                precision=precision,
            )

        self.proj, self.proj2, self.proj3, self.proj4 = conv(3), conv(3), conv(1), conv(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        a = norm_act((self.proj(x),), slope=0)
        a = norm_act((self.proj2(a),), slope=0)
        b = norm_act((self.proj3(x),), slope=0)
        return norm_act((self.proj4(a + b),), slope=0) + x


class ResidualBlock(nnx.Module):
    """Two 3x3x3 convolutions with instance norm and leaky ReLU, and a shortcut (1x1x1 where the channels change)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        def conv(inputs: int, size: int) -> Conv3d:
            return Conv3d(
                inputs,
                outputs,
                size,
                padding=size // 2,
                bias=False,
                rngs=rngs,
                param_dtype=param_dtype,
                precision=precision,
            )

        self.conv1, self.conv2 = conv(inputs, 3), conv(outputs, 3)
        self.conv3 = conv(inputs, 1) if inputs != outputs else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of the channels of `parts` side by side."""
        y = self.conv2(norm_act((self.conv1(*parts),), slope=LEAKY_SLOPE))
        if self.conv3 is None:
            return norm_act((y,), plus=jnp.concatenate(parts, -1), slope=LEAKY_SLOPE)
        return norm_act((y, self.conv3(*parts)), slope=LEAKY_SLOPE)


class UpBlock(nnx.Module):
    """Doubles the grid of x, joins the skip connection behind it, and applies a residual block."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.up = Upsample(inputs, outputs, **common)
        self.block = ResidualBlock(2 * outputs, outputs, **common)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.block(self.up(x), skip)
