"""Test-time augmentation by small affine maps: each window as it is and moved, the probabilities brought back and
averaged."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from mambahome_jax.inference.sliding_window import Predict

# Well within what training with --affine_probability shows a network.
LARGEST_ANGLE = 10.0  # degrees about each axis
LARGEST_SCALE = 0.08  # more or less than 1
LARGEST_SHIFT = 1.0  # voxels of the finest axis


def small_affines(count: int, voxel_size: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where each voxel of a moved window comes from, matrix @ (voxel - centre) + centre + shift, in voxels.

    voxel_size: (3,) mm, so that a rotation is one in space. Returns matrices (count, 3, 3) and shifts (count, 3),
    float32: first the identity, then draws from a fixed seed, those of a smaller count among those of a larger one.
    """
    rng = np.random.default_rng(0)
    size = np.asarray(voxel_size, np.float64)
    matrices, shifts = [np.eye(3)], [np.zeros(3)]
    for _ in range(count - 1):
        draws = rng.uniform(-1, 1, 7)
        turn = Rotation.from_euler("xyz", draws[:3] * LARGEST_ANGLE, degrees=True).as_matrix()
        matrices.append(turn * size / size[:, None] * (1 + draws[3] * LARGEST_SCALE))
        shifts.append(draws[4:] * LARGEST_SHIFT * size.min() / size)
    return np.asarray(matrices, np.float32), np.asarray(shifts, np.float32)


def moved(predict: Predict, count: int, voxel_size: Sequence[float]) -> Predict:
    """`predict` averaged over `count` copies of each window, see `small_affines`; itself for 1.

    predict: windows (n, *roi, in) -> logits (n, *roi, classes), called with the same shapes as without copies. The
    result is the logarithm of the mean of the softmax probabilities, trilinear on the way there and back; beyond a
    window's border its outermost voxels count, as in training. The mean at a voxel is that over the copies in which it
    lies within the window, which it does in the first.
    """
    if count == 1:
        return predict
    matrices, shifts = small_affines(count, voxel_size)
    back = np.linalg.inv(matrices)

    def mean(windows: jax.Array) -> jax.Array:
        logits = jnp.asarray(predict(windows))
        if logits.ndim != 5 or logits.shape[:4] != windows.shape[:4]:
            return logits  # no answer to these windows, of which the caller tells
        total, copies = _softmax(logits), jnp.ones((*windows.shape[1:4], 1), jnp.float32)
        for matrix, shift, inverse in zip(matrices[1:], shifts[1:], back[1:], strict=True):
            logits = jnp.asarray(predict(_warp(jnp.asarray(windows), matrix, shift)))
            total, copies = _add_back(total, copies, logits, inverse, -(inverse @ shift))
        return _log_mean(total, copies)

    return mean


@jax.jit
def _warp(volumes: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """(n, D, H, W, C), each at matrix @ (voxel - centre) + centre + shift, linear."""
    places = _places(volumes.shape[1:4], matrix, shift)

    def one(volume: jax.Array) -> jax.Array:
        return map_coordinates(volume, places, order=1, mode="nearest")

    return jax.vmap(jax.vmap(one, -1, -1))(volumes)


def _places(shape: Sequence[int], matrix: jax.Array, shift: jax.Array) -> list[jax.Array]:
    centre = [(n - 1) / 2 for n in shape]
    offsets = [jnp.arange(n, dtype=jnp.float32) - c for n, c in zip(shape, centre, strict=True)]
    grids = jnp.meshgrid(*offsets, indexing="ij", sparse=True)
    # Products and sums instead of a matrix product, which a GPU might shorten.
    return [
        matrix[row, 0] * grids[0] + matrix[row, 1] * grids[1] + matrix[row, 2] * grids[2] + centre[row] + shift[row]
        for row in range(3)
    ]


@jax.jit
def _add_back(
    total: jax.Array, copies: jax.Array, logits: jax.Array, matrix: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of probabilities, and in how many copies each voxel lies, with those of one more copy."""
    shape = logits.shape[1:4]
    within = [(at >= 0) & (at <= n - 1) for at, n in zip(_places(shape, matrix, shift), shape, strict=True)]
    inside = (within[0] & within[1] & within[2])[..., None]
    return total + jnp.where(inside, _warp(_softmax(logits), matrix, shift), 0), copies + inside


@jax.jit
def _softmax(logits: jax.Array) -> jax.Array:
    """Not a number where a logit is not finite, which softmax would make 0 or 1 of."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
    return jnp.where(finite, jax.nn.softmax(logits, axis=-1), jnp.nan)


@jax.jit
def _log_mean(total: jax.Array, copies: jax.Array) -> jax.Array:
    """Finite where a probability is 0, which float32's softmax may give."""
    return jnp.log(jnp.maximum(total / copies, jnp.finfo(total.dtype).tiny))
