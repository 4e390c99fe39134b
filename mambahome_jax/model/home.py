"""HoME: hierarchical soft mixture of experts (Płotka et al. 2025), two levels of soft routing over tokens.

Level 1 routes the tokens of each group of K neighbours to a few slots, level 2 mixes the slots of all groups. Level 2
starts with a norm of each slot, so a positive factor on a slot has no effect: the published group gates are a no-op,
and of the expert gates only the sign counts. Their parameters are kept for the exchange of weights; their gradients
are zero.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mambahome_jax.model.layers import FLOAT32, Linear, Numerics, save_for_backward, uniform
from mambahome_jax.model.norms import RMSNorm, at_least_float32


class Experts(nnx.Module):
    """Gated feed-forward networks side by side: (..., experts, slots, channels) -> the same shape.

    Hidden width int(channels * mult * 2 / 3); value * gelu(gate) with the exact GELU.
    """

    def __init__(self, experts: int, channels: int, mult: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.numerics = numerics
        hidden = int(channels * mult * 2 / 3)
        self.kernel_in = uniform(rngs, (experts, channels, 2 * hidden), channels, numerics.param_dtype)
        self.bias_in = uniform(rngs, (experts, 2 * hidden), channels, numerics.param_dtype)
        self.kernel_out = uniform(rngs, (experts, hidden, channels), hidden, numerics.param_dtype)
        self.bias_out = uniform(rngs, (experts, channels), hidden, numerics.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = self.numerics.lax_precision
        h = save_for_backward(jnp.einsum("...esf,efh->...esh", x, self.kernel_in[...].astype(x.dtype), precision=exact))
        value, gate = jnp.split(h + self.bias_in[...].astype(x.dtype)[:, None], 2, axis=-1)
        h = value * _gelu(gate)
        y = save_for_backward(
            jnp.einsum("...esh,ehf->...esf", h, self.kernel_out[...].astype(x.dtype), precision=exact)
        )
        return y + self.bias_out[...].astype(x.dtype)[:, None]


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU through erf; jax.nn goes through erfc, which takes XLA several times as long to compile."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _softmax(logits: jax.Array, axis: int | tuple[int, ...], dtype) -> jax.Array:
    # jax.nn.softmax divides, which XLA turns into this in some programs and not in others: on one device and on eight.
    logits = at_least_float32(logits)
    powers = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis, keepdims=True)))
    return (powers * (1 / powers.sum(axis, keepdims=True))).astype(dtype)


class GlobalSoftMoE(nnx.Module):
    """Level 2: every slot of level 1 is a token here, (batch, tokens, channels) -> the same shape.

    Segments of as many consecutive tokens as there are experts give one slot to each expert.
    """

    def __init__(self, channels: int, experts: int, mult: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.num_experts, self.numerics = experts, numerics
        self.norm = RMSNorm(channels, param_dtype=numerics.param_dtype)
        self.slot_proj = Linear(channels, experts * channels, bias=False, rngs=rngs, numerics=numerics)
        self.slot_norm = RMSNorm(channels, param_dtype=numerics.param_dtype)
        self.experts = Experts(experts, channels, mult, rngs=rngs, numerics=numerics)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, channels = x.shape
        experts, exact = self.num_experts, self.numerics.lax_precision
        # The padding is not masked, as published: zero tokens take part in the softmax over tokens.
        x = jnp.pad(self.norm(x), ((0, 0), (0, -tokens % experts), (0, 0)))
        segments = x.shape[1] // experts
        means = x.reshape(batch, segments, experts, channels).mean(2)
        slots = self.slot_norm(self.slot_proj(means).reshape(batch, segments, experts, channels))
        logits = jnp.einsum("bnf,bsef->bnes", x, slots, precision=exact)
        dispatch = _softmax(logits, 1, x.dtype)
        combine = _softmax(logits, (2, 3), x.dtype)
        y = self.experts(jnp.einsum("bnes,bnf->besf", dispatch, x, precision=exact))
        return jnp.einsum("bnes,besf->bnf", combine, y, precision=exact)[:, :tokens]


class HoME(nnx.Module):
    """Both levels, (batch, tokens, channels) -> the same shape; no residual.

    Args of the constructor: group (tokens a group), experts and slots (a group, level 1), experts_second (level 2).
    """

    def __init__(
        self,
        channels: int,
        *,
        group: int,
        experts: int,
        slots: int,
        experts_second: int,
        mult: int,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.group, self.num_experts, self.slots, self.numerics = group, experts, slots, numerics
        self.expert_gates = nnx.Param(jnp.ones(experts, numerics.param_dtype))
        self.norm = RMSNorm(channels, param_dtype=numerics.param_dtype)
        self.slot_proj = Linear(channels, experts * slots * channels, bias=False, rngs=rngs, numerics=numerics)
        self.slot_norm = RMSNorm(channels, param_dtype=numerics.param_dtype)
        self.experts = Experts(experts, channels, mult, rngs=rngs, numerics=numerics)
        self.group_gate = Linear(channels, 1, bias=True, rngs=rngs, numerics=numerics)
        self.second = GlobalSoftMoE(channels, experts_second, mult, rngs=rngs, numerics=numerics)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, length, channels = tokens.shape
        groups, slots = math.ceil(length / self.group), self.num_experts * self.slots
        exact = self.numerics.lax_precision
        x = jnp.pad(tokens, ((0, 0), (0, groups * self.group - length), (0, 0)))
        x = x.reshape(batch, groups, self.group, channels)
        # A zero row of padding adds nothing to a slot's sum, so it needs no mask.
        means = at_least_float32(x).mean(2).astype(x.dtype)
        slot = self.slot_norm(self.slot_proj(means).reshape(batch, groups, slots, channels))
        logits = jnp.einsum("bgkf,bgmf->bgkm", self.norm(x), slot, precision=exact)
        weights = _softmax(logits, -1, x.dtype)
        inputs = jnp.einsum("bgkm,bgkf->bgmf", weights, x, precision=exact)
        y = self.experts(inputs.reshape(batch, groups, self.num_experts, self.slots, channels))
        y = y * jnp.sign(self.expert_gates[...]).astype(y.dtype)[:, None, None]
        y = self.second(y.reshape(batch, groups * slots, channels))
        y = jnp.einsum("bgkm,bgmf->bgkf", weights, y.reshape(batch, groups, slots, channels), precision=exact)
        return y.reshape(batch, groups * self.group, channels)[:, :length]
