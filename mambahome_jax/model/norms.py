"""Normalisations of the network. Statistics are float32 at least, whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from mambahome_kernels import norm_act

RMS_NORM_FLOOR = 1e-8
ALPHA_RANGE = (0.1, 2.0)


def at_least_float32(x: jax.Array) -> jax.Array:
    """x widened to float32 where it is narrower; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def instance_norm(x: jax.Array) -> jax.Array:
    """(batch, depth, height, width, channels) with mean 0 and biased variance 1 over space, a sample and channel."""
    return norm_act((x,), slope=1.0)


class RMSNorm(nnx.Module):
    """x / max(norm(x), 1e-8) * sqrt(channels) * gamma over the last axis (published soft_moe_with_dynamic_slots.py)."""

    def __init__(self, channels: int, *, param_dtype):
        self.gamma = nnx.Param(jnp.ones(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        # The floor is inside the root, whose slope at 0 would make the gradient of zero tokens nan.
        square = jnp.maximum(jnp.sum(jnp.square(wide), -1, keepdims=True), RMS_NORM_FLOOR**2)
        inverse = lax.rsqrt(square)
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
