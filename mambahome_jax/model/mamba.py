"""Mamba layers (Gu and Dao 2023) over a sequence of tokens: in one direction, in SegMamba's three, or without scan."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mambahome_kernels import selective_scan
from mambahome_kernels.conv3d.api import Size

from mambahome_jax.errors import ConfigError
from mambahome_jax.model.layers import (
    FLOAT32,
    Array,
    DepthwiseConv3d,
    Linear,
    Numerics,
    checked_tokens,
    init_on_host,
    require_positive,
    save_for_backward,
    uniform,
)

D_STATE = 16
D_CONV = 4
EXPAND = 2
DT_RANGE = (0.001, 0.1)
DT_FLOOR = 1e-4


class CausalConv(nnx.Module):
    """Depthwise convolution over time, zeros before the start: (batch, length, channels); kernel (taps, channels).

    y[t] = sum over k of kernel[k] x[t - taps + 1 + k], plus bias.
    """

    def __init__(self, channels: int, taps: int, *, bias: bool, rngs: nnx.Rngs, param_dtype):
        self.kernel = uniform(rngs, (taps, channels), taps, param_dtype)
        self.bias = uniform(rngs, (channels,), taps, param_dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        length, taps = x.shape[1], self.kernel.shape[0]
        padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
        kernel = self.kernel[...].astype(x.dtype)
        y = padded[:, :length] * kernel[0]
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        for k in range(1, taps):
            y = y + padded[:, k : k + length] * kernel[k]
        return y


class SelectiveSSM(nnx.Module):
    """What a Mamba layer does between its projections, in one direction.

    small_steps: whether dt begins at 0.001 to 0.1, as published for Mamba; else its bias begins as a linear layer's.
    """

    def __init__(
        self,
        d_inner: int,
        dt_rank: int,
        *,
        d_state: int = D_STATE,
        d_conv: int = D_CONV,
        conv_bias: bool = True,
        small_steps: bool = True,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.dt_rank, self.d_state = dt_rank, d_state
        dtype = numerics.param_dtype
        self.conv = CausalConv(d_inner, d_conv, bias=conv_bias, rngs=rngs, param_dtype=dtype)
        self.x_proj = Linear(d_inner, dt_rank + 2 * d_state, bias=False, rngs=rngs, numerics=numerics)
        self.dt_proj = Linear(dt_rank, d_inner, bias=False, rngs=rngs, numerics=numerics)
        low, high = np.log(DT_RANGE)

        def inverse_softplus_of_dt(rng: np.random.Generator) -> np.ndarray:
            dt = np.maximum(np.exp(rng.uniform(low, high, d_inner)), DT_FLOOR)
            return dt + np.log(-np.expm1(-dt))

        if small_steps:
            self.dt_bias = nnx.Param(init_on_host(rngs, (d_inner,), dtype, inverse_softplus_of_dt))
        else:
            self.dt_bias = uniform(rngs, (d_inner,), dt_rank, dtype)
        states = np.tile(np.log(np.arange(1, d_state + 1)), (d_inner, 1))
        self.A_log = nnx.Param(jax.device_put(states.astype(dtype)))
        self.D = nnx.Param(jnp.ones(d_inner, dtype))

    def scan(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """x (batch, length, d_inner), in the order in which it is scanned -> the same shape, gated by silu(z)."""
        x = jax.nn.silu(self.conv(x))
        dt, B, C = jnp.split(self.x_proj(x), (self.dt_rank, self.dt_rank + self.d_state), axis=-1)
        y, _ = selective_scan(
            x,
            self.dt_proj(dt),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            D=self.D[...],
            z=z,
            dt_bias=self.dt_bias[...],
            softplus=True,
        )
        return y


class Mamba(SelectiveSSM):
    """Mamba: (batch, length, d_model) -> the same shape and dtype; token t sees tokens 0 to t. Any length from 1.

        [x, z] = W_in tokens                      x = silu(causal depthwise convolution of x)
        [dt, B, C] = W_x x                        delta = softplus(W_dt dt + b_dt)
        h[t] = exp(delta A) h[t-1] + delta B[t] x[t],    A = -exp(A_log)
        y[t] = (C[t] h[t] + D x[t]) silu(z[t])    output = W_out y

    Gu and Dao 2023, arXiv 2312.00752; names, defaults and initial values of state-spaces/mamba (mamba_simple.py).

    Args:
        d_model: channels of a token.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        d_state: states of a channel. d_conv: taps of the convolution. expand: inner width d_inner over d_model.
        dt_rank: of the projection to dt; by default d_model / 16, rounded up.
        bias: of W_in and W_out. conv_bias: of the convolution.
        numerics: dtype of the parameters and precision of the products. Activations have the dtype of the tokens.

    Raises ConfigError: a size below 1; tokens of another shape, or that are no floating point numbers.
    """

    def __init__(
        self,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        d_state: int = D_STATE,
        d_conv: int = D_CONV,
        expand: int = EXPAND,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        numerics: Numerics = FLOAT32,
    ):
        require_positive(d_model=d_model)
        rank = -(-d_model // 16) if dt_rank is None else dt_rank
        require_positive(d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        self.d_model, d_inner = d_model, expand * d_model
        self.in_proj = Linear(d_model, 2 * d_inner, bias=bias, rngs=rngs, numerics=numerics)
        super().__init__(
            d_inner, rank, d_state=d_state, d_conv=d_conv, conv_bias=conv_bias, rngs=rngs, numerics=numerics
        )
        self.out_proj = Linear(d_inner, d_model, bias=bias, rngs=rngs, numerics=numerics)

    def __call__(self, tokens: Array) -> jax.Array:
        tokens = checked_tokens(tokens, self.d_model)
        x, z = jnp.split(save_for_backward(self.in_proj(tokens)), 2, axis=-1)
        return self.out_proj(self.scan(x, z))


class GatedConv(nnx.Module):
    """Mamba's layer without its scan: (batch, depth, height, width, d_model) -> the same shape and dtype.

        [x, z] = W_in v        x = silu(depthwise convolution of x over the grid)        output = W_out (x silu(z))

    The gated CNN of Yu and Wang 2025 (MambaOut, arXiv 2405.07992), in three dimensions and as wide as `Mamba`, which it
    stands in for: a voxel sees its neighbours instead of all voxels before it. It has 84 to 94 % of the parameters of
    `Mamba` for 48 to 384 channels, as the projections to dt, B and C go.
    """

    def __init__(self, d_model: int, size: Size = 3, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        d_inner = EXPAND * d_model
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False, rngs=rngs, numerics=numerics)
        self.conv = DepthwiseConv3d(d_inner, size, rngs=rngs, numerics=numerics)
        self.out_proj = Linear(d_inner, d_model, bias=False, rngs=rngs, numerics=numerics)

    def __call__(self, volume: jax.Array) -> jax.Array:
        x, z = jnp.split(save_for_backward(self.in_proj(volume)), 2, axis=-1)
        return self.out_proj(jax.nn.silu(self.conv(x)) * jax.nn.silu(z))


class BiMamba(nnx.Module):
    """Mamba in three directions (SegMamba's "v3"): (batch, length, d_model) -> the same shape and dtype.

    Each direction scans x in an order of its own, with a convolution, W_x, W_dt, b_dt, A and D of its own; its output
    is put back into the order of the tokens:

        output = W_out ((forward(x) + backward(x) + slices(x)) silu(z)),    [x, z] = W_in tokens

    forward: as `Mamba`. backward: from the last token to the first. slices: the tokens are `num_slices` runs of equal
    length; the first token of every run, then the second of every run, and so on.
    Xing et al. 2024, arXiv 2401.13560; ge-xing/SegMamba, mamba_simple.py. As published only the forward direction
    begins with the small steps of Mamba.

    Args:
        d_model: channels of a token; inner width 2 d_model, 16 states, 4 taps, rank d_model / 16 rounded up.
        num_slices: a divisor of the length. With 1 the third direction has the order of the first.
        rngs, numerics: as of `Mamba`.

    Raises ConfigError as `Mamba` does, and for a length that num_slices does not divide.
    """

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, num_slices: int = 1, numerics: Numerics = FLOAT32):
        require_positive(d_model=d_model, num_slices=num_slices)
        self.d_model, self.num_slices = d_model, num_slices
        d_inner, rank = EXPAND * d_model, -(-d_model // 16)
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False, rngs=rngs, numerics=numerics)
        self.forward, self.backward, self.slices = (
            SelectiveSSM(d_inner, rank, small_steps=small, rngs=rngs, numerics=numerics)
            for small in (True, False, False)
        )
        self.out_proj = Linear(d_inner, d_model, bias=False, rngs=rngs, numerics=numerics)

    def __call__(self, tokens: Array) -> jax.Array:
        tokens = checked_tokens(tokens, self.d_model)
        length, slices = tokens.shape[1], self.num_slices
        if length % slices:
            raise ConfigError(
                f"there are {length} tokens (shape {tokens.shape}), which num_slices = {slices} does not divide; "
                "expected a length that is a multiple of it"
            )
        x, z = jnp.split(save_for_backward(self.in_proj(tokens)), 2, axis=-1)
        y = self.forward.scan(x) + jnp.flip(self.backward.scan(jnp.flip(x, 1)), 1)
        y = y + _transposed(self.slices.scan(_transposed(x, slices)), length // slices)
        # Each direction's gate moves with its tokens, so that one gate of the sum is the same.
        return self.out_proj(y * jax.nn.silu(z))


def _transposed(x: jax.Array, runs: int) -> jax.Array:
    """(batch, length, channels): the first of each of `runs` runs of tokens, then the second of each, and so on."""
    batch, length, channels = x.shape
    return x.reshape(batch, runs, length // runs, channels).swapaxes(1, 2).reshape(x.shape)
