"""The selective scan in plain XLA, for any device: chunks of time side by side, a loop over the steps within a chunk.

Time is cut into K chunks of T steps. (1) every chunk runs from a zero state, which gives its end state; its total
decay is exp(A * sum of delta). (2) `associative_scan` over the K chunks turns these into the true chunk starts.
(3) every chunk runs again from its true start and writes y. With one chunk (a batch wide enough to fill the cache),
only (3) is left.

The forward pass keeps the state at the start of every segment of S steps; the backward pass takes the segments of all
chunks in reverse, recomputes the S states of each from there, and runs the adjoint state backward, whose chunk ends
come from the same three-phase scheme over reversed time. So nothing of size length x d_inner x d_state reaches
memory.

States are (batch, chunk, d_state, d_inner): the sum over states then adds whole vectors.

Short sequences on a GPU take one `associative_scan` over their whole length. All their states are in memory then, six
times the scratch of the loop over steps. But a GPU runs a few large programs where a loop starts several small ones for
each step: for a short sequence, these starts take the time.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mambahome_kernels.backends import planned_batch, platform
from mambahome_kernels.selective_scan.api import Backend, ScanInputs
from mambahome_kernels.selective_scan.reference import cast_gradients, discretise, first_state, gate, state_dtype

# Floats of state that all chunks of a step touch together: on a CPU what stays in its cache, elsewhere what fills it.
_CPU_STATE = 1 << 16
_GPU_STATE = 1 << 24
# Floats of all states of a short sequence (of one example under vmap). Measured by benchmarks/scan_variants.py: with 50
# million the loop over steps takes half as long again or more, with 200 million it is the faster one.
_FEW_STATES = 1 << 26


def combine(first, second):
    """Two stretches of a linear recurrence as one: (decay, state from zero) of each."""
    return second[0] * first[0], second[0] * first[1] + second[1]


class _Plan(NamedTuple):
    chunks: int
    segments: int  # in each chunk
    segment: int  # steps

    @property
    def steps(self) -> int:
        return self.segments * self.segment

    @property
    def length(self) -> int:
        return self.chunks * self.steps


def _plan(batch: int, length: int, d_inner: int, d_state: int) -> _Plan:
    """Chunks so that one step touches about the target number of floats, segments of about the root of a chunk.

    A segment is at least 2 d_state steps, so that the saved segment starts stay below half of an input array.
    """
    target = _CPU_STATE if platform() == "cpu" else _GPU_STATE
    chunks = max(1, min(target // max(1, planned_batch(batch) * d_inner * d_state), length // (4 * d_state)))
    if chunks > 1:
        chunks = 1 << (chunks.bit_length() - 1)
    steps = math.ceil(length / chunks)
    segment = min(steps, max(2 * d_state, 1 << round(math.log2(max(1.0, math.sqrt(steps))))))
    return _Plan(chunks, math.ceil(steps / segment), segment)


class _Chunked(NamedTuple):
    """Per-step arrays cut into chunks, (batch, chunk, step, features), and A in the layout of the states."""

    x: jax.Array
    dt: jax.Array
    B: jax.Array
    C: jax.Array
    z: jax.Array | None
    A: jax.Array  # (d_state, d_inner)


def _cut(a: jax.Array, plan: _Plan, fill: float = 0.0) -> jax.Array:
    batch, length, features = a.shape
    if plan.length != length:
        a = jnp.pad(a, ((0, 0), (0, plan.length - length), (0, 0)), constant_values=fill)
    return a.reshape(batch, plan.chunks, plan.steps, features)


def _join(a: jax.Array, length: int) -> jax.Array:
    batch, chunks, steps, features = a.shape
    return a.reshape(batch, chunks * steps, features)[:, :length]


def _chunked(inputs: ScanInputs, plan: _Plan, softplus: bool) -> _Chunked:
    """Padding must leave the state alone: delta 0, hence decay 1 and no input."""
    no_step = -jnp.inf if softplus else 0.0
    return _Chunked(
        _cut(inputs.x, plan),
        _cut(inputs.dt, plan, no_step),
        _cut(inputs.B, plan),
        _cut(inputs.C, plan),
        None if inputs.z is None else _cut(inputs.z, plan),
        inputs.A.astype(state_dtype(inputs)).T,
    )


def _at(a: jax.Array, t, dtype) -> jax.Array:
    return lax.dynamic_index_in_dim(a, t, axis=2, keepdims=False).astype(dtype)


def _over_d(a: jax.Array) -> jax.Array:
    """(batch, chunk, d_inner) beside states."""
    return a[:, :, None, :]


def _over_n(a: jax.Array) -> jax.Array:
    """(batch, chunk, d_state) beside states."""
    return a[:, :, :, None]


def _sum_over_d(states: jax.Array, a: jax.Array) -> jax.Array:
    """As a product: XLA's CPU code for a plain sum over the last axis is not vectorised."""
    return jnp.einsum("bknd,bkd->bkn", states, a, precision=lax.Precision.HIGHEST)


def _advance(h, delta, x, B, A):
    return jnp.exp(_over_d(delta) * A) * h + _over_d(delta * x) * _over_n(B)


def _carry_over(decay: jax.Array, from_zero: jax.Array, start: jax.Array, reverse: bool = False) -> jax.Array:
    """True state before each chunk, (batch, chunk, d_state, d_inner), from each chunk's decay and state from zero.

    start (batch, d_state, d_inner) enters the first chunk (the last one, in reverse).
    """
    edge = -1 if reverse else 0
    from_zero = from_zero.at[:, edge].add(decay[:, edge] * start)
    after = lax.associative_scan(combine, (decay, from_zero), axis=1, reverse=reverse)[1]
    if reverse:
        return jnp.concatenate([after[:, 1:], start[:, None]], axis=1)
    return jnp.concatenate([start[:, None], after[:, :-1]], axis=1)


def _forward(inputs: ScanInputs, softplus: bool, keep: bool = True):
    if is_short(inputs):
        return *short_forward(inputs, softplus), None
    plan, inputs, data = _prepare(inputs, softplus)
    dtype = state_dtype(inputs)
    batch, length, d_inner = inputs.x.shape
    start = first_state(inputs).swapaxes(1, 2)

    def delta_at(t):
        return discretise(_at(data.dt, t, dtype), inputs.dt_bias, softplus)[0]

    if plan.chunks == 1:
        starts = start[:, None]
    else:

        def from_zero(t, carry):
            h, total = carry
            delta = delta_at(t)
            return _advance(h, delta, _at(data.x, t, dtype), _at(data.B, t, dtype), data.A), total + delta

        zeros = jnp.zeros((batch, plan.chunks, *data.A.shape), dtype)
        none = jnp.zeros((batch, plan.chunks, d_inner), dtype)
        ends, total = lax.fori_loop(0, plan.steps, from_zero, (zeros, none))
        starts = _carry_over(jnp.exp(_over_d(total) * data.A), ends, start)

    def step(t, carry):
        h, y = carry
        x = _at(data.x, t, dtype)
        h = _advance(h, delta_at(t), x, _at(data.B, t, dtype), data.A)
        out = jnp.sum(h * _over_n(_at(data.C, t, dtype)), axis=2)
        if inputs.D is not None:
            out = out + inputs.D * x
        if data.z is not None:
            out = out * gate(_at(data.z, t, dtype))[0]
        return h, lax.dynamic_update_index_in_dim(y, out.astype(y.dtype), t, axis=2)

    def segment(s, carry):
        h, y, saved = carry
        saved = lax.dynamic_update_index_in_dim(saved, h, s, axis=0)
        # A trip count that is known when compiling spares a GPU a round trip to the host after every step.
        h, y = lax.fori_loop(0, plan.segment, lambda k, carry: step(s * plan.segment + k, carry), (h, y))
        return h, y, saved

    y = jnp.zeros((batch, plan.chunks, plan.steps, d_inner), inputs.x.dtype)
    saved = jnp.zeros((plan.segments, *starts.shape), dtype)
    h, y, saved = lax.fori_loop(0, plan.segments, segment, (starts, y, saved))
    return _join(y, length), h[:, -1].swapaxes(1, 2), saved


def _prepare(inputs: ScanInputs, softplus: bool) -> tuple[_Plan, ScanInputs, _Chunked]:
    """A bias without softplus is folded into dt, since padding could not undo it; as wide as the state, not to be
    rounded to dt's type."""
    batch, length, d_inner = inputs.x.shape
    plan = _plan(batch, length, d_inner, inputs.A.shape[1])
    if not softplus and inputs.dt_bias is not None:
        dt, bias = (a.astype(state_dtype(inputs)) for a in (inputs.dt, inputs.dt_bias))
        inputs = inputs._replace(dt=dt + bias, dt_bias=None)
    return plan, inputs, _chunked(inputs, plan, softplus)


def _backward(
    inputs: ScanInputs, softplus: bool, saved: jax.Array | None, dy: jax.Array, dlast_state: jax.Array
) -> ScanInputs:
    if is_short(inputs):
        return jax.vjp(lambda i: short_forward(i, softplus), inputs)[1]((dy, dlast_state))[0]
    given = inputs
    plan, inputs, data = _prepare(inputs, softplus)
    dtype = state_dtype(inputs)
    batch, length, d_inner = inputs.x.shape
    dy = _cut(dy, plan)
    end = dlast_state.astype(dtype).swapaxes(1, 2)

    def delta_at(t):
        return discretise(_at(data.dt, t, dtype), inputs.dt_bias, softplus)

    def dout_at(t):
        """Gradient of the output before the gate."""
        g = _at(dy, t, dtype)
        return g if data.z is None else g * gate(_at(data.z, t, dtype))[0]

    if plan.chunks == 1:
        ends = end[:, None]
    else:

        def from_zero(i, carry):
            g, total = carry
            t = plan.steps - 1 - i
            delta = delta_at(t)[0]
            g = g + _over_d(dout_at(t)) * _over_n(_at(data.C, t, dtype))
            return jnp.exp(_over_d(delta) * data.A) * g, total + delta

        zeros = jnp.zeros((batch, plan.chunks, *data.A.shape), dtype)
        none = jnp.zeros((batch, plan.chunks, d_inner), dtype)
        firsts, total = lax.fori_loop(0, plan.steps, from_zero, (zeros, none))
        ends = _carry_over(jnp.exp(_over_d(total) * data.A), firsts, end, reverse=True)

    def step(i, carry):
        g, states, sums, by_step, s = carry
        k = plan.segment - 1 - i
        t = s * plan.segment + k
        g, decay, sums, out = _pull_back(inputs, data, t, g, states, k, sums, delta_at, dy)
        by_step = {
            name: lax.dynamic_update_index_in_dim(buffer, out[name].astype(buffer.dtype), t, axis=2)
            for name, buffer in by_step.items()
        }
        return g * decay, states, sums, by_step, s

    def segment(i, carry):
        g, sums, by_step, states = carry
        s = plan.segments - 1 - i
        first = lax.dynamic_index_in_dim(saved, s, axis=0, keepdims=False)
        states = states.at[0].set(first)

        def recompute(k, carry):
            h, states = carry
            t = s * plan.segment + k
            h = _advance(h, delta_at(t)[0], _at(data.x, t, dtype), _at(data.B, t, dtype), data.A)
            return h, lax.dynamic_update_index_in_dim(states, h, k + 1, axis=0)

        _, states = lax.fori_loop(0, plan.segment, recompute, (first, states))
        g, states, sums, by_step, _ = lax.fori_loop(0, plan.segment, step, (g, states, sums, by_step, s))
        return g, sums, by_step, states

    by_step = {name: jnp.zeros_like(getattr(data, name)) for name in ("x", "dt", "B", "C")}
    if data.z is not None:
        by_step["z"] = jnp.zeros_like(data.z)
    none = jnp.zeros((batch, plan.chunks, d_inner), dtype)
    sums = (jnp.zeros((batch, plan.chunks, *data.A.shape), dtype), none, none)
    states = jnp.zeros((plan.segment + 1, *ends.shape), dtype)
    g, (dA, dD, dbias), by_step, _ = lax.fori_loop(0, plan.segments, segment, (ends, sums, by_step, states))
    joined: dict[str, Any] = {name: _join(buffer, length) for name, buffer in by_step.items()}
    if not softplus:  # unlike softplus' slope, 1 does not silence the padding
        dbias = joined["dt"].astype(dtype)
    first = g[:, 0].swapaxes(1, 2)
    dA, dD, dbias = dA.sum((0, 1)).T, dD.sum((0, 1)), dbias.sum((0, 1))
    gradients = ScanInputs(**{"z": None} | joined, A=dA, D=dD, dt_bias=dbias, initial_state=first)
    return cast_gradients(gradients, given)


def _pull_back(inputs: ScanInputs, data: _Chunked, t, g, states, k, sums, delta_at, dy):
    """Step t of the adjoint: itself and its decay, sums of dA, dD and ddt_bias, gradients of the step's inputs."""
    dtype = state_dtype(inputs)
    x, B, C = (_at(a, t, dtype) for a in (data.x, data.B, data.C))
    delta, slope = delta_at(t)
    h_before = lax.dynamic_index_in_dim(states, k, axis=0, keepdims=False)
    h = lax.dynamic_index_in_dim(states, k + 1, axis=0, keepdims=False)
    decay = jnp.exp(_over_d(delta) * data.A)
    dout = _at(dy, t, dtype)
    out = {}
    if data.z is not None:
        silu, dsilu = gate(_at(data.z, t, dtype))
        plain = jnp.sum(h * _over_n(C), axis=2)
        if inputs.D is not None:
            plain = plain + inputs.D * x
        out["z"], dout = dout * plain * dsilu, dout * silu
    g = g + _over_d(dout) * _over_n(C)
    dstate = g * h_before * decay
    du = jnp.sum(g * _over_n(B), axis=2)
    ddt = (jnp.sum(dstate * data.A, axis=2) + du * x) * slope
    dx = du * delta
    out["x"] = dx if inputs.D is None else dx + dout * inputs.D
    out["dt"] = ddt
    out["B"] = _sum_over_d(g, delta * x)
    out["C"] = _sum_over_d(h, dout)
    dA, dD, dbias = sums
    sums = (dA + dstate * _over_d(delta), dD + dout * x, dbias + ddt)
    return g, decay, sums, out


def is_short(inputs: ScanInputs) -> bool:
    """Whether this is the faster way on the device."""
    batch, length, d_inner = inputs.x.shape
    states = planned_batch(batch) * length * d_inner * inputs.A.shape[1]
    return platform() != "cpu" and states <= _FEW_STATES


def short_forward(inputs: ScanInputs, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """(y, last state), by one `associative_scan`."""
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


BACKEND = Backend(_forward, _backward)
