"""The one public function of the selective scan: checks its arguments, picks a backend, ties forward to backward."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mambahome_kernels.errors import Unsupported
from mambahome_kernels.selective_scan import reference, xla
from mambahome_kernels.selective_scan.base import Backend, ScanInputs

BACKENDS = ("reference", "xla", "mosaic_gpu")
_OLDEST_JAX = (0, 11)  # whose Pallas has what the mosaic_gpu backend is written in

_log = logging.getLogger(__name__)


def _backend(name: str) -> Backend:
    if name == "mosaic_gpu":
        from mambahome_kernels.selective_scan import mosaic_gpu  # an older JAX cannot import it

        return mosaic_gpu.BACKEND
    return {"reference": reference.BACKEND, "xla": xla.BACKEND}[name]


def _why_not(name: str, inputs: ScanInputs) -> str | None:
    if name == "mosaic_gpu" and jax.__version_info__ < _OLDEST_JAX:
        return f"it needs JAX {'.'.join(map(str, _OLDEST_JAX))} or newer, and this is {jax.__version__}"
    return _backend(name).why_not(inputs)


@functools.cache
def _say(chosen: str, reason: str | None) -> None:
    """Once for each choice, not at every call."""
    _log.info("selective scan: %s%s", chosen, f" (not mosaic_gpu: {reason})" if reason else ", the fastest here")


def choose_backend(inputs: ScanInputs, name: str | None = None) -> str:
    """Name of the backend to use: the given one, which must work, or the best that does.

    Raises Unsupported with the reason where a named backend cannot run, and ValueError for an unknown name.
    """
    if name is None:
        reason = _why_not("mosaic_gpu", inputs)
        chosen = "xla" if reason else "mosaic_gpu"
        _say(chosen, reason)
        return chosen
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join(BACKENDS)}, or None for the best")
    if reason := _why_not(name, inputs):
        raise Unsupported(f"backend {name!r} cannot run here: {reason}")
    return name


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
    forward, backward, _ = _backend(backend)

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
