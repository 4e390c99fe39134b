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

from mambahome_kernels.selective_scan.api import Backend, ScanInputs


def state_dtype(inputs: ScanInputs):
    """float64 where any input is, else float32: states are never kept in less."""
    dtypes = {leaf.dtype for leaf in inputs if leaf is not None}
    return jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32


def first_state(inputs: ScanInputs) -> jax.Array:
    """The given initial state in the state's dtype, or zeros."""
    if inputs.initial_state is not None:
        return inputs.initial_state.astype(state_dtype(inputs))
    batch, _, d_inner = inputs.x.shape
    return jnp.zeros((batch, d_inner, inputs.A.shape[1]), state_dtype(inputs))


def discretise(dt: jax.Array, dt_bias: jax.Array | None, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """The step size delta and its derivative by dt: softplus(dt + dt_bias), or dt + dt_bias alone."""
    raw = dt if dt_bias is None else dt + dt_bias
    if softplus:
        return jax.nn.softplus(raw), jax.nn.sigmoid(raw)
    return raw, jnp.ones_like(raw)


def gate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(z) and its derivative."""
    s = jax.nn.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def cast_gradients(gradients: ScanInputs, inputs: ScanInputs) -> ScanInputs:
    """Each gradient in the dtype of its input; None where the input is None."""
    pairs = zip(ScanInputs._fields, gradients, inputs, strict=True)
    return ScanInputs(**{name: g.astype(i.dtype) for name, g, i in pairs if i is not None and g is not None})


def _by_time(inputs: ScanInputs):
    """x, dt, B, C, z with the time axis first, in the state's dtype."""
    dtype = state_dtype(inputs)
    arrays = (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)
    return tuple(None if a is None else jnp.swapaxes(a, 0, 1).astype(dtype) for a in arrays)


def _forward(inputs: ScanInputs, softplus: bool, keep: bool = True):
    A = inputs.A.astype(state_dtype(inputs))

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
    """By autodiff, which keeps every state: for short sequences only."""
    return jax.vjp(lambda inputs: _forward(inputs, softplus)[:2], inputs)[1]((dy, dlast_state))[0]


BACKEND = Backend(_forward, _backward)
