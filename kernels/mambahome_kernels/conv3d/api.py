"""The public function of the convolution: checks its arguments and picks a backend."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.backends import Backends

BACKENDS = Backends("mambahome_kernels.conv3d", reference="reference", xla="xla", mosaic_gpu="mosaic_gpu.backend")
Triple = tuple[int, int, int]
Size = int | Triple


class Backend(NamedTuple):
    """One way to convolve.

    convolve(x, kernel, geometry, precision) -> y, differentiable; why_not(x, kernel, geometry) -> None or the reason.
    """

    convolve: Callable
    why_not: Callable = lambda *_: None


def each_axis(size: Size) -> Triple:
    """An entry an axis; one number stands for all three."""
    return (size, size, size) if isinstance(size, int) else size


class Geometry(NamedTuple):
    """Which voxels meet: of the kernel's sizes, the strides and the padding, an entry an axis."""

    sizes: Triple
    stride: Triple
    padding: Triple

    @classmethod
    def of(cls, kernel: jax.Array, stride: Size, padding: Size | None) -> "Geometry":
        kd, kh, kw = kernel.shape[:3]
        same = (kd // 2, kh // 2, kw // 2)
        return cls((kd, kh, kw), each_axis(stride), same if padding is None else each_axis(padding))

    @property
    def pads(self) -> list[tuple[int, int]]:
        return [(pad, pad) for pad in self.padding]

    @property
    def is_patches(self) -> bool:
        """Whether every voxel meets one place of the kernel: then the convolution is one matrix product."""
        return self.sizes == self.stride and self.padding == (0, 0, 0)

    def output_grid(self, grid: tuple[int, ...]) -> list[int]:
        axes = zip(grid, *self, strict=True)
        return [(length + 2 * pad - size) // step + 1 for length, size, step, pad in axes]


def conv3d(
    x: jax.Array,
    kernel: jax.Array,
    stride: Size = 1,
    padding: Size | None = None,
    *,
    precision: lax.Precision | None = None,
    backend: str | None = None,
) -> jax.Array:
    """3-D correlation, zeros outside the grid, differentiable in both arrays.

    Args:
        x: (batch, depth, height, width, inputs), bfloat16, float32 or float64. The batch may be split over a mesh whose
            axes are Auto.
        kernel: (kd, kh, kw, inputs, outputs), of the same dtype.
        stride, padding: one number, or one an axis. By default the padding with which an odd kernel keeps the grid.
        precision: of float32, as in `jax.lax.conv_general_dilated`; HIGHEST is float32 on every device.
        backend: "reference" (the definition), "xla" (every device; on a GPU cuDNN), "mosaic_gpu" (a Pallas kernel for
            Hopper GPUs: 3 x 3 x 3, 3 x 3 x 1 or 1 x 3 x 3, few channels, bfloat16), or None for the best one here.

    Returns:
        (batch, depth', height', width', outputs) in x's dtype; bfloat16 is summed in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend. Unsupported: a named backend that
            cannot run here.
    """
    geometry = Geometry.of(kernel, stride, padding)
    _check(x, kernel)
    chosen = BACKENDS.choose(backend, x, kernel, geometry)
    return BACKENDS[chosen].convolve(x, kernel, geometry, precision)


def why_not(x: jax.Array, kernel: jax.Array, stride: Size = 1, padding: Size | None = None) -> str | None:
    """Why the mosaic_gpu backend cannot convolve x with this kernel here; None where it can."""
    return BACKENDS.why_not("mosaic_gpu", x, kernel, Geometry.of(kernel, stride, padding))


def _check(x: jax.Array, kernel: jax.Array) -> None:
    for name, value in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} is {value.dtype}; expected bfloat16, float32 or float64")
    if x.ndim != 5:
        raise ValueError(f"x has shape {x.shape}; expected (batch, depth, height, width, inputs)")
    if kernel.ndim != 5 or kernel.shape[3] != x.shape[-1]:
        sizes = ", ".join(map(str, kernel.shape[:3])) if kernel.ndim == 5 else "kd, kh, kw"
        raise ValueError(f"kernel has shape {kernel.shape}; expected ({sizes}, {x.shape[-1]}, outputs)")
    if kernel.dtype != x.dtype:
        raise ValueError(f"kernel is {kernel.dtype} and x {x.dtype}; expected one dtype")
