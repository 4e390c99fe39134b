"""The one public function of the convolution: checks its arguments, picks a backend, ties forward to backward."""

import functools

import jax
import jax.numpy as jnp

from mambahome_kernels.conv3d import reference, xla
from mambahome_kernels.conv3d.base import Backend
from mambahome_kernels.errors import Unsupported

BACKENDS = ("reference", "xla", "mosaic_gpu")
_OLDEST_JAX = (0, 11)  # whose Pallas has what the mosaic_gpu backend is written in


def _backend(name: str) -> Backend:
    if name == "mosaic_gpu":
        from mambahome_kernels.conv3d import mosaic_gpu  # an older JAX cannot import it

        return mosaic_gpu.BACKEND
    return {"reference": reference.BACKEND, "xla": xla.BACKEND}[name]


def why_not(x: jax.Array, kernel: jax.Array, backend: str = "mosaic_gpu") -> str | None:
    """Why a backend cannot convolve x with this kernel here; None where it can.

    x: (batch, depth, height, width, inputs). kernel: (kd, kh, kw, inputs, outputs), any size.
    """
    if kernel.shape[:3] != (3, 3, 3):
        return f"the kernel is {kernel.shape[:3]}; it takes (3, 3, 3)"
    if backend == "mosaic_gpu" and jax.__version_info__ < _OLDEST_JAX:
        return f"it needs JAX {'.'.join(map(str, _OLDEST_JAX))} or newer, and this is {jax.__version__}"
    try:
        return _backend(backend).why_not(x, kernel)
    except ImportError as error:  # Pallas' own parts move between versions
        return f"JAX {jax.__version__} lacks what it is written in: {error}"


def _check(x: jax.Array, kernel: jax.Array) -> None:
    for name, value in (("x", x), ("kernel", kernel)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} is {value.dtype}; expected bfloat16, float32 or float64")
    if x.ndim != 5:
        raise ValueError(f"x has shape {x.shape}; expected (batch, depth, height, width, inputs)")
    if kernel.ndim != 5 or kernel.shape[:4] != (3, 3, 3, x.shape[-1]):
        raise ValueError(f"kernel has shape {kernel.shape}; expected (3, 3, 3, {x.shape[-1]}, outputs)")
    if kernel.dtype != x.dtype:
        raise ValueError(f"kernel is {kernel.dtype} and x {x.dtype}; expected one dtype")


@functools.cache
def _conv3d(backend: str):
    """The differentiable function for one backend."""
    forward, input_gradient, weight_gradient, _ = _backend(backend)

    @jax.custom_vjp
    def conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return forward(x, kernel)

    def gradients(saved, dy):
        x, kernel = saved
        return input_gradient(dy, kernel), weight_gradient(x, dy).astype(kernel.dtype)

    conv3d.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), gradients)
    return conv3d


def conv3d(x: jax.Array, kernel: jax.Array, backend: str | None = None) -> jax.Array:
    """3-D correlation of stride 1 with a kernel of 3 x 3 x 3, zeros outside the grid, differentiable in both arrays.

    Args:
        x: (batch, depth, height, width, inputs), bfloat16, float32 or float64. The batch may be split over a mesh whose
            axes are Auto.
        kernel: (3, 3, 3, inputs, outputs), of the same dtype.
        backend: "reference" (the definition), "xla" (on a GPU cuDNN), "mosaic_gpu" (a Pallas kernel for Hopper GPUs,
            few channels, bfloat16), or None for the best one here.

    Returns:
        (batch, depth, height, width, outputs) in x's dtype; bfloat16 is summed in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend. Unsupported: a named backend that
            cannot run here.
    """
    _check(x, kernel)
    if backend is None:
        backend = "xla" if why_not(x, kernel) else "mosaic_gpu"
    elif backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}, or None for the best")
    elif reason := why_not(x, kernel, backend):
        raise Unsupported(f"backend {backend!r} cannot run here: {reason}")
    return _conv3d(backend)(x, kernel)
