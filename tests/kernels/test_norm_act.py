"""Norm and activation, every backend against plain formulas and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mambahome_kernels import norm_act
from mambahome_kernels.norm_act.api import BACKENDS, EPS
from mambahome_kernels.shapes import NORM_ACT


def _plain(inputs, plus, slope, affine=()):
    def norm(x):
        centred = x - x.mean((1, 2, 3), keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean((1, 2, 3), keepdims=True) + EPS)

    scales, shifts = zip(*affine, strict=True) if affine else ([1] * len(inputs), [0] * len(inputs))
    total = sum(norm(x) * scale + shift for x, scale, shift in zip(inputs, scales, shifts, strict=True))
    total = total if plus is None else total + plus
    return jnp.where(total > 0, total, slope * total)


def _random(count, offset, dtype=np.float64):
    rng = np.random.default_rng(1)
    arrays = (rng.normal(size=NORM_ACT["ragged"]) * [1, 5, 0.1] + offset for _ in range(count))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def _values_and_gradients(function, inputs, plus, slope):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=inputs[0].shape))

    def loss(inputs, plus):
        y = function(inputs, plus, slope)
        return jnp.sum(y * weights), y

    wanted = (0, 1) if plus is not None else 0
    gradients, y = jax.jit(jax.grad(loss, wanted, has_aux=True))(inputs, plus)
    return y, gradients


def _by(backend):
    return lambda inputs, plus, slope: norm_act(inputs, plus, slope=slope, backend=backend)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(("count", "added"), [(1, False), (1, True), (2, False)])
def test_values_and_gradients_in_float64(count, added, slope, backend, x64):
    *inputs, extra = _random(count + 1, 30.0)
    plus = extra - 30 if added else None
    expected = _values_and_gradients(_plain, tuple(inputs), plus, slope)
    got = _values_and_gradients(_by(backend), tuple(inputs), plus, slope)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_far_from_zero(backend, offset, monkeypatch):
    """As on a GPU too, where it is summed in float32: the mean of an input does not drown its variance."""
    inputs = _random(2, offset, np.float32)
    with jax.enable_x64(True):
        expected = _values_and_gradients(_plain, tuple(x.astype(jnp.float64) for x in inputs), None, 0.01)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    got = _values_and_gradients(_by(None), inputs, None, 0.01)
    bound = 1e-5 if backend == "cpu" or not offset else 2e-3  # of a spread of 0.1 at 100, float32 itself loses that
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b) < bound


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_bfloat16_has_float32_statistics(backend):
    inputs = _random(1, 3.0, jnp.bfloat16)
    y, (gradient,) = _values_and_gradients(_by(backend), inputs, None, 0.01)
    exact, _ = _values_and_gradients(_plain, tuple(x.astype(jnp.float32) for x in inputs), None, 0.01)
    assert (y.dtype, gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(("count", "added"), [(1, True), (2, False)])
def test_scale_and_shift_of_each_norm(count, added, backend, x64):
    *inputs, extra = _random(count + 1, 30.0)
    rng = np.random.default_rng(3)
    affine = tuple(tuple(jnp.asarray(rng.normal(size=3)) for _ in range(2)) for _ in inputs)

    def values_and_gradients(function):
        def loss(inputs, plus, affine):
            y = function(inputs, plus, affine)
            return jnp.sum(jnp.sin(y)), y

        plus = extra - 30 if added else None
        wanted = (0, 1, 2) if added else (0, 2)
        return jax.jit(jax.grad(loss, wanted, has_aux=True))(tuple(inputs), plus, affine)

    expected = values_and_gradients(lambda inputs, plus, affine: _plain(inputs, plus, 0.01, affine))
    got = values_and_gradients(lambda *arguments: norm_act(*arguments, slope=0.01, backend=backend))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)
    with pytest.raises(ValueError, match="affine has 1 entries for 3 inputs; expected one each"):
        norm_act((extra,) * 3, affine=affine[:1], slope=0.01, backend=backend)


def test_an_unknown_backend_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="expected one of reference, xla"):
        norm_act(_random(1, 0.0, np.float32), slope=0.0, backend="cudnn")
