"""The convolution of few channels for Hopper GPUs, as Pallas Mosaic GPU kernels. The algorithm: kernels/README.md."""

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.conv3d.api import Backend, Geometry, Triple
from mambahome_kernels.conv3d.mosaic_gpu import forward, weight_gradient
from mambahome_kernels.conv3d.mosaic_gpu.tiles import PIECE, view_of
from mambahome_kernels.mosaic.partition import over_batch
from mambahome_kernels.mosaic.runtime import core_count, traced_once, why_not_hopper

_MOST = 64  # channels: rows of an instruction; and of three times as many, the columns


@jax.custom_vjp
def _conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv3d_forward(x, kernel)


def _save(x: jax.Array, kernel: jax.Array):
    return conv3d_forward(x, kernel), (x, kernel)


def _gradients(saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    x, kernel = saved
    mirrored = kernel[::-1, ::-1, ::-1].swapaxes(3, 4)
    return conv3d_forward(dy, mirrored), conv3d_weight_gradient(x, dy, kernel.shape[:3]).astype(kernel.dtype)


_conv3d.defvjp(_save, _gradients)


# benchmarks/flops.py counts the operations of these two by their names.
@traced_once("run")
def conv3d_forward(x: jax.Array, kernel: jax.Array, run: int | None = None) -> jax.Array:
    def local(kernel, x):
        view = view_of(kernel.shape[:3], x.shape[1:4])
        assert view is not None  # see _why_not
        sizes = forward.sizes_of(view, x.shape, kernel.shape[-1], core_count(), run)
        assert sizes is not None
        return forward.forward(x, kernel, sizes)

    return over_batch(local)(kernel, x)


@traced_once("kernel", "run")
def conv3d_weight_gradient(
    x: jax.Array, dy: jax.Array, kernel: Triple = (3, 3, 3), run: int | None = None
) -> jax.Array:
    """kernel: its sizes."""

    def local(_, arrays):
        x, dy = arrays
        view = view_of(kernel, x.shape[1:4])
        assert view is not None  # see _why_not
        sizes = weight_gradient.sizes_of(view, x.shape, dy.shape[-1], core_count(), run)
        assert sizes is not None
        return weight_gradient.weight_gradient(x, dy, sizes)

    gradient = over_batch(local)((), (x, dy)).sum(0)
    return gradient.reshape(*kernel, *gradient.shape[-2:])


def _convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    return _conv3d(x, kernel)


def _why_not(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> str | None:
    inputs, outputs = kernel.shape[3:]
    view = view_of(geometry.sizes, x.shape[1:4])
    if view is None or geometry.stride != (1, 1, 1) or geometry.padding != Geometry.of(kernel, 1, None).padding:
        return f"kernel, stride and padding are {tuple(geometry)}; it takes 3 x 3 x 3, 3 x 3 x 1 or 1 x 3 x 3, 1, same"
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}; the kernel takes bfloat16"
    least = 2 * PIECE if view.is_long else PIECE
    for name, channels in (("input", inputs), ("output", outputs)):
        if channels % PIECE or not least <= channels <= _MOST:
            return f"{channels} {name} channels; the kernel takes multiples of {PIECE} from {least} to {_MOST}"
    if 0 in x.shape:
        return f"x is {x.shape}, which is empty"
    if weight_gradient.sizes_of(view, x.shape, outputs, 1) is None:
        return f"{x.shape[3]} voxels along the axis where the kernel has one; tiles with their margin do not fit"
    shapes = ((x.shape, outputs), ((*x.shape[:4], outputs), inputs))
    if any(forward.sizes_of(view, *shape, 1) is None for shape in shapes):
        return f"the weights of {inputs} by {outputs} channels do not fit into shared memory"
    if view.stacks * view.planes == 1:
        return f"x is {x.shape}, one plane"  # which Pallas would copy for the zeros before and behind it as well
    widths = weight_gradient.TILE[1], view.margin(*weight_gradient.TILE, 1)[1]
    if PIECE in (inputs, outputs) and view.columns in widths:  # Pallas would copy tiles as single runs of bytes
        return f"{PIECE} channels in rows of {view.columns} voxels"
    return why_not_hopper(newer=False)


BACKEND = Backend(_convolve, _why_not)
