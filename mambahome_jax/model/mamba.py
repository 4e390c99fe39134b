"""The Mamba layer (Gu and Dao 2023) over a sequence of tokens, one direction."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mambahome_kernels import selective_scan

from mambahome_jax.model.layers import FLOAT32, Linear, Numerics, init_on_host, save_for_backward, uniform

D_STATE = 16
D_CONV = 4
EXPAND = 2
DT_RANGE = (0.001, 0.1)
DT_FLOOR = 1e-4


class CausalConv(nnx.Module):
    """Depthwise convolution over time, zeros before the start: (batch, length, channels); kernel (4, channels).

    y[t] = sum over k of kernel[k] x[t-3+k], plus bias.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype):
        self.kernel = uniform(rngs, (D_CONV, channels), D_CONV, param_dtype)
        self.bias = uniform(rngs, (channels,), D_CONV, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        length = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (D_CONV - 1, 0), (0, 0)))
        kernel = self.kernel[...].astype(x.dtype)
        y = self.bias[...].astype(x.dtype)
        for k in range(D_CONV):
            y = y + padded[:, k : k + length] * kernel[k]
        return y


class Mamba(nnx.Module):
    """(batch, length, d_model) -> the same shape; inner width 2 d_model, 16 states, rank ceil(d_model / 16) of dt."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        d_inner = EXPAND * d_model
        self.dt_rank = rank = -(-d_model // 16)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=False, rngs=rngs, numerics=numerics)

        self.in_proj = linear(d_model, 2 * d_inner)
        self.conv = CausalConv(d_inner, rngs=rngs, param_dtype=numerics.param_dtype)
        self.x_proj = linear(d_inner, rank + 2 * D_STATE)
        self.dt_proj = linear(rank, d_inner)
        low, high = np.log(DT_RANGE)

        def inverse_softplus_of_dt(rng: np.random.Generator) -> np.ndarray:
            dt = np.maximum(np.exp(rng.uniform(low, high, d_inner)), DT_FLOOR)
            return dt + np.log(-np.expm1(-dt))

        self.dt_bias = nnx.Param(init_on_host(rngs, (d_inner,), numerics.param_dtype, inverse_softplus_of_dt))
        states = np.tile(np.log(np.arange(1, D_STATE + 1)), (d_inner, 1))
        self.A_log = nnx.Param(jax.device_put(states.astype(numerics.param_dtype)))
        self.D = nnx.Param(jnp.ones(d_inner, numerics.param_dtype))
        self.out_proj = linear(d_inner, d_model)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, z = jnp.split(save_for_backward(self.in_proj(tokens)), 2, axis=-1)
        x = jax.nn.silu(self.conv(x))
        dt, B, C = jnp.split(self.x_proj(x), (self.dt_rank, self.dt_rank + D_STATE), axis=-1)
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
        return self.out_proj(y)
