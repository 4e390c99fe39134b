"""The convolution in plain XLA: its ways on a CPU, and float32 by three products of TF32 halves as on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mambahome_kernels import conv3d
from mambahome_kernels.backends import exporting
from mambahome_kernels.conv3d.api import Geometry
from mambahome_kernels.conv3d.xla import multiply_windows, product_3xtf32, split_tf32, three_products
from scipy.ndimage import correlate

HIGHEST = lax.Precision.HIGHEST


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=lax.Precision.HIGHEST
    )


def rounded_convolve(x, kernel):
    """As on tensor cores: operands cut to TF32, products and sums exact."""
    return convolve(split_tf32(x)[0], split_tf32(kernel)[0])


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 9, 8, 16)), rng.standard_normal((3, 3, 16, 8))
    return x.astype(np.float32), kernel.astype(np.float32)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_halves_are_the_whole_and_the_first_is_tf32():
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(1e-3)
    high, low = (np.asarray(part) for part in split_tf32(jnp.asarray(x)))
    np.testing.assert_array_equal(high.astype(np.float64) + low, x)
    assert not (high.view(np.uint32) & 0x1FFF).any()
    assert (np.abs(low) <= np.abs(x) * 2.0**-10).all()


def test_three_rounded_products_are_one_in_float32(arrays):
    x, kernel = arrays
    with jax.enable_x64(True):
        exact = convolve(jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64))
    assert relative(three_products(rounded_convolve, jnp.asarray(x), jnp.asarray(kernel)), exact) < 5e-7
    assert relative(rounded_convolve(jnp.asarray(x), jnp.asarray(kernel)), exact) > 1e-4


def test_gradients_are_those_of_the_product(arrays):
    def value_and_gradients(function, x, kernel):
        y, vjp = jax.vjp(function, x, kernel)
        return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    with jax.enable_x64(True):
        exact = value_and_gradients(convolve, *(jnp.asarray(a, jnp.float64) for a in arrays))
    got = value_and_gradients(lambda x, k: product_3xtf32(convolve, x, k), *map(jnp.asarray, arrays))
    for ours, right in zip(got, exact, strict=True):
        assert relative(ours, right) < 1e-6


@pytest.mark.parametrize(
    ("backend", "size", "stride", "padding"),
    # The reference takes a product a tap, all of which are compiled: 125 instead of 343 say as much.
    [(backend, *rest) for backend in ("reference", "xla") for rest in ((3, 1, 1), (2, 2, 0), (1, 1, 0))]
    + [("reference", 5, 2, 2), ("xla", 7, 2, 3)],
)
def test_conv3d_is_the_definition(backend, size, stride, padding, x64):
    """Against scipy's correlation."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 8, 6, 10, 2)), rng.normal(size=(size, size, size, 2, 3))
    got = conv3d(jnp.asarray(x), jnp.asarray(kernel), stride, padding, precision=HIGHEST, backend=backend)
    padded = np.pad(x[0], [(padding, padding)] * 3 + [(0, 0)])
    centre = size // 2
    for o in range(3):
        full = sum(correlate(padded[..., i], kernel[..., i, o], mode="constant", origin=0) for i in range(2))
        valid = full[tuple(slice(centre, n - size + centre + 1, stride) for n in padded.shape[:3])]
        np.testing.assert_allclose(got[0, ..., o], valid, atol=1e-10)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (7, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("shape", [(1, 8, 8, 8, 4), (1, 16, 16, 16, 8)])
def test_a_number_is_that_of_each_axis_to_the_bit(size, stride, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = jax.ShapeDtypeStruct((size, size, size, shape[-1], 8), jnp.float32)
    pad = 0 if size == 2 else size // 2

    def program(stride, pad):
        run = jax.jit(jax.grad(lambda x, k: jnp.sum(conv3d(x, k, stride, pad, precision=HIGHEST) ** 2), (0, 1)))
        return run.lower(x, kernel).as_text()

    assert program(stride, pad) == program((stride,) * 3, (pad,) * 3)


@pytest.mark.parametrize("size", [(3, 3, 1), (1, 3, 3), (7, 7, 3), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("x64", [False, True])
def test_conv3d_of_unequal_axes_is_the_definition(size, x64):
    with jax.enable_x64(x64):
        rng = np.random.default_rng(0)
        stride = tuple(2 if n in (2, 7) else 1 for n in size)
        pad = tuple(0 if 2 in size else n // 2 for n in size)
        for shape in ((1, 8, 6, 10, 2), (1, 20, 18, 16, 2)):
            x = jnp.asarray(rng.normal(size=shape).astype(np.float64 if x64 else np.float32))
            kernel = jnp.asarray(rng.normal(size=(*size, 2, 3)).astype(x.dtype))
            expected = jax.lax.conv_general_dilated(
                x,
                kernel,
                stride,
                [(p, p) for p in pad],
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
                precision="highest",
            )
            got = conv3d(x, kernel, stride, pad, precision=HIGHEST)
            np.testing.assert_allclose(got, expected, atol=1e-10 if x64 else 1e-4)


@pytest.mark.parametrize(("size", "stride"), [((3, 3, 3), 1), ((3, 3, 1), 1), ((7, 7, 7), 2), ((7, 7, 1), (2, 2, 1))])
def test_a_single_channel_by_its_windows_is_the_definition(size, stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 8, 9, 10, 1), np.float32), rng.standard_normal((*size, 1, 5), np.float32)
    geometry = Geometry.of(kernel, stride, None)
    expected, pull = jax.vjp(lambda x, k: conv3d(x, k, stride, precision=HIGHEST, backend="xla"), x, kernel)
    dy = rng.standard_normal(expected.shape, np.float32)
    got, pull_windows = jax.vjp(lambda x, k: multiply_windows(geometry, x, k), x, kernel)
    for ours, right in zip((got, *pull_windows(dy)), (expected, *pull(dy)), strict=True):
        assert relative(ours, right) < 1e-6


def test_a_single_bfloat16_channel_is_no_convolution_on_a_gpu():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 8, 8, 6, 1), (3, 3, 1, 1, 24)))
    loss = jax.grad(lambda kernel, x: jnp.sum(conv3d(x, kernel).astype(jnp.float32)))
    with exporting("gpu", 2):
        text = jax.jit(loss).lower(kernel, x).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.convolution" not in text
