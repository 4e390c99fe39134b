"""The convolution of few channels for Hopper GPUs, as Pallas Mosaic GPU kernels. The algorithm: kernels/README.md."""

import jax
import jax.numpy as jnp

from mambahome_kernels.conv3d.base import Backend
from mambahome_kernels.conv3d.mosaic_gpu import forward, weight_gradient
from mambahome_kernels.conv3d.mosaic_gpu.tiles import PIECE
from mambahome_kernels.conv3d.reference import mirrored
from mambahome_kernels.mosaic.device import core_count, default_device, traced_once
from mambahome_kernels.mosaic.interpret import interpreted, interpreting
from mambahome_kernels.mosaic.partition import over_batch

__all__ = ["BACKEND", "interpreted"]

_MOST = 64  # channels: rows of an instruction; and of three times as many, the columns


# The names of these two stand in what JAX traces, by which benchmarks/flops.py counts their operations.
@traced_once("run")
def conv3d_forward(x: jax.Array, kernel: jax.Array, run: int | None = None) -> jax.Array:
    def local(kernel, x):
        sizes = forward.sizes_of(x.shape, kernel.shape[-1], core_count(), run)
        assert sizes is not None  # see _why_not
        return forward.forward(x, kernel, sizes)

    return over_batch(local)(kernel, x)


def _input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv3d_forward(dy, mirrored(kernel))


@traced_once("run")
def conv3d_weight_gradient(x: jax.Array, dy: jax.Array, run: int | None = None) -> jax.Array:
    def local(_, arrays):
        x, dy = arrays
        sizes = weight_gradient.sizes_of(x.shape, dy.shape[-1], core_count(), run)
        return weight_gradient.weight_gradient(x, dy, sizes)

    return over_batch(local)((), (x, dy)).sum(0)


def _why_not(x: jax.Array, kernel: jax.Array) -> str | None:
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
    if interpreting():
        return None
    device = default_device()
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"it needs a GPU of compute capability 9.0 (Hopper), and this one has {capability}"
    return None


BACKEND = Backend(conv3d_forward, _input_gradient, conv3d_weight_gradient, _why_not)
