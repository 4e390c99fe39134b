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
    window's border its outermost voxels count, as in training.
    """
    if count == 1:
        return predict
    matrices, shifts = small_affines(count, voxel_size)
    back = np.linalg.inv(matrices)

    def mean(windows: jax.Array) -> jax.Array:
        total = _softmax(jnp.asarray(predict(windows)))
        for matrix, shift, inverse in zip(matrices[1:], shifts[1:], back[1:], strict=True):
            logits = jnp.asarray(predict(_warp(jnp.asarray(windows), matrix, shift)))
            total = total + _warp(_softmax(logits), inverse, -(inverse @ shift))
        return _log(total / count)

    return mean


@jax.jit
def _warp(volumes: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """(n, D, H, W, C), each at matrix @ (voxel - centre) + centre + shift, linear."""
    centre = [(n - 1) / 2 for n in volumes.shape[1:4]]
    offsets = [jnp.arange(n, dtype=jnp.float32) - c for n, c in zip(volumes.shape[1:4], centre, strict=True)]
    grids = jnp.meshgrid(*offsets, indexing="ij", sparse=True)
    # Products and sums instead of a matrix product, which a GPU might shorten.
    places = [
        matrix[row, 0] * grids[0] + matrix[row, 1] * grids[1] + matrix[row, 2] * grids[2] + centre[row] + shift[row]
        for row in range(3)
    ]

    def one(volume: jax.Array) -> jax.Array:
        return map_coordinates(volume, places, order=1, mode="nearest")

    return jax.vmap(jax.vmap(one, -1, -1))(volumes)


@jax.jit
def _softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


@jax.jit
def _log(probabilities: jax.Array) -> jax.Array:
    """Finite where they are 0, which float32's softmax may give; not where they are not finite."""
    return jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny))
