"""Norm and activation with a backward pass of their own, in plain XLA.

Nothing but the inputs is kept for the backward pass, which computes the rest again: it is bound by memory, and of that
they take half of what autodiff would keep. On a CPU float32 is widened to float64, which costs next to nothing there
and takes away its round-off.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mambahome_kernels.backends import platform
from mambahome_kernels.norm_act.api import Affine, Backend

_SPACE = (1, 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_act(
    slope: float, eps: float, inputs: tuple[jax.Array, ...], plus: jax.Array | None, affine: tuple[Affine, ...]
) -> jax.Array:
    return _forward(slope, eps, inputs, plus, affine)[0]


def _forward(
    slope: float, eps: float, inputs: tuple[jax.Array, ...], plus: jax.Array | None, affine: tuple[Affine, ...]
):
    with _wide_types(inputs[0]) as wide:
        statistics = checkpoint_name([_statistics(x.astype(wide), eps) for x in inputs], "norm_act")
        y = _act(_total(inputs, statistics, plus, affine), slope).astype(inputs[0].dtype)
    # Those in float64 cannot leave the part where that is switched on.
    can_leave = wide != jnp.float64 or jax.config.read("jax_enable_x64")
    return y, (inputs, plus, affine, statistics if can_leave else None)


def _backward(slope: float, eps: float, saved: tuple, cotangent: jax.Array):
    # Without the barrier XLA finds the same values in the forward pass, and keeps them in memory until here.
    (inputs, plus, affine, statistics), cotangent = lax.optimization_barrier((saved, cotangent))
    with _wide_types(inputs[0]) as wide:
        statistics = statistics or [_statistics(x.astype(wide), eps) for x in inputs]
        g = cotangent.astype(wide)
        if slope != 1:
            g = jnp.where(_total(inputs, statistics, plus, affine) > 0, g, slope * g)
        mean, voxels = g.mean(_SPACE, keepdims=True), math.prod(g.shape[1:4])
        gradients, affine_gradients = [], []
        for x, s, (scale, shift) in zip(inputs, statistics, affine or [(None, None)] * len(inputs), strict=True):
            y = s.normalise(x)
            along = (g * y).mean(_SPACE, keepdims=True)
            inverse = s.inverse if scale is None else s.inverse * scale.astype(wide)
            gradients.append((inverse * (g - mean - y * along)).astype(x.dtype))
            if scale is not None:
                sums = [voxels * part.sum((0, *_SPACE)) for part in (along, mean)]
                affine_gradients.append((sums[0].astype(scale.dtype), sums[1].astype(shift.dtype)))
        return tuple(gradients), None if plus is None else g.astype(plus.dtype), tuple(affine_gradients)


_norm_act.defvjp(_forward, _backward)


class _Statistics(NamedTuple):
    mean: jax.Array
    inverse: jax.Array  # of the standard deviation

    def normalise(self, x: jax.Array) -> jax.Array:
        return (x.astype(self.mean.dtype) - self.mean) * self.inverse


@contextlib.contextmanager
def _wide_types(x: jax.Array) -> Iterator[Any]:
    """The type to compute in: float32 for less, and float64 for float32 on a CPU, also where JAX x64 is off."""
    if x.dtype == jnp.float32 and platform() == "cpu":
        with jax.enable_x64(True):
            yield jnp.float64
    else:
        yield jnp.promote_types(x.dtype, jnp.float32)


def _statistics(x: jax.Array, eps: float) -> _Statistics:
    # Both sums need one reading only. Shifted by about the mean, the difference of the squares does not cancel.
    steps = [max(1, n // 4) for n in x.shape[1:4]]
    shift = x[:, :: steps[0], :: steps[1], :: steps[2]].mean(_SPACE, keepdims=True)
    shifted = x - shift
    mean = shifted.mean(_SPACE, keepdims=True)
    variance = jnp.square(shifted).mean(_SPACE, keepdims=True) - jnp.square(mean)
    return _Statistics(shift + mean, lax.rsqrt(jnp.maximum(variance, 0) + eps))


def _total(
    inputs: tuple[jax.Array, ...],
    statistics: list[_Statistics],
    plus: jax.Array | None,
    affine: tuple[Affine, ...],
) -> jax.Array:
    parts = [s.normalise(x) for x, s in zip(inputs, statistics, strict=True)]
    if affine:
        wide = parts[0].dtype
        parts = [y * scale.astype(wide) + shift.astype(wide) for y, (scale, shift) in zip(parts, affine, strict=True)]
    total = functools.reduce(jnp.add, parts)
    return total if plus is None else total + plus.astype(total.dtype)


def _act(x: jax.Array, slope: float) -> jax.Array:
    return x if slope == 1 else jnp.where(x > 0, x, slope * x)


BACKEND = Backend(_norm_act)
