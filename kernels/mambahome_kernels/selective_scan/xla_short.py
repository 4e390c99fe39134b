"""The scan of a short sequence in plain XLA: `associative_scan` over its whole length.

All its states are in memory then, those of the backward pass too: six times the scratch of the loop over steps. But a
GPU runs a few large programs where a loop starts several small ones for each step: for a short sequence, these starts
take the time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.selective_scan.base import ScanInputs, combine, discretise, first_state, gate, state_dtype

# Floats of all states of one call (of one example under vmap). Measured by benchmarks/scan_variants.py: with 50 million
# the loop over steps takes half as long again or more, with 200 million it is the faster one.
_FEW = 1 << 26


def is_short(inputs: ScanInputs) -> bool:
    """Whether this is the faster way on the default device."""
    return jax.default_backend() != "cpu" and inputs.x.size * inputs.A.shape[1] <= _FEW


def forward(inputs: ScanInputs, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """(y, last state)."""
    dtype = state_dtype(inputs)
    x, dt, B, C = (a.astype(dtype) for a in (inputs.x, inputs.dt, inputs.B, inputs.C))
    delta = discretise(dt, inputs.dt_bias, softplus)[0]
    decay = jnp.exp(delta[..., None] * inputs.A)
    states = (delta * x)[..., None] * B[:, :, None]
    states = states.at[:, 0].add(decay[:, 0] * first_state(inputs))
    states = lax.associative_scan(combine, (decay, states), axis=1)[1]
    y = jnp.einsum("blds,bls->bld", states, C, precision=lax.Precision.HIGHEST)
    if inputs.D is not None:
        y = y + inputs.D * x
    if inputs.z is not None:
        y = y * gate(inputs.z.astype(dtype))[0]
    return y.astype(inputs.x.dtype), states[:, -1]


def backward(inputs: ScanInputs, softplus: bool, dy: jax.Array, dlast_state: jax.Array) -> ScanInputs:
    """Gradients of the inputs, from the inputs alone: the states are computed again."""
    return jax.vjp(lambda i: forward(i, softplus), inputs)[1]((dy, dlast_state))[0]
