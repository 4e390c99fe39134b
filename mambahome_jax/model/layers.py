"""Linear and convolutional layers, channels-last, with torch's initial values as the published code has them.

Beside them what every layer needs: its number types, and which values its backward pass keeps or computes again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from mambahome_kernels.conv3d.api import conv3d as conv3d_of_few_channels
from mambahome_kernels.conv3d.api import why_not

from mambahome_jax.config import Precision, Triple
from mambahome_jax.model.three_products import in_float32

# TF32 is what XLA's default means for float32 on a GPU; bfloat16 operands have one meaning only.
_PRECISIONS: dict[Precision, lax.Precision] = {
    "fp32": lax.Precision.HIGHEST,
    "tf32": lax.Precision.DEFAULT,
    "bf16": lax.Precision.DEFAULT,
}


_KEPT = "kept"
# The names that the kernels give to what costs much to compute again.
_KEPT_BY_KERNELS = ("norm_act", "selective_scan")

Tree = TypeVar("Tree")

# Voxels up to which XLA's own 3-D convolution costs little even on a CPU; it compiles faster than a sum of slices.
_SMALL_GRID = 1024

# Products up to which a float32 convolution is summed in float64 on a CPU, where that takes about as long.
_FEW_PRODUCTS = 2**25


@dataclass(frozen=True)
class Numerics:
    """In which numbers a network computes.

    param_dtype: of the parameters, float32 or float64 (with JAX x64). precision: of matrix products and convolutions
    and the activations between them.
    """

    param_dtype: Any = jnp.float32
    precision: Precision = "fp32"

    @property
    def lax_precision(self) -> lax.Precision:
        """The `precision` argument of matrix products and convolutions."""
        return _PRECISIONS[self.precision]

    @property
    def activation_dtype(self) -> jnp.dtype:
        """bfloat16 for bf16, else that of the parameters (float32 or float64)."""
        return jnp.dtype(jnp.bfloat16 if self.precision == "bf16" else self.param_dtype)


FLOAT32 = Numerics()


def keep(tree: Tree) -> Tree:
    """Marks what costs much to compute for the memory it takes: results of convolutions and large products, and
    statistics."""
    return checkpoint_name(tree, _KEPT)


def remat(everything: bool, module: nnx.Module, *arrays: jax.Array) -> jax.Array:
    """module(*arrays).

    With `everything` (--use_checkpoint) only the arguments are kept for the backward pass. Otherwise on a GPU, whose
    memory is small and whose time for norms and activations is short, all but what is marked is computed again.
    """
    if everything:
        return nnx.remat(_call)(module, *arrays)
    if jax.default_backend() != "gpu":
        return _call(module, *arrays)
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT, *_KEPT_BY_KERNELS)
    return nnx.remat(_call, policy=policy)(module, *arrays)


def _call(module: Any, *arrays: jax.Array) -> jax.Array:
    return module(*arrays)


def drawn(
    rngs: nnx.Rngs, shape: tuple[int, ...], dtype, draw: Callable[[np.random.Generator], np.ndarray]
) -> jax.Array:
    """An initial value of this shape that `draw` makes from a generator seeded by the next key of `rngs.params`.

    On the host, since jax.random compiles anew for every shape, which for the whole network takes minutes; the values
    are the same on every platform, and also where the constructor is traced.
    """

    def on_host(key_data: np.ndarray) -> np.ndarray:
        return np.asarray(draw(np.random.default_rng(np.asarray(key_data).ravel())), dtype)

    key_data = jax.random.key_data(rngs.params())
    if isinstance(key_data, jax.core.Tracer):
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, dtype), key_data)
    # jnp.asarray would compile a program for every shape.
    return jax.device_put(on_host(np.asarray(key_data)))


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype) -> nnx.Param:
    """Uniform in +-1/sqrt(fan_in): torch's default for weights and biases of convolutions and linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(drawn(rngs, shape, dtype, lambda rng: rng.uniform(-bound, bound, shape)))


class Linear(nnx.Module):
    """x @ kernel (+ bias): (..., inputs) -> (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.numerics = numerics
        self.kernel = uniform(rngs, (inputs, outputs), inputs, numerics.param_dtype)
        self.bias = uniform(rngs, (outputs,), inputs, numerics.param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), precision=self.numerics.lax_precision)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def each_axis(size: int | Triple) -> Triple:
    """An entry an axis; one number is that of all three."""
    return (size, size, size) if isinstance(size, int) else size


def conv3d(
    x: jax.Array, kernel: jax.Array, stride: int | Triple, padding: int | Triple, precision: Precision
) -> jax.Array:
    """3-D correlation of (batch, depth, height, width, inputs) with (kd, kh, kw, inputs, outputs).

    Where the kernel is 1 wide, or as wide as the stride, it is one matrix product. XLA's 3-D convolution is slow on a
    CPU: there the sum of 2-D convolutions over depth-shifted slices is several times faster on large grids, and small
    float32 ones are summed in float64, since most of the network's round-off comes from these sums.
    """
    stride, padding = each_axis(stride), each_axis(padding)
    if x.dtype == jnp.float32 and precision == "fp32" and jax.default_backend() == "cpu":
        outputs = _output_grid(x.shape[1:4], kernel, stride, padding)
        if x.shape[0] * math.prod(outputs) * kernel.size <= _FEW_PRODUCTS:
            return _conv3d_in_float64(stride, padding, x, kernel)
    return _conv3d(x, kernel, stride, padding, _PRECISIONS[precision])


def _output_grid(grid: Sequence[int], kernel: jax.Array, stride: Triple, padding: Triple) -> list[int]:
    sizes = zip(grid, kernel.shape[:3], stride, padding, strict=True)
    return [(length + 2 * pad - size) // step + 1 for length, size, step, pad in sizes]


def _conv3d(x: jax.Array, kernel: jax.Array, stride: Triple, padding: Triple, exact: lax.Precision) -> jax.Array:
    kd, kh, kw, inputs, outputs = kernel.shape
    if (kd, kh, kw) == stride and padding == (0, 0, 0):
        batch, depth, height, width, _ = x.shape
        x = x.reshape(batch, depth // kd, kd, height // kh, kh, width // kw, kw, inputs)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, depth // kd, height // kh, width // kw, -1)
        return jnp.matmul(x, kernel.reshape(-1, outputs), precision=exact)
    large = math.prod(x.shape[1:4]) > _SMALL_GRID or x.dtype == jnp.float64
    if jax.default_backend() == "cpu" and large:
        return _conv3d_by_slices(x, kernel, stride, padding, exact)
    if jax.default_backend() == "gpu" and stride == padding == (1, 1, 1) and why_not(x, kernel) is None:
        return conv3d_of_few_channels(x, kernel)  # cuDNN's brings every voxel from the L2 cache 27 times
    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=stride,
        padding=[(pad, pad) for pad in padding],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    if exact == lax.Precision.HIGHEST and x.dtype == jnp.float32 and jax.default_backend() == "gpu":
        return in_float32(convolve, x, kernel)  # cuDNN's convolutions without tensor cores take twice as long
    return convolve(x, kernel, precision=exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv3d_in_float64(stride: Triple, padding: Triple, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv3d of float32, summed in float64 and rounded once, also where JAX x64 is off; gradients in float32.

    For each depth of the kernel a matrix product with the rows of neighbours, which are gathered one axis at a time:
    all at once takes XLA many times as long to compile.
    """
    batch, outputs = x.shape[0], kernel.shape[-1]
    depth, height, width = _output_grid(x.shape[1:4], kernel, stride, padding)

    def shifted(x: jax.Array, axis: int, length: int) -> list[jax.Array]:
        step = stride[axis - 1]
        starts = range(kernel.shape[axis - 1])
        return [lax.slice_in_dim(x, i, i + step * (length - 1) + 1, step, axis) for i in starts]

    with jax.enable_x64(True):
        x = jnp.pad(x, ((0, 0), *[(pad, pad) for pad in padding], (0, 0)))
        x = jnp.concatenate(shifted(x, 3, width), axis=-1)
        x = jnp.concatenate(shifted(x, 2, height), axis=-1)
        wide = kernel.astype(jnp.float64).reshape(kernel.shape[0], -1, outputs)
        total = jnp.zeros((), jnp.float64)
        for taken, weights in zip(shifted(x, 1, depth), wide, strict=True):
            rows = taken.reshape(-1, taken.shape[-1]).astype(jnp.float64)
            total = total + jnp.matmul(rows, weights, precision=lax.Precision.HIGHEST)
        return total.astype(jnp.float32).reshape(batch, depth, height, width, outputs)


def _conv3d_in_float64_forward(stride: Triple, padding: Triple, x: jax.Array, kernel: jax.Array):
    return _conv3d_in_float64(stride, padding, x, kernel), (x, kernel)


def _conv3d_in_float64_backward(
    stride: Triple, padding: Triple, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
):
    _, transposed = jax.vjp(lambda x, kernel: _conv3d(x, kernel, stride, padding, lax.Precision.HIGHEST), *saved)
    return transposed(cotangent)


_conv3d_in_float64.defvjp(_conv3d_in_float64_forward, _conv3d_in_float64_backward)


def _conv3d_by_slices(
    x: jax.Array, kernel: jax.Array, stride: Triple, padding: Triple, exact: lax.Precision
) -> jax.Array:
    batch, _, height, width, inputs = x.shape
    kd, outputs = kernel.shape[0], kernel.shape[-1]
    if stride == (1, 1, 1):
        return _conv3d_by_depths(x, kernel, padding, exact)
    out_depth, step = _output_grid(x.shape[1:4], kernel, stride, padding)[0], stride[0]
    x = jnp.pad(x, ((0, 0), (padding[0], padding[0]), (0, 0), (0, 0), (0, 0)))
    total = None
    for i in range(kd):
        taken = lax.slice_in_dim(x, i, i + step * (out_depth - 1) + 1, step, axis=1)
        taken = taken.reshape(batch * out_depth, height, width, inputs)
        part = _conv2d(taken, kernel[i], stride[1:], padding[1:], exact)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(batch, out_depth, *total.shape[1:3], outputs)


def _conv3d_by_depths(x: jax.Array, kernel: jax.Array, padding: Triple, exact: lax.Precision) -> jax.Array:
    """Every depth of the kernel as outputs of one 2-D convolution, which are added up shifted against each other."""
    batch, depth, height, width, inputs = x.shape
    kd, kh, kw, _, outputs = kernel.shape
    wide = kernel.transpose(1, 2, 3, 0, 4).reshape(kh, kw, inputs, kd * outputs)
    y = _conv2d(x.reshape(batch * depth, height, width, inputs), wide, (1, 1), padding[1:], exact)
    y = y.reshape(batch, depth, *y.shape[1:3], kd, outputs)
    y = jnp.pad(y, ((0, 0), (padding[0], padding[0]), (0, 0), (0, 0), (0, 0), (0, 0)))
    out_depth = depth + 2 * padding[0] - kd + 1
    parts = [y[:, i : i + out_depth, :, :, i] for i in range(kd)]
    return functools.reduce(jnp.add, parts)


def _conv2d(
    x: jax.Array, kernel: jax.Array, stride: tuple[int, int], padding: tuple[int, int], exact: lax.Precision
) -> jax.Array:
    """(batch, height, width, inputs) -> (batch, height', width', outputs); kernel (kh, kw, inputs, outputs)."""
    kh, kw = kernel.shape[:2]
    pads = [(pad, pad) for pad in padding]
    if x.dtype == jnp.float64 and max(kh, kw) <= 3 and stride == (1, 1):
        # XLA has no fast float64 convolution on a CPU, and takes seconds to compile each of its plain loops.
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
        taps = [padded[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
        return jnp.matmul(jnp.concatenate(taps, -1), kernel.reshape(-1, kernel.shape[-1]), precision=exact)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=numbers, precision=exact)


class Conv3d(nnx.Module):
    """(batch, depth, height, width, inputs) -> (..., outputs), strided; kernel (kd, kh, kw, inputs, outputs).

    size, stride, padding: one number, or one an axis.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | Triple,
        *,
        stride: int | Triple = 1,
        padding: int | Triple = 0,
        bias: bool,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.stride, self.padding, self.numerics = stride, padding, numerics
        fan_in = inputs * math.prod(each_axis(size))
        self.kernel = uniform(rngs, (*each_axis(size), inputs, outputs), fan_in, numerics.param_dtype)
        self.bias = uniform(rngs, (outputs,), fan_in, numerics.param_dtype) if bias else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of the channels of `parts` side by side. A GPU adds up the convolutions of the parts, which is as fast, and
        joins nothing."""
        kernel = self.kernel[...].astype(parts[0].dtype)
        if len(parts) > 1 and jax.default_backend() != "gpu":
            parts = (jnp.concatenate(parts, -1),)
        ends = np.cumsum([part.shape[-1] for part in parts])
        kernels = jnp.split(kernel, ends[:-1], axis=3)
        y = functools.reduce(
            jnp.add,
            [
                conv3d(x, k, self.stride, self.padding, self.numerics.precision)
                for x, k in zip(parts, kernels, strict=True)
            ],
        )
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y if max(kernel.shape[:3]) == 1 else keep(y)


class Upsample(nnx.Module):
    """Transposed convolution, kernel as wide as the stride, no bias: each voxel becomes stride voxels by one product.

    With stride 2: out[2z+a, 2y+b, 2x+c, o] = sum over i of in[z, y, x, i] kernel[a, b, c, i, o].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int | Triple = 2,
        *,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.numerics, stride = numerics, each_axis(stride)
        # torch counts the outputs as fan-in of a transposed convolution
        self.kernel = uniform(rngs, (*stride, inputs, outputs), outputs * math.prod(stride), numerics.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, depth, height, width, inputs = x.shape
        a, b, c = self.kernel.shape[:3]
        kernel = self.kernel[...].astype(x.dtype).transpose(3, 0, 1, 2, 4)
        y = jnp.matmul(x, kernel.reshape(inputs, -1), precision=self.numerics.lax_precision)
        y = y.reshape(batch, depth, height, width, a, b, c, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(batch, a * depth, b * height, c * width, -1)


@dataclass(frozen=True)
class ChannelDropout:
    """dropout(x, number): each channel of each sample of (batch, ..., channels) 0 with probability `rate`, the others
    divided by 1 - rate (spatial dropout, Tompson et al., CVPR 2015); dtype and shape stay.

    key: from jax.random.key, another at each step. number: of the place in the network, so that each draws its own.
    Sample n draws from fold_in(key, n), whatever the size of the batch.
    """

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array, number: int) -> jax.Array:
        batch, channels = x.shape[0], x.shape[-1]
        place = jax.random.fold_in(self.key, number)
        kept = jax.vmap(
            lambda sample: jax.random.bernoulli(jax.random.fold_in(place, sample), 1 - self.rate, (channels,))
        )(jnp.arange(batch))
        # In float32: 1 / 0.9 in bfloat16 would raise every channel that is kept by 0.16 % too little or too much.
        factor = (kept / (1 - self.rate)).reshape(batch, *[1] * (x.ndim - 2), channels)
        return (x * factor).astype(x.dtype)
