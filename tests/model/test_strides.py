"""Strides and kernel sizes of each axis: the published ones change no bit, others train and come back from disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.config import MODEL_SIZES, ModelConfig
from mambahome_jax.errors import ConfigError
from mambahome_jax.model.network import MambaHoME
from mambahome_jax.preprocessing.grids import grids_for, patch_and_grids
from mambahome_jax.training.losses import DeepSupervision, at_all_levels, dice_ce
from mambahome_jax.weights.weights import Weights, export_official, flat_params, read_weights, write_weights

TINY = MODEL_SIZES["MambaHoME_tiny"].model.replace(out_chans=3)
THICK = grids_for((1.5, 1.5, 10), (64, 64, 10))
THICK_TINY = TINY.replace(strides=THICK.strides, kernel_sizes=THICK.kernel_sizes)


def test_published_grids_are_the_default_and_change_no_bit():
    named = dataclasses.replace(TINY, strides=[[2, 2, 2]] * 4, kernel_sizes=[[3, 3, 3]] * 5)
    assert named == TINY and hash(named) == hash(TINY) and TINY.multiples == (16, 16, 16)
    models = [MambaHoME(config, rngs=nnx.Rngs(0)) for config in (TINY, named)]
    for name, value in flat_params(models[0]).items():
        assert np.array_equal(value, flat_params(models[1])[name]), name


def test_thick_slices_train_and_come_back_from_disk(tmp_path):
    assert THICK_TINY.multiples == (16, 16, 2)
    model = MambaHoME(THICK_TINY, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(DeepSupervision(model, rngs=nnx.Rngs(1)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 10, 1)), jnp.float32)
    labels = (x[..., 0] > 0).astype(jnp.int32)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda s: at_all_levels(dice_ce)(nnx.merge(graphdef, s)(x), labels))(state)
        return loss, jax.tree.map(lambda p, g: p - 1e-2 * g, state, grads)

    outputs = jax.eval_shape(lambda s: nnx.merge(graphdef, s)(x), state)
    assert [y.shape[1:4] for y in outputs] == [(64, 64, 10), (32, 32, 10), (16, 16, 10)]
    first, state = step(state)
    second, _ = step(state)
    assert np.isfinite(first) and second < first
    weights = Weights(flat_params(model), THICK_TINY, None)
    for suffix in (".npz", ".pth", ".safetensors", ""):
        write_weights(tmp_path / f"w{suffix}", weights)
        back = read_weights(tmp_path / f"w{suffix}")
        assert back.config == THICK_TINY
        assert all(np.array_equal(back.params[name], value) for name, value in weights.params.items())
    # Shapes alone say it.
    np.savez(tmp_path / "bare.npz", **export_official(model))
    assert read_weights(tmp_path / "bare.npz").config == THICK_TINY


def test_what_cannot_be():
    for strides in ([[2, 2, 3]] * 4, [[2, 2, 2]] * 3, [[2, 2]] * 4, "2222", None):
        with pytest.raises(ConfigError, match="strides is"):
            ModelConfig(strides=strides)
    with pytest.raises(ConfigError, match="which 2 does not divide"):
        MambaHoME(THICK_TINY, rngs=nnx.Rngs(0))(jnp.zeros((1, 64, 64, 9, 1)))


@pytest.mark.parametrize(
    ("shape", "spacing", "patch", "strides"),
    [
        ((36, 50, 35), (1, 1, 1), (48, 64, 48), "222 222 222 222"),
        ((190, 142, 88), (0.625, 0.625, 0.625), (160, 144, 96), "222 222 222 222"),
        ((256, 216, 10), (1.5, 1.5, 10), (256, 224, 10), "221 221 222 221"),
        ((512, 512, 100), (0.7, 0.7, 5), (240, 240, 36), "221 221 222 222"),
        ((240, 240, 155), (1, 1, 1), (128, 128, 128), "222 222 222 222"),
        ((320, 320, 20), (0.6, 0.6, 3.6), (320, 320, 20), "221 221 222 222"),
        ((512, 512, 93), (0.8, 0.8, 2.5), (192, 192, 64), "221 222 222 222"),
    ],
)
def test_grids_of_known_datasets(shape, spacing, patch, strides):
    found = patch_and_grids(spacing, shape)
    assert found.patch_size == patch
    assert " ".join("".join(map(str, stride)) for stride in found.strides) == strides
