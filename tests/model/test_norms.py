"""The fused norm and activation against plain formulas and autodiff, and what the GPU's policy computes again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.model.layers import Numerics, remat
from mambahome_jax.model.network import ResidualBlock, UpBlock
from mambahome_jax.model.norms import INSTANCE_NORM_EPS, norm_act


def _plain(inputs, plus, slope):
    def norm(x):
        centred = x - x.mean((1, 2, 3), keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean((1, 2, 3), keepdims=True) + INSTANCE_NORM_EPS)

    total = sum(norm(x) for x in inputs)
    total = total if plus is None else total + plus
    return jnp.where(total > 0, total, slope * total)


def _random(count, offset, dtype=np.float64):
    rng = np.random.default_rng(1)
    arrays = (rng.normal(size=(2, 4, 5, 6, 3)) * [1, 5, 0.1] + offset for _ in range(count))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def _values_and_gradients(function, inputs, plus, slope):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=inputs[0].shape))

    def loss(inputs, plus):
        y = function(inputs, plus, slope)
        return jnp.sum(y * weights), y

    wanted = (0, 1) if plus is not None else 0
    gradients, y = jax.jit(jax.grad(loss, wanted, has_aux=True))(inputs, plus)
    return y, gradients


def _fused(inputs, plus, slope):
    return norm_act(inputs, plus, slope=slope)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(("count", "added"), [(1, False), (1, True), (2, False)])
def test_values_and_gradients_in_float64(count, added, slope, x64):
    *inputs, extra = _random(count + 1, 30.0)
    plus = extra - 30 if added else None
    expected = _values_and_gradients(_plain, tuple(inputs), plus, slope)
    got = _values_and_gradients(_fused, tuple(inputs), plus, slope)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), got, expected)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_far_from_zero(backend, offset, monkeypatch):
    """As on a GPU too, where it is summed in float32: the mean of an input does not drown its variance."""
    inputs = _random(2, offset, np.float32)
    with jax.enable_x64(True):
        expected = _values_and_gradients(_plain, tuple(x.astype(jnp.float64) for x in inputs), None, 0.01)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    got = _values_and_gradients(_fused, inputs, None, 0.01)
    bound = 1e-5 if backend == "cpu" or not offset else 2e-3  # of a spread of 0.1 at 100, float32 itself loses that
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b) < bound


def test_bfloat16_has_float32_statistics():
    inputs = _random(1, 3.0, jnp.bfloat16)
    y, (gradient,) = _values_and_gradients(_fused, inputs, None, 0.01)
    exact, _ = _values_and_gradients(_plain, tuple(x.astype(jnp.float32) for x in inputs), None, 0.01)
    assert (y.dtype, gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def _gradients(block, arrays, backend, monkeypatch):
    graphdef, state = nnx.split(block)

    def loss(state, *arrays):
        return jnp.sum(jnp.sin(remat(False, nnx.merge(graphdef, state), *arrays)))

    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        gradients = jax.grad(loss, tuple(range(1 + len(arrays))))
        jaxpr = str(jax.make_jaxpr(gradients)(state, *arrays))
        return jaxpr.count("conv_general_dilated["), gradients(state, *arrays)


@pytest.mark.parametrize("block", [ResidualBlock, UpBlock])
def test_a_gpu_computes_again_all_but_convolutions(block, monkeypatch, x64):
    """And adds up the convolutions of joined channels: the same gradients, with no 3-D convolution run twice."""
    made = block(4, 6, rngs=nnx.Rngs(0), numerics=Numerics(jnp.float64))
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(rng.normal(size=(1, 4, 4, 4, 4)))]
    if block is UpBlock:
        arrays.append(jnp.asarray(rng.normal(size=(1, 8, 8, 8, 6))))
    _, expected = _gradients(made, arrays, "cpu", monkeypatch)
    convolutions, got = _gradients(made, arrays, "gpu", monkeypatch)
    # Each of the block's 3 x 3 x 3 convolutions, of one part or two: forward, and the gradients of input and kernel.
    assert convolutions == 3 * (2 if block is ResidualBlock else 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), got, expected)
