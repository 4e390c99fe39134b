"""Soft mixtures of experts over tokens: HoME (Płotka et al. 2025) and Soft MoE (Puigcerver et al. 2024).

HoME has two levels of soft routing. Level 1 routes the tokens of each group of K neighbours to a few slots, level 2
mixes the slots of all groups. Level 2 starts with a norm of each slot, so a positive factor on a slot has no effect:
the published group gates are a no-op, and of the expert gates only the sign counts. Their parameters are kept for the
exchange of weights; their gradients are zero.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mambahome_jax.config import ModelConfig
from mambahome_jax.model.layers import (
    FLOAT32,
    Array,
    Linear,
    Numerics,
    RMSNorm,
    at_least_float32,
    checked_tokens,
    gelu,
    init_on_host,
    require_positive,
    save_for_backward,
    uniform,
)

UNIT_EPS = 1e-6


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
        h = value * gelu(gate)
        y = save_for_backward(
            jnp.einsum("...esh,ehf->...esf", h, self.kernel_out[...].astype(x.dtype), precision=exact)
        )
        return y + self.bias_out[...].astype(x.dtype)[:, None]


class FeedForward(Experts):
    """One expert for every token, what HoME would be without routing: (batch, length, channels) -> the same shape."""

    def __init__(self, channels: int, mult: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        super().__init__(1, channels, mult, rngs=rngs, numerics=numerics)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return super().__call__(tokens[:, None])[:, 0]


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
    """Both levels: (batch, length, dim) -> the same shape and dtype; no residual. Any length from 1 on.

    Level 1, in each group of group_size consecutive tokens x (zeros beyond the end), over its slots m of all experts:

        slot[m] = RMSNorm(W mean(x))[m]                w[k, m] = softmax over m of <RMSNorm(x_k), slot[m]>
        input[m] = sum over k of w[k, m] x_k           y[m] = sign(gate_e) expert_e(input[m])

    Level 2 takes the slots of all groups as tokens and mixes them (`GlobalSoftMoE`); then output_k = sum over m of
    w[k, m] y[m]. Experts: W2 (v gelu(g)) + b2 with [v, g] = W1 input + b1, int(2/3 dim expert_mult) wide.
    Płotka et al. 2025, arXiv 2507.06363; defaults of the published network's first stage.

    Args:
        dim: channels of a token.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        group_size: tokens of a group. num_experts, slots_per_expert: of level 1, of each group.
        num_experts_second: of level 2; None: level 1 alone, without the gates, which have no effect.
        expert_mult: hidden width of an expert, see above.
        numerics: dtype of the parameters and precision of the products. Activations have the dtype of the tokens.

    Raises ConfigError: a size below 1; tokens of another shape, or that are no floating point numbers.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        group_size: int = ModelConfig.group_list[0],
        num_experts: int = ModelConfig.experts_list[0],
        slots_per_expert: int = ModelConfig.num_slots_per_expert_first,
        num_experts_second: int | None = ModelConfig.experts_list_second[0],
        expert_mult: int = ModelConfig.expert_mult,
        numerics: Numerics = FLOAT32,
    ):
        require_positive(dim=dim, group_size=group_size, num_experts=num_experts, slots_per_expert=slots_per_expert)
        second = num_experts_second
        require_positive(num_experts_second=1 if second is None else second, expert_mult=expert_mult)
        self.dim, self.group, self.num_experts, self.slots = dim, group_size, num_experts, slots_per_expert
        self.numerics = numerics
        self.expert_gates = None if second is None else nnx.Param(jnp.ones(num_experts, numerics.param_dtype))
        self.norm = RMSNorm(dim, param_dtype=numerics.param_dtype)
        slots = num_experts * slots_per_expert
        self.slot_proj = Linear(dim, slots * dim, bias=False, rngs=rngs, numerics=numerics)
        self.slot_norm = RMSNorm(dim, param_dtype=numerics.param_dtype)
        self.experts = Experts(num_experts, dim, expert_mult, rngs=rngs, numerics=numerics)
        self.group_gate = None if second is None else Linear(dim, 1, bias=True, rngs=rngs, numerics=numerics)
        self.second = None if second is None else GlobalSoftMoE(dim, second, expert_mult, rngs=rngs, numerics=numerics)

    def __call__(self, tokens: Array) -> jax.Array:
        tokens = checked_tokens(tokens, self.dim)
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
        if self.second is not None and self.expert_gates is not None:
            y = y * jnp.sign(self.expert_gates[...]).astype(y.dtype)[:, None, None]
            y = self.second(y.reshape(batch, groups * slots, channels))
        y = jnp.einsum("bgkm,bgmf->bgkf", weights, y.reshape(batch, groups, slots, channels), precision=exact)
        return y.reshape(batch, groups * self.group, channels)[:, :length]


class SoftMoE(nnx.Module):
    """Soft mixture of experts: (batch, length, dim) -> the same shape and dtype; no norm, no residual. Any length.

        logits[n, m] = scale <unit(x_n), unit(mu_m)>,          unit(v) = v / sqrt(sum of v^2 + 1e-6)
        input[m] = sum over n of softmax_n(logits)[n, m] x_n   y[m] = W2 gelu(W1 input[m] + b1) + b2 of m's expert
        output[n] = sum over m of softmax_m(logits)[n, m] y[m]

    n counts the tokens of a sequence, m the slots of all experts. Puigcerver et al. 2024, arXiv 2308.00951;
    google-research/vmoe, which casts to bfloat16 around its dispatch; here `numerics` decides. As there all experts
    begin equal, and only their slots differ.

    Args:
        dim: channels of a token.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        num_experts, slots_per_expert: as published 128 experts of one slot.
        hidden: width of an expert; 4 dim by default.
        approximate_gelu: the tanh form, as in vmoe; else the exact one.
        numerics: dtype of the parameters and precision of the products. Activations have the dtype of the tokens.

    Raises ConfigError: a size below 1; tokens of another shape, or that are no floating point numbers.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        num_experts: int = 128,
        slots_per_expert: int = 1,
        hidden: int | None = None,
        approximate_gelu: bool = True,
        numerics: Numerics = FLOAT32,
    ):
        require_positive(dim=dim, num_experts=num_experts, slots_per_expert=slots_per_expert)
        hidden, dtype = 4 * dim if hidden is None else hidden, numerics.param_dtype
        require_positive(hidden=hidden)
        self.dim, self.approximate_gelu, self.numerics = dim, approximate_gelu, numerics
        slots, bound = (dim, num_experts, slots_per_expert), math.sqrt(6 / (dim + hidden))

        def alike(*shape: int, draw: Callable[..., np.ndarray]) -> nnx.Param:
            whole = (num_experts, *shape)
            return nnx.Param(init_on_host(rngs, whole, dtype, lambda rng: np.broadcast_to(draw(rng, shape), whole)))

        kernel = {"draw": lambda rng, shape: rng.uniform(-bound, bound, shape)}
        bias = {"draw": lambda rng, shape: rng.normal(0, 1e-6, shape)}
        self.mu = nnx.Param(init_on_host(rngs, slots, dtype, lambda rng: rng.normal(0, dim**-0.5, slots)))
        self.scale = nnx.Param(jnp.ones((), dtype))
        self.kernel_in, self.bias_in = alike(dim, hidden, **kernel), alike(hidden, **bias)
        self.kernel_out, self.bias_out = alike(hidden, dim, **kernel), alike(dim, **bias)

    def __call__(self, tokens: Array) -> jax.Array:
        tokens = checked_tokens(tokens, self.dim)
        dtype, exact = tokens.dtype, self.numerics.lax_precision
        mu = (self.scale[...] * _unit(self.mu[...], 0)).astype(dtype)
        logits = jnp.einsum("bnf,fes->bnes", _unit(tokens, -1), mu, precision=exact)
        dispatch, combine = _softmax(logits, 1, dtype), _softmax(logits, (2, 3), dtype)
        slots = jnp.einsum("bnes,bnf->besf", dispatch, tokens, precision=exact)
        h = save_for_backward(jnp.einsum("besf,efh->besh", slots, self.kernel_in[...].astype(dtype), precision=exact))
        h = h + self.bias_in[...].astype(dtype)[:, None]
        h = jax.nn.gelu(h, approximate=True) if self.approximate_gelu else gelu(h)
        y = save_for_backward(jnp.einsum("besh,ehf->besf", h, self.kernel_out[...].astype(dtype), precision=exact))
        y = y + self.bias_out[...].astype(dtype)[:, None]
        return jnp.einsum("bnes,besf->bnf", combine, y, precision=exact)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    wide = at_least_float32(x)
    return (wide * lax.rsqrt(jnp.sum(jnp.square(wide), axis, keepdims=True) + UNIT_EPS)).astype(x.dtype)
