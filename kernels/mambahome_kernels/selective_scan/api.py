"""The public function of the selective scan: checks its arguments, picks a backend, ties forward to backward."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mambahome_kernels.backends import Backends

BACKENDS = Backends(
    "mambahome_kernels.selective_scan", reference="reference", xla="xla", mosaic_gpu="mosaic_gpu.backend"
)
_log = logging.getLogger(__name__)


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
    why_not: Callable = lambda inputs: None


@functools.cache
def _log_choice(chosen: str, reason: str | None) -> None:
    """Once for each choice, not at every call."""
    _log.info("selective scan: %s%s", chosen, f" (not mosaic_gpu: {reason})" if reason else ", the fastest here")


def choose_backend(inputs: ScanInputs, name: str | None = None) -> str:
    """Name of the backend to use: the given one, which must work, or the best that does.

    Raises Unsupported with the reason where a named backend cannot run, and ValueError for an unknown name.
    """
    chosen = BACKENDS.choose(name, inputs)
    if name is None:
        _log_choice(chosen, BACKENDS.why_not("mosaic_gpu", inputs))
    return chosen


def _check(inputs: ScanInputs) -> None:
    x, A = inputs.x, inputs.A
    for name, value in inputs._asdict().items():
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} is {value.dtype}; expected float32, bfloat16 or float64")
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected (batch, length, d_inner)")
    if A.ndim != 2:
        raise ValueError(f"A has shape {A.shape}; expected (d_inner, d_state)")
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "dt": x.shape,
        "z": x.shape,
        "A": (d_inner, d_state),
        "B": (batch, length, d_state),
        "C": (batch, length, d_state),
        "D": (d_inner,),
        "dt_bias": (d_inner,),
        "initial_state": (batch, d_inner, d_state),
    }
    for name, shape in expected.items():
        value = getattr(inputs, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {value.shape}; expected {shape} where x is {x.shape} and A is {A.shape}")
    if length == 0 or d_state == 0:
        raise ValueError(f"x has length {length} and A {d_state} states; expected at least one of each")


def _check_sharding(inputs: ScanInputs) -> None:
    """What JAX's loops and Pallas would refuse somewhere within, in words of their own."""
    for name, value in inputs._asdict().items():
        if value is None:
            continue
        kind = jax.typeof(value)
        if kind.manual_axis_type.varying:
            axes = ", ".join(sorted(kind.manual_axis_type.varying))
            raise ValueError(f"{name} varies over {axes} in a shard_map that checks this; give it check_vma=False")
        if any(axis is not None for axis in kind.sharding.spec):
            action = "Make the mesh with axis_types=(jax.sharding.AxisType.Auto,) an axis."
            raise ValueError(f"{name} is sharded as {kind.sharding.spec} over explicit axes of a mesh. {action}")


@functools.cache
def _scan(softplus: bool, backend: str):
    """The differentiable function of ScanInputs for one backend."""
    forward, backward, _ = BACKENDS[backend]

    @jax.custom_vjp
    def scan(inputs: ScanInputs):
        return forward(inputs, softplus, keep=False)[:2]

    def save(inputs: ScanInputs):
        # Under jax.checkpoint a policy can keep these by name: then the scan does not run again.
        y, last_state, residual = checkpoint_name(forward(inputs, softplus, keep=True), "selective_scan")
        return (y, last_state), (inputs, residual)

    def gradients(saved, cotangents):
        inputs, residual = saved
        return (backward(inputs, softplus, residual, *cotangents),)

    scan.defvjp(save, gradients)
    return scan


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    softplus: bool = False,
    initial_state: jax.Array | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selective state space scan (Gu and Dao 2023), differentiable in every array, of any length and d_state.

        delta = softplus(dt + dt_bias)      (without softplus: dt + dt_bias)
        h_t   = exp(delta_t A) h_(t-1) + delta_t B_t x_t
        y_t   = (sum over states of C_t h_t + D x_t) silu(z_t)

    Args:
        x, dt, z: (batch, length, d_inner), float32, bfloat16 or float64. Without z there is no gate. The batch may be
            split over a mesh whose axes are Auto, or by a shard_map with check_vma=False.
        A: (d_inner, d_state). B, C: (batch, length, d_state). D, dt_bias: (d_inner,).
        initial_state: (batch, d_inner, d_state), zeros where absent.
        backend: "reference" (one step after another), "xla" (chunks side by side), "mosaic_gpu" (a Pallas kernel for
            Hopper GPUs and newer), or None for the best one here.

    Returns:
        y as x in shape and dtype, and the last state (batch, d_inner, d_state). States are float32, or float64 where
        any argument is.

    Raises:
        ValueError: shapes that do not fit, numbers that are not floating, explicit sharding, or an unknown backend.
            Unsupported: a named backend that cannot run here.
    """
    inputs = jax.tree.map(jnp.asarray, ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state))
    _check(inputs)
    chosen = choose_backend(inputs, backend)
    if chosen != "reference":
        _check_sharding(inputs)
    return _scan(softplus, chosen)(inputs)
