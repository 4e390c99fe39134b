"""The convolution in plain XLA, as each device is fast and exact at it.

On a GPU it is cuDNN's; float32 on its tensor cores takes three products of TF32 halves. On a CPU, where XLA's 3-D
convolution is slow, 2-D convolutions and products are several times faster; small float32 ones are summed in float64,
since most of the network's round-off comes from these sums.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mambahome_kernels.backends import planned_batch, platform
from mambahome_kernels.conv3d.api import Backend, Geometry

Product = Callable[[jax.Array, jax.Array], jax.Array]
# Voxels up to which XLA's own 3-D convolution costs little even on a CPU; it compiles faster than a sum of slices.
_SMALL_GRID = 1024
# Products up to which a float32 convolution is summed in float64 on a CPU, where that takes about as long.
_FEW_PRODUCTS = 2**25
# Taps up to which one kernel gathers windows along all axes: XLA compiles that of 7 x 7 x 7 for half a minute.
_MOST_AT_ONCE = 27
_TF32_BITS = np.uint32(0xFFFFE000)  # sign, exponent and the ten bits of TF32's mantissa


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    if platform() == "cpu" and x.dtype == jnp.float32 and precision == lax.Precision.HIGHEST:
        outputs = geometry.output_grid(x.shape[1:4])
        if planned_batch(x.shape[0]) * math.prod(outputs) * kernel.size <= _FEW_PRODUCTS:
            return _in_float64(geometry, x, kernel)
    return _in_own_dtype(x, kernel, geometry, precision)


def _in_own_dtype(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    if geometry.is_patches:
        return _multiply_patches(x, kernel, precision)
    if platform() == "cpu" and (math.prod(x.shape[1:4]) > _SMALL_GRID or x.dtype == jnp.float64):
        by = _by_depths if geometry.stride == (1, 1, 1) else _by_slices
        return by(x, kernel, geometry, precision)
    if platform() == "gpu" and x.dtype == jnp.bfloat16 and x.shape[-1] == 1:
        return multiply_windows(geometry, x, kernel)
    product = _whole(geometry)
    if precision == lax.Precision.HIGHEST and x.dtype == jnp.float32 and platform() == "gpu":
        return product_3xtf32(product, x, kernel)  # cuDNN's convolutions without tensor cores take twice as long
    return product(x, kernel, precision=precision)


def _whole(geometry: Geometry) -> Callable[..., jax.Array]:
    """XLA's own convolution of x and kernel."""
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=geometry.stride,
        padding=geometry.pads,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_windows(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve a single channel by one matrix product with what every tap sees.

    cuDNN computes it without tensor cores, which take eight channels or more.
    """
    return jnp.einsum("ijkbdhw,ijko->bdhwo", _windows(geometry, x), kernel[:, :, :, 0])


def _windows(geometry: Geometry, x: jax.Array) -> jax.Array:
    """(kd, kh, kw, batch, depth', height', width'), gathered one axis at a time."""
    seen = jnp.pad(x[..., 0], ((0, 0), *geometry.pads))
    grid = geometry.output_grid(x.shape[1:4])
    for axis in (2, 1, 0):
        step, span, at = geometry.stride[axis], geometry.stride[axis] * (grid[axis] - 1) + 1, axis - 3
        if math.prod(geometry.sizes) > _MOST_AT_ONCE:
            seen = lax.optimization_barrier(seen)
        taps = (lax.slice_in_dim(seen, i, i + span, step, seen.ndim + at) for i in range(geometry.sizes[axis]))
        seen = jnp.stack(list(taps))
    return seen


def _save_both(geometry: Geometry, x: jax.Array, kernel: jax.Array):
    return multiply_windows(geometry, x, kernel), (x, kernel)


def _window_gradients(geometry: Geometry, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    x, kernel = saved
    # Gathered anew: XLA would keep what the forward pass gathered until here.
    x, cotangent = lax.optimization_barrier((x, cotangent))
    (to_x,) = jax.linear_transpose(lambda x: _whole(geometry)(x, kernel), x)(cotangent)
    summed = jnp.einsum("ijkbdhw,bdhwo->ijko", _windows(geometry, x), cotangent, preferred_element_type=jnp.float32)
    return to_x, summed[:, :, :, None].astype(kernel.dtype)


multiply_windows.defvjp(_save_both, _window_gradients)


def _multiply_patches(x: jax.Array, kernel: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """Convolve by one matrix product, where the kernel is as wide as its stride."""
    batch, depth, height, width, inputs = x.shape
    kd, kh, kw = kernel.shape[:3]
    x = x.reshape(batch, depth // kd, kd, height // kh, kh, width // kw, kw, inputs)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, depth // kd, height // kh, width // kw, -1)
    return jnp.matmul(x, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def split_tf32(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 array as (high, low), whose sum it is; `high` has the bits that TF32 holds."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & _TF32_BITS
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def three_products(product: Product, a: jax.Array, b: jax.Array) -> jax.Array:
    """product(a, b), a bilinear function of float32 arrays that rounds its operands to TF32, nearly as in float32.

    a b = ah bh + ah bl + al bh but for al bl, 2^-22 of it: float32's own rounding is 2^-24, and the sum of many
    products loses more than either.
    """
    (a_high, a_low), (b_high, b_low) = split_tf32(a), split_tf32(b)
    return product(a_high, b_low) + product(a_low, b_high) + product(a_high, b_high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product_3xtf32(product: Product, a: jax.Array, b: jax.Array) -> jax.Array:
    """`three_products` whose gradients consist of three products each, too."""
    return three_products(product, a, b)


def _save_operands(product: Product, a: jax.Array, b: jax.Array):
    return three_products(product, a, b), (a, b)


def _operand_gradients(product: Product, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    a, b = saved

    def to_a(cotangent: jax.Array, b: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda a: product(a, b), a)(cotangent)[0]

    def to_b(cotangent: jax.Array, a: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda b: product(a, b), b)(cotangent)[0]

    return three_products(to_a, cotangent, b), three_products(to_b, cotangent, a)


product_3xtf32.defvjp(_save_operands, _operand_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_float64(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sum float32 products in float64 and round once, also where JAX x64 is off; gradients in float32.

    For each depth of the kernel a matrix product with the rows of neighbours, which are gathered one axis at a time:
    all at once takes XLA many times as long to compile.
    """
    batch, outputs = x.shape[0], kernel.shape[-1]
    depth, height, width = geometry.output_grid(x.shape[1:4])

    def shifted(x: jax.Array, axis: int, length: int) -> list[jax.Array]:
        step, starts = geometry.stride[axis - 1], range(geometry.sizes[axis - 1])
        return [lax.slice_in_dim(x, i, i + step * (length - 1) + 1, step, axis) for i in starts]

    with jax.enable_x64(True):
        x = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
        x = jnp.concatenate(shifted(x, 3, width), axis=-1)
        x = jnp.concatenate(shifted(x, 2, height), axis=-1)
        wide = kernel.astype(jnp.float64).reshape(kernel.shape[0], -1, outputs)
        total = jnp.zeros((), jnp.float64)
        for part, weights in zip(shifted(x, 1, depth), wide, strict=True):
            rows = part.reshape(-1, part.shape[-1]).astype(jnp.float64)
            total = total + jnp.matmul(rows, weights, precision=lax.Precision.HIGHEST)
        return total.astype(jnp.float32).reshape(batch, depth, height, width, outputs)


def _save(geometry: Geometry, x: jax.Array, kernel: jax.Array):
    return _in_float64(geometry, x, kernel), (x, kernel)


def _gradients(geometry: Geometry, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    return jax.vjp(lambda x, kernel: _in_own_dtype(x, kernel, geometry, lax.Precision.HIGHEST), *saved)[1](cotangent)


_in_float64.defvjp(_save, _gradients)


def _by_slices(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    """Sum 2-D convolutions over slices shifted along depth."""
    batch, _, height, width, inputs = x.shape
    out_depth, step = geometry.output_grid(x.shape[1:4])[0], geometry.stride[0]
    x = jnp.pad(x, ((0, 0), geometry.pads[0], (0, 0), (0, 0), (0, 0)))

    def part(i: int) -> jax.Array:
        rows = lax.slice_in_dim(x, i, i + step * (out_depth - 1) + 1, step, axis=1)
        return _conv2d(rows.reshape(batch * out_depth, height, width, inputs), kernel[i], geometry, precision)

    total = functools.reduce(jnp.add, map(part, range(kernel.shape[0])))
    return total.reshape(batch, out_depth, *total.shape[1:3], kernel.shape[-1])


def _by_depths(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    """Every depth of the kernel as outputs of one 2-D convolution, which are added up shifted against each other."""
    batch, depth, height, width, inputs = x.shape
    kd, kh, kw, _, outputs = kernel.shape
    wide = kernel.transpose(1, 2, 3, 0, 4).reshape(kh, kw, inputs, kd * outputs)
    y = _conv2d(x.reshape(batch * depth, height, width, inputs), wide, geometry, precision)
    y = y.reshape(batch, depth, *y.shape[1:3], kd, outputs)
    y = jnp.pad(y, ((0, 0), geometry.pads[0], (0, 0), (0, 0), (0, 0), (0, 0)))
    out_depth = geometry.output_grid(x.shape[1:4])[0]
    return functools.reduce(jnp.add, [y[:, i : i + out_depth, :, :, i] for i in range(kd)])


def _conv2d(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    """(batch, height, width, inputs) -> (batch, height', width', outputs); kernel (kh, kw, inputs, outputs)."""
    (kh, kw), stride, pads = kernel.shape[:2], geometry.stride[1:], geometry.pads[1:]
    if x.dtype == jnp.float64 and max(kh, kw) <= 3 and stride == (1, 1):
        # XLA has no fast float64 convolution on a CPU, and takes seconds to compile each of its plain loops.
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
        taps = [padded[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
        return jnp.matmul(jnp.concatenate(taps, -1), kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=numbers, precision=precision)


BACKEND = Backend(_convolve)
