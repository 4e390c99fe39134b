"""Normalisations of the network. Statistics are float32 at least, whatever the activations are."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mambahome_jax.model.layers import keep

INSTANCE_NORM_EPS = 1e-5
RMS_NORM_FLOOR = 1e-8
ALPHA_RANGE = (0.1, 2.0)
_SPACE = (1, 2, 3)


def at_least_float32(x: jax.Array) -> jax.Array:
    """x widened to float32 where it is narrower; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def instance_norm(x: jax.Array) -> jax.Array:
    """(batch, depth, height, width, channels) with mean 0 and biased variance 1 over space, a sample and channel."""
    return norm_act((x,), slope=1.0)


def norm_act(inputs: tuple[jax.Array, ...], plus: jax.Array | None = None, *, slope: float) -> jax.Array:
    """Leaky ReLU (slope 0: ReLU, 1: nothing) of the sum of the instance norms of `inputs`, and of `plus` as it is.

    All are (batch, depth, height, width, channels). Nothing but them is kept for the backward pass, which computes the
    rest again: it is bound by memory, and of that they take half of what autodiff would keep. Statistics are float32 at
    least. On a CPU float32 is widened to float64 for it, which costs next to nothing there and takes away its
    round-off.
    """
    return _norm_act(slope, inputs, plus)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_act(slope: float, inputs: tuple[jax.Array, ...], plus: jax.Array | None) -> jax.Array:
    return _norm_act_forward(slope, inputs, plus)[0]


def _norm_act_forward(slope: float, inputs: tuple[jax.Array, ...], plus: jax.Array | None):
    with _wide_types(inputs[0]) as wide:
        statistics = keep([_statistics(x.astype(wide)) for x in inputs])
        y = _act(_total(inputs, statistics, plus), slope).astype(inputs[0].dtype)
    # Those in float64 cannot leave the part where that is switched on.
    can_leave = wide != jnp.float64 or jax.config.read("jax_enable_x64")
    return y, (inputs, plus, statistics if can_leave else None)


def _norm_act_backward(slope: float, saved: tuple, cotangent: jax.Array):
    # Without the barrier XLA finds the same values in the forward pass, and keeps them in memory until here.
    (inputs, plus, statistics), cotangent = lax.optimization_barrier((saved, cotangent))
    with _wide_types(inputs[0]) as wide:
        statistics = statistics or [_statistics(x.astype(wide)) for x in inputs]
        g = cotangent.astype(wide)
        if slope != 1:
            g = jnp.where(_total(inputs, statistics, plus) > 0, g, slope * g)
        mean = g.mean(_SPACE, keepdims=True)

        def gradient(x: jax.Array, s: _Statistics) -> jax.Array:
            y = s.normalise(x)
            return (s.inverse * (g - mean - y * (g * y).mean(_SPACE, keepdims=True))).astype(x.dtype)

        gradients = tuple(gradient(x, s) for x, s in zip(inputs, statistics, strict=True))
        return gradients, None if plus is None else g.astype(plus.dtype)


_norm_act.defvjp(_norm_act_forward, _norm_act_backward)


class _Statistics(NamedTuple):
    mean: jax.Array
    inverse: jax.Array  # of the standard deviation

    def normalise(self, x: jax.Array) -> jax.Array:
        return (x.astype(self.mean.dtype) - self.mean) * self.inverse


@contextlib.contextmanager
def _wide_types(x: jax.Array) -> Iterator[Any]:
    """The type to compute in: float32 for less, and float64 for float32 on a CPU, also where JAX x64 is off."""
    if x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        with jax.enable_x64(True):
            yield jnp.float64
    else:
        yield jnp.promote_types(x.dtype, jnp.float32)


def _statistics(x: jax.Array) -> _Statistics:
    # Both sums need one reading only. Shifted by about the mean, the difference of the squares does not cancel.
    steps = [max(1, n // 4) for n in x.shape[1:4]]
    shift = x[:, :: steps[0], :: steps[1], :: steps[2]].mean(_SPACE, keepdims=True)
    shifted = x - shift
    mean = shifted.mean(_SPACE, keepdims=True)
    variance = jnp.square(shifted).mean(_SPACE, keepdims=True) - jnp.square(mean)
    return _Statistics(shift + mean, lax.rsqrt(jnp.maximum(variance, 0) + INSTANCE_NORM_EPS))


def _total(inputs: tuple[jax.Array, ...], statistics: list[_Statistics], plus: jax.Array | None) -> jax.Array:
    total = functools.reduce(jnp.add, [s.normalise(x) for x, s in zip(inputs, statistics, strict=True)])
    return total if plus is None else total + plus.astype(total.dtype)


def _act(x: jax.Array, slope: float) -> jax.Array:
    return x if slope == 1 else jnp.where(x > 0, x, slope * x)


class RMSNorm(nnx.Module):
    """x / max(norm(x), 1e-8) * sqrt(channels) * gamma over the last axis (published soft_moe_with_dynamic_slots.py)."""

    def __init__(self, channels: int, *, param_dtype):
        self.gamma = nnx.Param(jnp.ones(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        square = jnp.sum(jnp.square(wide), -1, keepdims=True)
        inverse = jnp.minimum(lax.rsqrt(jnp.maximum(square, jnp.finfo(wide.dtype).tiny)), 1 / RMS_NORM_FLOOR)
        return (wide * inverse * (wide.shape[-1] ** 0.5 * self.gamma[...])).astype(x.dtype)


class DynamicTanh(nnx.Module):
    """weight * tanh(clip(alpha, 0.1, 2) * x) + bias over the last axis (Zhu et al. 2025, clipped as published)."""

    def __init__(self, channels: int, *, param_dtype):
        self.alpha = nnx.Param(jnp.full(1, 0.5, param_dtype))
        self.weight = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = _clip(self.alpha[...], *ALPHA_RANGE)
        return (self.weight[...] * jnp.tanh(alpha * at_least_float32(x)) + self.bias[...]).astype(x.dtype)


def _clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """jnp.clip halves the gradient at the end points; the published clip passes it whole there."""
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, lax.stop_gradient(jnp.clip(x, low, high)))
