"""Normalisations of the network. Statistics are float32 at least, whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

INSTANCE_NORM_EPS = 1e-5
RMS_NORM_FLOOR = 1e-8
ALPHA_RANGE = (0.1, 2.0)
_SPACE = (1, 2, 3)


def at_least_float32(x: jax.Array) -> jax.Array:
    """x widened to float32 where it is narrower; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def instance_norm(x: jax.Array) -> jax.Array:
    """(batch, depth, height, width, channels) with mean 0 and biased variance 1 over space, a sample and channel.

    On a CPU float32 is widened to float64 for it, which costs next to nothing there and takes away its round-off.
    """
    if x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return _instance_norm_in_float64(x)
    return _normalised(at_least_float32(x))[0].astype(x.dtype)


def _normalised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The instance norm of x, and what x minus its mean was multiplied by, both of x's type."""
    centred = x - x.mean(_SPACE, keepdims=True)
    inverse = lax.rsqrt(jnp.square(centred).mean(_SPACE, keepdims=True) + INSTANCE_NORM_EPS)
    return centred * inverse, inverse


@jax.custom_vjp
def _instance_norm_in_float64(x: jax.Array) -> jax.Array:
    """float32 to float32, also where JAX x64 is off; its gradient is computed in float32."""
    return _instance_norm_in_float64_forward(x)[0]


def _instance_norm_in_float64_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    with jax.enable_x64(True):
        y, inverse = (wide.astype(jnp.float32) for wide in _normalised(x.astype(jnp.float64)))
    return y, (y, inverse)


def _instance_norm_in_float64_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array]:
    y, inverse = saved
    along = (cotangent * y).mean(_SPACE, keepdims=True)
    return (inverse * (cotangent - cotangent.mean(_SPACE, keepdims=True) - y * along),)


_instance_norm_in_float64.defvjp(_instance_norm_in_float64_forward, _instance_norm_in_float64_backward)


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
