"""What the GPU's policy computes again in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.model.layers import Numerics, remat
from mambahome_jax.model.network import ResidualBlock, UpBlock


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
