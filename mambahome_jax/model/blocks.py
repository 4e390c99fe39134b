"""Convolutional blocks: gated spatial convolution (Xing et al. 2024), residual and up block (as in MONAI's UNETR)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import Precision, Triple
from mambahome_jax.model.layers import Conv3d, Upsample, each_axis
from mambahome_jax.model.norms import norm_act

LEAKY_SLOPE = 0.01


def same(size: int | Triple) -> Triple:
    """Padding with which an odd kernel of this size keeps the grid."""
    a, b, c = (n // 2 for n in each_axis(size))
    return a, b, c


class GatedSpatialConv(nnx.Module):
    """relu(IN(conv1(a + b))) + x with a from two convolutions of `size`, 3x3x3 as published, and b from a 1x1x1 one.

    The biases before the norms have no effect; they are kept for the exchange of weights.
    """

    def __init__(self, channels: int, size: int | Triple = 3, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        def conv(size: int | Triple) -> Conv3d:
            return Conv3d(
                channels,
                channels,
                size,
                padding=same(size),
                bias=True,
                rngs=rngs,
                param_dtype=param_dtype,
                precision=precision,
            )

        self.proj, self.proj2, self.proj3, self.proj4 = conv(size), conv(size), conv(1), conv(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        a = norm_act((self.proj(x),), slope=0)
        a = norm_act((self.proj2(a),), slope=0)
        b = norm_act((self.proj3(x),), slope=0)
        return norm_act((self.proj4(a + b),), slope=0) + x


class ResidualBlock(nnx.Module):
    """Two convolutions of `size`, instance norm and leaky ReLU, and a shortcut (1x1x1 where the channels change)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | Triple = 3,
        *,
        rngs: nnx.Rngs,
        param_dtype,
        precision: Precision,
    ):
        def conv(inputs: int, size: int | Triple) -> Conv3d:
            return Conv3d(
                inputs,
                outputs,
                size,
                padding=same(size),
                bias=False,
                rngs=rngs,
                param_dtype=param_dtype,
                precision=precision,
            )

        self.conv1, self.conv2 = conv(inputs, size), conv(outputs, size)
        self.conv3 = conv(inputs, 1) if inputs != outputs else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of the channels of `parts` side by side."""
        y = self.conv2(norm_act((self.conv1(*parts),), slope=LEAKY_SLOPE))
        if self.conv3 is None:
            return norm_act((y,), plus=jnp.concatenate(parts, -1), slope=LEAKY_SLOPE)
        return norm_act((y, self.conv3(*parts)), slope=LEAKY_SLOPE)


class UpBlock(nnx.Module):
    """Refines the grid of x by `stride`, joins the skip connection behind it, and applies a residual block."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int | Triple = 2,
        size: int | Triple = 3,
        *,
        rngs: nnx.Rngs,
        param_dtype,
        precision: Precision,
    ):
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.up = Upsample(inputs, outputs, stride, **common)
        self.block = ResidualBlock(2 * outputs, outputs, size, **common)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.block(self.up(x), skip)
