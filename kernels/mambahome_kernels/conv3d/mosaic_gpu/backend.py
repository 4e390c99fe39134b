"""The convolution of few channels for Hopper GPUs, as Pallas Mosaic GPU kernels. The algorithm: kernels/README.md."""

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.conv3d.api import Backend, Geometry
from mambahome_kernels.conv3d.mosaic_gpu import forward, weight_gradient
from mambahome_kernels.conv3d.mosaic_gpu.tiles import PIECE
from mambahome_kernels.mosaic.partition import over_batch
from mambahome_kernels.mosaic.runtime import core_count, traced_once, why_not_hopper

_GEOMETRY = Geometry((3, 3, 3), (1, 1, 1), (1, 1, 1))
_MOST = 64  # channels: rows of an instruction; and of three times as many, the columns


@jax.custom_vjp
def _conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv3d_forward(x, kernel)


def _save(x: jax.Array, kernel: jax.Array):
    return conv3d_forward(x, kernel), (x, kernel)


def _gradients(saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, kernel = saved
    mirrored = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    return conv3d_forward(dy, mirrored), conv3d_weight_gradient(x, dy).astype(kernel.dtype)


_conv3d.defvjp(_save, _gradients)


# benchmarks/flops.py counts the operations of these two by their names.
@traced_once("run")
def conv3d_forward(x: jax.Array, kernel: jax.Array, run: int | None = None) -> jax.Array:
    def local(kernel, x):
        sizes = forward.sizes_of(x.shape, kernel.shape[-1], core_count(), run)
        assert sizes is not None  # see _why_not
        return forward.forward(x, kernel, sizes)

    return over_batch(local)(kernel, x)


@traced_once("run")
def conv3d_weight_gradient(x: jax.Array, dy: jax.Array, run: int | None = None) -> jax.Array:
    def local(_, arrays):
        x, dy = arrays
        sizes = weight_gradient.sizes_of(x.shape, dy.shape[-1], core_count(), run)
        return weight_gradient.weight_gradient(x, dy, sizes)

    return over_batch(local)((), (x, dy)).sum(0)


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    return _conv3d(x, kernel)


def _why_not(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> str | None:
    if geometry != _GEOMETRY:
        return f"kernel, stride and padding are {tuple(geometry)}; it takes {tuple(_GEOMETRY)}"
    inputs, outputs = kernel.shape[3:]
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}; the kernel takes bfloat16"
    for name, channels in (("input", inputs), ("output", outputs)):
        if channels % PIECE or channels > _MOST:
            return f"{channels} {name} channels; the kernel takes multiples of {PIECE} up to {_MOST}"
    if 0 in x.shape:
        return f"x is {x.shape}, which is empty"
    for shape, channels in ((x.shape, outputs), ((*x.shape[:4], outputs), inputs)):
        if forward.sizes_of(shape, channels, 1) is None:
            return f"the weights of {inputs} by {outputs} channels do not fit into shared memory"
    return why_not_hopper(newer=False)


BACKEND = Backend(_convolve, _why_not)
