"""XLA's own convolution, on a GPU cuDNN's."""

import jax
from jax import lax

from mambahome_kernels.conv3d.base import Backend
from mambahome_kernels.conv3d.reference import mirrored


def _forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(dy, mirrored(kernel))


def _weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, dy, (1, 1, 1), [(1, 1)] * 3, dimension_numbers=("CDHWN", "IDHWO", "DHWNC"))


BACKEND = Backend(_forward, _input_gradient, _weight_gradient, lambda x, kernel: None)
