"""What the constructor and the input check promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import MODEL_SIZES

TINY = MODEL_SIZES["MambaHoME_tiny"].model


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 32, 40, 32, 1), "height is 40.*Pad or crop height to 32 or 48"),
        ((1, 32, 32, 8, 1), "width is 8.*width to 16"),
        ((1, 16, 16, 16, 1), "one voxel at the deepest stage"),
        ((1, 32, 32, 32, 2), "has 2 channels.*takes 1"),
        ((0, 32, 32, 32, 1), "expected .batch, depth, height, width, channels"),
        ((32, 32, 32, 1), "expected .batch, depth, height, width, channels"),
    ],
)
def test_input_that_cannot_work(shape, match):
    model = nnx.eval_shape(lambda: mh.MambaHoME(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(mh.ConfigError, match=match):
        model(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([[1.0]], "the input is a list; expected an array of JAX or NumPy"),
        (np.zeros((1, 32, 32, 32, 1), complex), "dtype complex128; expected real numbers"),
        (np.zeros((1, 32, 32, 32, 1), str), "dtype <U1; expected real numbers"),
    ],
)
def test_input_that_is_no_array_of_numbers(value, match):
    model = nnx.eval_shape(lambda: mh.MambaHoME(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(mh.ConfigError, match=match):
        model(value)


def test_a_network_of_a_size_by_its_long_and_its_short_name():
    def config(size, **options):
        return nnx.eval_shape(lambda: mh.MambaHoME.of_size(size, 2, 3, **options)).config

    assert config("tiny") == config("MambaHoME_tiny") == TINY.replace(in_chans=2, out_chans=3)
    with pytest.raises(mh.ConfigError, match="size is 'huge'; expected one of MambaHoME, MambaHoME_small"):
        mh.MambaHoME.of_size("huge")
    with pytest.raises(mh.ConfigError, match="precision is 'half'; expected fp32, tf32, bf16"):
        config("tiny", precision="half")
    with pytest.raises(mh.ConfigError, match=r"rngs is a int; expected nnx.Rngs\(seed\)"):
        config("tiny", rngs=0)


def test_any_multiple_of_16():
    model = nnx.eval_shape(lambda: mh.MambaHoME(TINY.replace(in_chans=2, out_chans=5), rngs=nnx.Rngs(0)))
    logits = nnx.eval_shape(lambda model, x: model(x), model, jax.ShapeDtypeStruct((2, 16, 48, 80, 2), jnp.float32))
    assert logits.shape == (2, 16, 48, 80, 5)
    assert logits.dtype == jnp.float32


def test_initial_values():
    model = mh.MambaHoME(TINY, rngs=nnx.Rngs(3))
    again = mh.MambaHoME(TINY, rngs=nnx.Rngs(3))
    other = mh.MambaHoME(TINY, rngs=nnx.Rngs(4))
    block = model.encoder.stages[1].blocks[0]
    np.testing.assert_allclose(block.mamba.A_log[...], np.tile(np.log(np.arange(1, 17)), (32, 1)), rtol=1e-6)
    np.testing.assert_array_equal(block.mamba.D[...], 1)
    step = np.log1p(np.exp(np.asarray(block.mamba.dt_bias[...], np.float64)))
    assert 0.00099 < step.min() < step.max() < 0.101
    assert float(block.home_norm.alpha[0]) == 0.5
    np.testing.assert_array_equal(block.home.expert_gates[...], 1)
    kernel = np.asarray(model.decoder.skips[1].conv1.kernel[...])
    bound = 1 / np.sqrt(27 * TINY.feat_size[0])
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.mean()) < 0.05 * bound
    np.testing.assert_array_equal(again.decoder.out.kernel[...], model.decoder.out.kernel[...])
    assert (np.asarray(other.decoder.out.kernel[...]) != np.asarray(model.decoder.out.kernel[...])).any()


def test_initial_values_are_the_same_when_traced():
    """The constructor under jit, as sharded initialisation runs it."""
    eager = nnx.state(mh.MambaHoME(TINY, rngs=nnx.Rngs(3)))
    traced = jax.jit(lambda: nnx.state(mh.MambaHoME(TINY, rngs=nnx.Rngs(3))))()
    jax.tree.map(np.testing.assert_array_equal, traced, eager)
