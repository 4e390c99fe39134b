"""Linear and convolutional layers and norms, channels-last, with torch's initial values as the published code has them.

Beside them what every layer needs: its number types, and which values its backward pass keeps or computes again.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from mambahome_kernels import conv3d, norm_act
from mambahome_kernels.backends import platform
from mambahome_kernels.conv3d.api import Size, each_axis

from mambahome_jax.config import Precision
from mambahome_jax.errors import ConfigError

RMS_NORM_FLOOR = 1e-8
ALPHA_RANGE = (0.1, 2.0)


def at_least_float32(x: jax.Array) -> jax.Array:
    """x widened to float32 where it is narrower; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def instance_norm(x: jax.Array) -> jax.Array:
    """(batch, depth, height, width, channels) with mean 0 and biased variance 1 over space, a sample and channel."""
    return norm_act((x,), slope=1.0)


class RMSNorm(nnx.Module):
    """x / max(norm(x), 1e-8) * sqrt(channels) * gamma over the last axis (published soft_moe_with_dynamic_slots.py)."""

    def __init__(self, channels: int, *, param_dtype):
        self.gamma = nnx.Param(jnp.ones(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        # The floor is inside the root, whose slope at 0 would make the gradient of zero tokens nan.
        square = jnp.maximum(jnp.sum(jnp.square(wide), -1, keepdims=True), RMS_NORM_FLOOR**2)
        inverse = lax.rsqrt(square)
        return (wide * inverse * (wide.shape[-1] ** 0.5 * self.gamma[...])).astype(x.dtype)


class DynamicTanh(nnx.Module):
    """weight * tanh(clip(alpha, 0.1, 2) * x) + bias over the last axis (Zhu et al. 2025, clipped as published)."""

    def __init__(self, channels: int, *, param_dtype):
        self.alpha = nnx.Param(jnp.full(1, 0.5, param_dtype))
        self.weight = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = _clip(self.alpha[...], *ALPHA_RANGE)
        return (self.weight[...] * jnp.tanh(alpha * at_least_float32(x)) + self.bias[...]).astype(x.dtype)


def _clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """jnp.clip halves the gradient at the end points; the published clip passes it whole there."""
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, lax.stop_gradient(jnp.clip(x, low, high)))


# TF32 is what XLA's default means for float32 on a GPU; bfloat16 operands have one meaning only.
_PRECISIONS: dict[Precision, lax.Precision] = {
    "fp32": lax.Precision.HIGHEST,
    "tf32": lax.Precision.DEFAULT,
    "bf16": lax.Precision.DEFAULT,
}
LEAKY_SLOPE = 0.01
_KEPT = "kept"
# The names that the kernels give to what costs much to compute again.
_KEPT_BY_KERNELS = ("norm_act", "selective_scan")
Tree = TypeVar("Tree")
Array = jax.Array | np.ndarray  # what a layer or network that is called by a user takes


@dataclass(frozen=True)
class Numerics:
    """In which numbers a network computes.

    param_dtype: of the parameters, float32 or float64 (with JAX x64). precision: of matrix products and convolutions
    and the activations between them.
    """

    param_dtype: Any = jnp.float32
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not isinstance(self.precision, str) or self.precision not in _PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; expected {', '.join(_PRECISIONS)}")

    @property
    def lax_precision(self) -> lax.Precision:
        """The `precision` argument of matrix products and convolutions."""
        return _PRECISIONS[self.precision]

    @property
    def activation_dtype(self) -> jnp.dtype:
        """bfloat16 for bf16, else that of the parameters (float32 or float64)."""
        return jnp.dtype(jnp.bfloat16 if self.precision == "bf16" else self.param_dtype)


FLOAT32 = Numerics()


def require_positive(**sizes: int) -> None:
    """Raise ConfigError, naming it, for a size below 1."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise ConfigError(f"{name} is {size!r}; expected a whole number")
        if size < 1:
            raise ConfigError(f"{name} is {size}; expected 1 or more")


def require_array(name: str, value: Any) -> None:
    """Raise ConfigError, naming it, for an input that is no array of JAX or NumPy."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise ConfigError(f"{name} {type(value).__name__}; expected an array of JAX or NumPy")


def checked_tokens(tokens: Array, channels: int) -> jax.Array:
    """Return tokens for a layer of so many channels. Raises ConfigError where it cannot take them."""
    require_array("the tokens are a", tokens)
    if tokens.ndim != 3 or tokens.shape[-1] != channels or not tokens.shape[1]:
        raise ConfigError(f"the tokens have shape {tokens.shape}; expected (batch, length from 1 on, {channels})")
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise ConfigError(f"the tokens are {tokens.dtype}; expected float32, bfloat16 or float64")
    return jnp.asarray(tokens)


def save_for_backward(tree: Tree) -> Tree:
    """Mark what costs much time to compute for its memory: convolutions, large products, statistics."""
    return checkpoint_name(tree, _KEPT)


def remat(everything: bool, module: nnx.Module, *arrays: jax.Array) -> jax.Array:
    """Call the module; the backward pass computes again `everything`, or on a GPU all that is not marked.

    A GPU's memory is small, and its time for norms and activations short.
    """
    if everything:
        return nnx.remat(_call)(module, *arrays)
    if platform() != "gpu":
        return _call(module, *arrays)
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT, *_KEPT_BY_KERNELS)
    return nnx.remat(_call, policy=policy)(module, *arrays)


def _call(module: Any, *arrays: jax.Array) -> jax.Array:
    return module(*arrays)


def init_on_host(
    rngs: nnx.Rngs, shape: tuple[int, ...], dtype, draw: Callable[[np.random.Generator], np.ndarray]
) -> jax.Array:
    """Draw an initial value from a generator seeded by the next key of `rngs.params`; equal on every platform.

    On the host, since jax.random compiles anew for every shape, which takes minutes for the whole network.
    """

    def on_host(key_data: np.ndarray) -> np.ndarray:
        return np.asarray(draw(np.random.default_rng(np.asarray(key_data).ravel())), dtype)

    if not isinstance(rngs, nnx.Rngs):
        raise ConfigError(f"rngs is a {type(rngs).__name__}; expected nnx.Rngs(seed)")
    key_data = jax.random.key_data(rngs.params())
    if isinstance(key_data, jax.core.Tracer):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, dtype), key_data)
    # jnp.asarray would compile a program for every shape.
    return jax.device_put(on_host(np.asarray(key_data)))


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    """Uniform in +-1/sqrt(fan_in): torch's default for weights and biases of convolutions and linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(init_on_host(rngs, shape, dtype, lambda rng: rng.uniform(-bound, bound, shape)))


def he_normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    """Normal of variance 2 / fan_in, widened for the leaky ReLU (He et al. 2015)."""
    std = math.sqrt(2 / (1 + LEAKY_SLOPE**2) / fan_in)
    return nnx.Param(init_on_host(rngs, shape, dtype, lambda rng: std * rng.standard_normal(shape)))


def zeros(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


class Initial(NamedTuple):
    """How kernels and biases of a layer begin: each (rngs, shape, fan_in, dtype) -> parameter."""

    kernel: Callable[..., nnx.Param]
    bias: Callable[..., nnx.Param]


TORCH, HE = Initial(uniform, uniform), Initial(he_normal, zeros)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU through erf; jax.nn goes through erfc, which takes XLA several times as long to compile."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


class Linear(nnx.Module):
    """x @ kernel (+ bias): (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.numerics = numerics
        self.kernel = uniform(rngs, (inputs, outputs), inputs, numerics.param_dtype)
        self.bias = uniform(rngs, (outputs,), inputs, numerics.param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), precision=self.numerics.lax_precision)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Conv3d(nnx.Module):
    """(batch, depth, height, width, inputs) -> (..., outputs), strided; kernel (kd, kh, kw, inputs, outputs).

    size, stride, padding: one number, or one an axis; by default padding keeps the grid of an odd size.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: Size,
        *,
        stride: Size = 1,
        padding: Size | None = None,
        bias: bool,
        initial: Initial = TORCH,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.stride, self.padding, self.numerics = stride, padding, numerics
        fan_in = inputs * math.prod(each_axis(size))
        self.kernel = initial.kernel(rngs, (*each_axis(size), inputs, outputs), fan_in, numerics.param_dtype)
        self.bias = initial.bias(rngs, (outputs,), fan_in, numerics.param_dtype) if bias else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Convolve `parts`, whose channels lie side by side; a GPU adds up their convolutions and joins nothing."""
        kernel = self.kernel[...].astype(parts[0].dtype)
        if len(parts) > 1 and platform() != "gpu":
            parts = (jnp.concatenate(parts, -1),)
        ends = np.cumsum([part.shape[-1] for part in parts])
        kernels = jnp.split(kernel, ends[:-1], axis=3)
        convolve = functools.partial(conv3d, precision=self.numerics.lax_precision)
        y = functools.reduce(
            jnp.add, [convolve(x, k, self.stride, self.padding) for x, k in zip(parts, kernels, strict=True)]
        )
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y if max(kernel.shape[:3]) == 1 else save_for_backward(y)


class DepthwiseConv3d(nnx.Module):
    """A convolution of each channel alone, zeros beyond the grid: (batch, depth, height, width, channels) -> the same.

    size: odd, one number or one an axis; kernel (kd, kh, kw, channels).
    """

    def __init__(self, channels: int, size: Size = 3, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        taps = math.prod(each_axis(size))
        self.kernel = uniform(rngs, (*each_axis(size), channels), taps, numerics.param_dtype)
        self.bias = uniform(rngs, (channels,), taps, numerics.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        *size, _ = kernel.shape
        # A sum of shifted products is one pass over memory; XLA's grouped convolutions are not.
        wide = jnp.pad(at_least_float32(x), ((0, 0), *((n // 2, n // 2) for n in size), (0, 0)))
        y = self.bias[...]
        for offset in np.ndindex(*size):
            window = (slice(begin, begin + n) for begin, n in zip(offset, x.shape[1:4], strict=True))
            y = y + wide[:, *window] * kernel[offset]
        return y.astype(x.dtype)


class Upsample(nnx.Module):
    """Transposed convolution, kernel as wide as the stride: each voxel becomes stride voxels by one product.

    With stride 2: out[2z+a, 2y+b, 2x+c, o] = sum over i of in[z, y, x, i] kernel[a, b, c, i, o] (+ bias[o]).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: Size = 2,
        *,
        bias: bool = False,
        initial: Initial = TORCH,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.numerics, stride = numerics, each_axis(stride)
        # torch counts the outputs as fan-in of a transposed convolution
        fan_in = outputs * math.prod(stride)
        self.kernel = initial.kernel(rngs, (*stride, inputs, outputs), fan_in, numerics.param_dtype)
        self.bias = initial.bias(rngs, (outputs,), fan_in, numerics.param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, depth, height, width, inputs = x.shape
        a, b, c = self.kernel.shape[:3]
        kernel = self.kernel[...].astype(x.dtype).transpose(3, 0, 1, 2, 4)
        y = jnp.matmul(x, kernel.reshape(inputs, -1), precision=self.numerics.lax_precision)
        y = y.reshape(batch, depth, height, width, a, b, c, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.reshape(batch, a * depth, b * height, c * width, -1)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


@dataclass(frozen=True)
class ChannelDropout:
    """Spatial dropout (Tompson et al., CVPR 2015): zero channels of a sample with probability `rate`, scale the others.

    key: from jax.random.key, another at each step. Sample n draws from fold_in(key, n), whatever the size of the batch.
    """

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array, number: int) -> jax.Array:
        """x (batch, ..., channels) with channels dropped; each place in the network, by number, draws its own."""
        batch, channels = x.shape[0], x.shape[-1]
        place = jax.random.fold_in(self.key, number)
        kept = jax.vmap(
            lambda sample: jax.random.bernoulli(jax.random.fold_in(place, sample), 1 - self.rate, (channels,))
        )(jnp.arange(batch))
        # In float32: 1 / 0.9 in bfloat16 would raise every channel that is kept by 0.16 % too little or too much.
        factor = (kept / (1 - self.rate)).reshape(batch, *[1] * (x.ndim - 2), channels)
        return (x * factor).astype(x.dtype)
