"""The Pallas kernels of the convolution on a GPU, at the network's channels and on grids that no tile divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mambahome_kernels import conv3d
from mambahome_kernels.conv3d.api import why_not

CUBE, IN_PLANE = (3, 3, 3), (3, 3, 1)


def arrays(shape, outputs, size=CUBE, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    inputs = shape[-1]
    x = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    weights = rng.standard_normal((*size, inputs, outputs), np.float32) / (np.prod(size) * inputs) ** 0.5
    kernel = jnp.asarray(weights, dtype)
    return x, kernel, jnp.asarray(rng.standard_normal((*shape[:-1], outputs), np.float32), dtype)


_REASON = why_not(*arrays((1, 8, 8, 8, 48), 48)[:2])
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def all_three(x, kernel, dy, backend):
    y, pull = jax.vjp(lambda x, kernel: conv3d(x, kernel, backend=backend), x, kernel)
    return y, *pull(dy)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("shape", "outputs", "size"),
    [
        ((2, 64, 64, 64, 48), 48, CUBE),
        ((1, 56, 56, 40, 24), 48, CUBE),
        ((4, 28, 28, 20, 24), 24, CUBE),
        ((1, 9, 13, 22, 32), 32, CUBE),
        ((2, 20, 24, 32, 16), 64, CUBE),
        ((3, 2, 3, 5, 8), 8, CUBE),
        ((1, 24, 16, 8, 16), 16, CUBE),
        ((2, 10, 11, 8, 24), 48, CUBE),
        ((2, 64, 64, 10, 24), 24, IN_PLANE),
        ((2, 37, 53, 11, 48), 24, IN_PLANE),
        ((3, 2, 5, 3, 64), 16, IN_PLANE),
        ((1, 12, 40, 64, 32), 64, IN_PLANE),
        ((2, 7, 45, 70, 32), 40, (1, 3, 3)),
    ],
    ids=str,
)
def test_kernels_are_the_definition(shape, outputs, size):
    inputs = arrays(shape, outputs, size)
    wide = [a.astype(jnp.float32) for a in inputs]
    got = jax.jit(lambda *a: all_three(*a, "mosaic_gpu"))(*inputs)
    expected = jax.jit(lambda *a: all_three(*a, "reference"))(*wide)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 3e-3  # rounding to bfloat16
    again = jax.jit(lambda *a: all_three(*a, "mosaic_gpu"))(*inputs)
    assert all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
