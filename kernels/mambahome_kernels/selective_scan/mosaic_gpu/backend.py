"""The selective scan for Hopper GPUs and newer, as Pallas Mosaic GPU kernels. The algorithm: kernels/README.md.

Time is cut into chunks that run side by side, one thread a channel with its states in registers: (1) every chunk from
a zero state, (2) the true starts from these, (3) every chunk again from its true start, writing y. The backward pass is
the same over reversed time.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mambahome_kernels.mosaic.partition import over_batch
from mambahome_kernels.mosaic.runtime import core_count, traced_once, why_not_hopper
from mambahome_kernels.selective_scan.api import Backend, ScanInputs
from mambahome_kernels.selective_scan.mosaic_gpu import backward, forward
from mambahome_kernels.selective_scan.mosaic_gpu.forward import carry_over
from mambahome_kernels.selective_scan.mosaic_gpu.lanes import F32, LOG2E, TILE, WARP, WARPS, Options, Sizes
from mambahome_kernels.selective_scan.reference import cast_gradients

DEFAULT = Options()
_MAX_STATES = 16  # more would not fit into the registers of a thread
_FEW_TILES = 4  # in a chunk
_WARPS_PER_CORE = 16  # in the forward pass all run at once, in the backward pass half of them


def sizes_of(inputs: ScanInputs, softplus: bool, chunk: int | None = None) -> Sizes:
    """Chunks such that the blocks fill the device's multiprocessors once (twice in the backward pass)."""
    batch, length, d_inner = inputs.x.shape
    d_state = 8 if inputs.A.shape[1] <= 8 else 16
    units = pl.cdiv(d_inner, WARP)
    steps = chunk or pl.cdiv(length, max(1, _WARPS_PER_CORE * core_count() // (batch * units)))
    # As many bytes a copy as in float32, where there are enough copies for one to travel while another is computed.
    narrow = all(a is None or a.dtype == jnp.bfloat16 for a in (inputs.x, inputs.dt, inputs.z))
    span = 2 if narrow and steps > _FEW_TILES * TILE else 1
    tiles = max(1, pl.cdiv(steps, span * TILE)) * span
    whole_blocks = WARPS // math.gcd(units, WARPS)
    chunks = pl.cdiv(pl.cdiv(length, tiles * TILE), whole_blocks) * whole_blocks
    if chunk is None:
        # Fewer, where rounding would have left chunks without a step.
        tiles = pl.cdiv(length, chunks * span * TILE) * span
    return Sizes(batch, length, d_inner, d_state, tiles, chunks, softplus, inputs.z is not None, span)


def _pad(a: jax.Array, width: int, value: float = 0.0) -> jax.Array:
    missing = width - a.shape[-1]
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)], constant_values=value) if missing else a


class _Prepared:
    """Inputs as the kernels want them: rows of whole 16 bytes, per-channel vectors of whole units."""

    def __init__(self, inputs: ScanInputs, s: Sizes):
        def wide(a):
            words = 16 // a.dtype.itemsize
            # A copy as wide as the array is not cut off at the end of a sequence: its last rows would land in the next
            # batch entry (seen with JAX 0.11.2).
            return _pad(a, max(WARP + words, math.ceil(a.shape[-1] / words) * words))

        def vector(a):
            return jnp.zeros((1, s.channels), F32) if a is None else _pad(a.astype(F32)[None], s.channels)

        self.x, self.dt = wide(inputs.x), wide(inputs.dt)
        self.z = None if inputs.z is None else wide(inputs.z)
        # Every lane reads them: converting at each step costs more than a kernel that does it once, unless there are
        # few steps.
        few = s.tiles <= _FEW_TILES
        self.B, self.C = (_pad(a if few else a.astype(F32), s.d_state) for a in (inputs.B, inputs.C))
        self.rates = self.states(inputs.A.astype(F32)[None] * LOG2E, s)[0]
        self.bias, self.skip = vector(inputs.dt_bias), vector(inputs.D)

    @staticmethod
    def states(a: jax.Array, s: Sizes) -> jax.Array:
        """(batch, d_inner, states) to (batch, d_state, channels)."""
        a = _pad(a.astype(F32).swapaxes(1, 2), s.channels)
        return jnp.pad(a, ((0, 0), (0, s.d_state - a.shape[1]), (0, 0)))


def _states(inputs: ScanInputs, softplus: bool, keep: bool, options: Options, chunk):
    s = sizes_of(inputs, softplus, chunk)
    p = _Prepared(inputs, s)
    ends, total = forward.ends(s, p.x, p.dt, p.B, p.rates, p.bias, options)
    edge = None if inputs.initial_state is None else p.states(inputs.initial_state, s)
    starts, last = carry_over(s, total, ends, edge, p.rates, options)
    y, *kept = forward.outputs(s, p.x, p.dt, p.B, p.C, p.z, p.rates, p.bias, p.skip, starts, options, keep)
    states = inputs.A.shape[1]
    last = last[:, :states, : s.d_inner].swapaxes(1, 2)
    return y[..., : s.d_inner], last, kept[0] if keep else None


def _gradients(inputs: ScanInputs, softplus: bool, kept, dy, dlast_state, options: Options, chunk) -> ScanInputs:
    """Those of A, D and dt_bias for each batch entry by itself, all others as the inputs; sums in float32."""
    s = sizes_of(inputs, softplus, chunk)
    p = _Prepared(inputs, s)
    dy = _pad(dy, p.x.shape[-1]).astype(p.x.dtype)
    first, total = backward.starts(s, p.dt, p.z, dy, p.C, p.rates, p.bias, options)
    ends, dinitial = carry_over(s, total, first, p.states(dlast_state, s), p.rates, options, reverse=True)
    dx, ddt, dz, sums, thin = backward.gradients(
        s, p.x, p.dt, p.B, p.C, p.z, dy, p.rates, p.bias, p.skip, kept, ends, options
    )
    states, d = inputs.A.shape[1], s.d_inner
    thin = thin.sum(1)  # (batch, sums, 2, steps, states)
    dB, dC = (thin[:, :, k].reshape(s.batch, -1, s.d_state)[:, : s.length, :states] for k in range(2))
    sums = sums.sum(1)
    return ScanInputs(
        x=dx[..., :d],
        dt=ddt[..., :d],
        A=sums[:, :states, :d].swapaxes(1, 2),
        B=dB,
        C=dC,
        D=sums[:, s.d_state, :d],
        z=None if dz is None else dz[..., :d],
        dt_bias=sums[:, s.d_state + 1, :d],
        initial_state=dinitial[:, :states, :d].swapaxes(1, 2),
    )


@traced_once("softplus", "keep", "options", "chunk")
def _forward(inputs: ScanInputs, softplus: bool, keep: bool = True, options: Options = DEFAULT, chunk=None):
    def run(shared, batched):
        return _states(_join(shared, batched), softplus, keep, options, chunk)

    return over_batch(run)(*_split(inputs))


@traced_once("softplus", "options", "chunk")
def _backward(
    inputs: ScanInputs, softplus: bool, residual, dy, dlast_state, options: Options = DEFAULT, chunk=None
) -> ScanInputs:
    def run(shared, batched):
        own, kept, dy, dlast_state = batched
        return _gradients(_join(shared, own), softplus, kept, dy, dlast_state, options, chunk)

    shared, batched = _split(inputs)
    gradients = over_batch(run)(shared, (batched, residual, dy, dlast_state))
    return cast_gradients(gradients._replace(**{k: getattr(gradients, k).sum(0) for k in _SHARED}), inputs)


_SHARED = ("A", "D", "dt_bias")  # by the whole batch


def _split(inputs: ScanInputs) -> tuple[dict, dict]:
    given = inputs._asdict()
    return {k: given.pop(k) for k in _SHARED}, given


def _join(shared: dict, batched: dict) -> ScanInputs:
    return ScanInputs(**shared, **batched)


def _why_not(inputs: ScanInputs) -> str | None:
    for name in ("x", "dt", "z", "B", "C"):
        value = getattr(inputs, name)
        if value is not None and value.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {value.dtype}; the kernel takes float32 and bfloat16"
    if inputs.A.dtype != jnp.float32:
        return f"A is {inputs.A.dtype}; the kernel takes float32"
    for name in ("D", "dt_bias", "initial_state"):
        value = getattr(inputs, name)
        if value is not None and value.dtype == jnp.float64:
            return f"{name} is float64; the kernel computes in float32"
    if inputs.x.shape[0] == 0:
        return "the batch is empty"
    if inputs.A.shape[1] > _MAX_STATES:
        return f"d_state is {inputs.A.shape[1]}; the kernel holds at most {_MAX_STATES} in registers"
    return why_not_hopper(newer=True)


BACKEND = Backend(_forward, _backward, _why_not)
