"""Three products of TF32 halves against one in float64, with a product that rounds as the tensor cores do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mambahome_jax.model.three_products import in_float32, split, three_products


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=lax.Precision.HIGHEST
    )


def rounded_convolve(x, kernel):
    """As on tensor cores: operands cut to TF32, products and sums exact."""
    return convolve(split(x)[0], split(kernel)[0])


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
    high, low = (np.asarray(part) for part in split(jnp.asarray(x)))
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
    got = value_and_gradients(lambda x, k: in_float32(convolve, x, k), *map(jnp.asarray, arrays))
    for ours, right in zip(got, exact, strict=True):
        assert relative(ours, right) < 1e-6
