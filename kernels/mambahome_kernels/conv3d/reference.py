"""The convolution as its definition reads: a sum over 27 shifts. The specification of the other backends.

    y[v, o] = sum over taps t in {0, 1, 2}^3 and inputs c of x[v + t - 1, c] kernel[t, c, o]

with zeros outside the grid; summed in float32, or float64 where x is.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.conv3d.base import Backend

_TAPS = tuple(itertools.product(range(3), repeat=3))


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _shifted(x: jax.Array) -> list[jax.Array]:
    """x[v + t - 1] for every tap."""
    padded = jnp.pad(_wide(x), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    depth, height, width = x.shape[1:4]
    return [padded[:, d : d + depth, h : h + height, w : w + width] for d, h, w in _TAPS]


def _forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    taps = zip(_shifted(x), _TAPS, strict=True)
    terms = [jnp.matmul(part, _wide(kernel)[tap], precision=lax.Precision.HIGHEST) for part, tap in taps]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(dy, mirrored(kernel))


def _weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    taps = [jnp.einsum("ndhwc,ndhwo->co", part, _wide(dy), precision=lax.Precision.HIGHEST) for part in _shifted(x)]
    return jnp.stack(taps).reshape(3, 3, 3, x.shape[-1], dy.shape[-1])


def mirrored(kernel: jax.Array) -> jax.Array:
    """The kernel whose convolution is the gradient by the input."""
    return kernel[::-1, ::-1, ::-1].swapaxes(3, 4)


BACKEND = Backend(_forward, _input_gradient, _weight_gradient, lambda x, kernel: None)
