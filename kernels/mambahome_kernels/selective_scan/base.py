"""What a backend of the selective scan takes and gives, shared by all of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ScanInputs(NamedTuple):
    """Arguments of the scan; gradients have the same form. Absent optional arguments are None.

    x, dt, z (batch, length, d_inner); A (d_inner, d_state); B, C (batch, length, d_state); D, dt_bias (d_inner,);
    initial_state (batch, d_inner, d_state).
    """

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None = None
    z: jax.Array | None = None
    dt_bias: jax.Array | None = None
    initial_state: jax.Array | None = None


class Backend(NamedTuple):
    """One way to compute the scan.

    forward(inputs, softplus, keep) -> (y, last_state, residual): y as x, last_state (batch, d_inner, d_state) in the
    state's dtype. With keep, residual is any pytree of states that backward wants (every so many steps), never of size
    length x d_inner x d_state; without, it may be None.
    backward(inputs, softplus, residual, dy, dlast_state) -> ScanInputs of gradients in the inputs' dtypes.
    why_not(inputs) -> None where the backend works, else the reason a user reads.
    """

    forward: Callable
    backward: Callable
    why_not: Callable


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


def combine(first, second):
    """Two stretches of a linear recurrence as one: (decay, state from zero) of each."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def cast_gradients(gradients: ScanInputs, inputs: ScanInputs) -> ScanInputs:
    """Each gradient in the dtype of its input; None where the input is None."""
    pairs = zip(ScanInputs._fields, gradients, inputs, strict=True)
    return ScanInputs(**{name: g.astype(i.dtype) for name, g, i in pairs if i is not None and g is not None})
