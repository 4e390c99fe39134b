"""The selective scan as its definition reads: one step after another. The specification of the other backends.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), equation 2 with the plain product
delta * B for the input, as mamba_ssm's selective_scan_ref has it:

    delta_t = softplus(dt_t + dt_bias)
    h_t     = exp(delta_t A) h_(t-1) + delta_t B_t x_t
    y_t     = (sum over states of C_t h_t + D x_t) silu(z_t)
"""

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.selective_scan.base import Backend, ScanInputs, cast_gradients, discretise, first_state, gate
from mambahome_kernels.selective_scan.base import state_dtype as _state_dtype


def _by_time(inputs: ScanInputs):
    """x, dt, B, C, z with the time axis first, in the state's dtype."""
    dtype = _state_dtype(inputs)
    arrays = (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)
    return tuple(None if a is None else jnp.swapaxes(a, 0, 1).astype(dtype) for a in arrays)


def _forward(inputs: ScanInputs, softplus: bool, keep: bool = True):
    A = inputs.A.astype(_state_dtype(inputs))

    def step(h, at_t):
        x, dt, B, C, z = at_t
        delta, _ = discretise(dt, inputs.dt_bias, softplus)
        h = jnp.exp(delta[:, :, None] * A) * h + (delta * x)[:, :, None] * B[:, None, :]
        y = jnp.sum(h * C[:, None, :], axis=2)
        if inputs.D is not None:
            y = y + inputs.D * x
        if z is not None:
            y = y * gate(z)[0]
        return h, y

    last_state, y = lax.scan(step, first_state(inputs), _by_time(inputs))
    return jnp.swapaxes(y, 0, 1).astype(inputs.x.dtype), last_state, None


def _backward(inputs: ScanInputs, softplus: bool, residual: None, dy: jax.Array, dlast_state: jax.Array) -> ScanInputs:
    """Keeps every state, as befits a specification: for short sequences only."""
    dtype = _state_dtype(inputs)
    A = inputs.A.astype(dtype)
    h0 = first_state(inputs)
    by_time = _by_time(inputs)

    def states(h, at_t):
        x, dt, B, _, _ = at_t
        delta, _ = discretise(dt, inputs.dt_bias, softplus)
        new = jnp.exp(delta[:, :, None] * A) * h + (delta * x)[:, :, None] * B[:, None, :]
        return new, h

    _, before = lax.scan(states, h0, by_time)

    def step(carry, at_t):
        g_next, dA, dD, dbias = carry
        (x, dt, B, C, z), h_before, dy = at_t
        delta, slope = discretise(dt, inputs.dt_bias, softplus)
        decay = jnp.exp(delta[:, :, None] * A)
        h = decay * h_before + (delta * x)[:, :, None] * B[:, None, :]
        dz = None
        if z is not None:
            silu, dsilu = gate(z)
            out = jnp.sum(h * C[:, None, :], axis=2)
            if inputs.D is not None:
                out = out + inputs.D * x
            dz, dy = dy * out * dsilu, dy * silu
        g = g_next + dy[:, :, None] * C[:, None, :]
        du = jnp.sum(g * B[:, None, :], axis=2)
        ddecay = g * h_before * decay
        ddt = (jnp.sum(ddecay * A, axis=2) + du * x) * slope
        dx = du * delta
        if inputs.D is not None:
            dx, dD = dx + dy * inputs.D, dD + jnp.sum(dy * x, axis=0)
        dA = dA + jnp.sum(ddecay * delta[:, :, None], axis=0)
        dB = jnp.sum(g * (delta * x)[:, :, None], axis=1)
        dC = jnp.sum(h * dy[:, :, None], axis=1)
        return (g * decay, dA, dD, dbias + jnp.sum(ddt, axis=0)), (dx, ddt, dB, dC, dz)

    d_inner = A.shape[0]
    zeros = jnp.zeros(d_inner, dtype)
    start = (dlast_state.astype(dtype), jnp.zeros_like(A), zeros, zeros)
    steps = (by_time, before, jnp.swapaxes(dy, 0, 1).astype(dtype))
    (dh0, dA, dD, dbias), by_step = lax.scan(step, start, steps, reverse=True)
    dx, ddt, dB, dC = (jnp.swapaxes(g, 0, 1) for g in by_step[:4])
    dz = None if inputs.z is None else jnp.swapaxes(by_step[4], 0, 1)
    return cast_gradients(ScanInputs(dx, ddt, dA, dB, dC, dD, dz, dbias, dh0), inputs)


def _why_not(inputs: ScanInputs) -> None:
    return None


BACKEND = Backend(_forward, _backward, _why_not)
