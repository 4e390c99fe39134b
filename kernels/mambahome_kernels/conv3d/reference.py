"""The convolution as its definition reads: a sum over shifts. The specification of the other backends.

    y[v, o] = sum over taps t of the kernel and inputs c of x[stride * v + t - padding, c] kernel[t, c, o]

with zeros outside the grid; summed in float32, or float64 where x is.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.conv3d.api import Backend, Geometry


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None = None) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x.astype(wide), ((0, 0), *geometry.pads, (0, 0)))
    grid = geometry.output_grid(x.shape[1:4])
    terms = []
    for tap in itertools.product(*map(range, geometry.sizes)):
        axes = zip(tap, geometry.stride, grid, strict=True)
        shifted = padded[:, *(slice(t, t + step * (n - 1) + 1, step) for t, step, n in axes)]
        terms.append(jnp.matmul(shifted, kernel[tap].astype(wide), precision=lax.Precision.HIGHEST))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


BACKEND = Backend(_convolve)
