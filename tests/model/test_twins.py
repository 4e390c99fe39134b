"""Twins of MambaHoME: each part computes what it says, trains, comes back from disk, and is refused elsewhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import mambahome_jax as mh
from mambahome_jax.config import MODEL_SIZES, DataProperties, SegMambaConfig, network_from_json
from mambahome_jax.flags import TrainConfig
from mambahome_jax.model.home import Experts, FeedForward
from mambahome_jax.model.layers import DepthwiseConv3d
from mambahome_jax.model.mamba import GatedConv
from mambahome_jax.model.network import MambaHoME, MambaHoMEBlock
from mambahome_jax.training.pretrained import transfer
from mambahome_jax.training.setup import model_config
from mambahome_jax.weights.weights import Weights, _leaves, dotted, flat_params, read_weights, write_weights

TINY = MODEL_SIZES["MambaHoME_tiny"].model.replace(out_chans=3, feat_size=(4, 4, 6, 6), hidden_size=8)
TWIN = TINY.replace(mixer="conv", experts="ffn")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def block(mixer, experts):
    config = TINY.replace(mixer=mixer, experts=experts, group_list=(32,) * 4)
    return MambaHoMEBlock(config, 0, rngs=nnx.Rngs(0))


def paths(tree):
    return {dotted(path) for path in _leaves(tree)}


def saved(folder, config):
    params = flat_params(MambaHoME(config, rngs=nnx.Rngs(0)))
    write_weights(folder, Weights(params, config, None))
    return params


@pytest.mark.parametrize("size", [3, (3, 1, 3), 1])
def test_the_convolution_is_that_of_each_channel(size):
    layer, x = DepthwiseConv3d(5, size, rngs=nnx.Rngs(0)), normal(2, 4, 6, 7, 5)
    kernel = layer.kernel[...][..., None, :]
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    expected = lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=numbers, feature_group_count=5, precision="highest"
    )
    np.testing.assert_allclose(layer(x), expected + layer.bias[...], atol=2e-6)
    half = layer(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), layer(x), atol=0.05)


def test_the_mixer_without_a_scan_sees_neighbours_alone():
    layer, x = GatedConv(4, rngs=nnx.Rngs(0)), normal(1, 6, 6, 6, 4)
    moved = np.abs(layer(x.at[0, 2, 3, 3].add(1.0)) - layer(x))[0].max(-1)
    assert {*np.flatnonzero(moved.max((1, 2)))} == {1, 2, 3} and moved[2, 3, 3] == moved.max()
    x, z = jnp.split(layer.in_proj(x), 2, -1)
    np.testing.assert_allclose(layer(normal(1, 6, 6, 6, 4)), layer.out_proj(nnx.silu(layer.conv(x)) * nnx.silu(z)))


def test_the_feed_forward_network_is_one_expert_for_every_token():
    layer, tokens = FeedForward(6, 2, rngs=nnx.Rngs(0)), normal(2, 9, 6)
    expert = Experts(1, 6, 2, rngs=nnx.Rngs(0))
    for batch, token in np.ndindex(2, 9):
        np.testing.assert_allclose(layer(tokens)[batch, token], expert(tokens[batch, token][None, None])[0, 0], 1e-5)


def test_the_first_level_alone_hands_its_experts_outputs_back():
    tokens = normal(1, 20, 6)
    level1 = mh.HoME(6, rngs=nnx.Rngs(0), group_size=8, num_experts=2, slots_per_expert=1, num_experts_second=None)
    both = mh.HoME(6, rngs=nnx.Rngs(0), group_size=8, num_experts=2, slots_per_expert=1, num_experts_second=2)
    both.second = lambda slots: slots
    np.testing.assert_array_equal(level1(tokens), both(tokens))
    assert paths(level1) == {
        *(f"experts.{name}_{way}" for name in ("kernel", "bias") for way in ("in", "out")),
        *("norm.gamma", "slot_norm.gamma", "slot_proj.kernel"),
    }


@pytest.mark.parametrize(
    ("mixer", "experts", "layers"),
    [
        ("conv", "home", {"mamba_norm", "conv", "home_norm", "home"}),
        ("none", "level1", {"home_norm", "home"}),
        ("scan", "ffn", {"mamba_norm", "mamba", "home_norm", "ffn"}),
        ("none", "ffn", {"home_norm", "ffn"}),
    ],
)
def test_every_parameter_of_a_twins_block_is_trained(mixer, experts, layers):
    graphdef, state = nnx.split(block(mixer, experts))
    assert {path.split(".")[0] for path in paths(state)} == layers
    x, weight = normal(1, 4, 4, 4, 4), normal(4, 4, 4, 4, 1)[..., 0]
    gradients = jax.grad(lambda state: (nnx.merge(graphdef, state)(x)[0] * weight).sum())(state)
    gates = {"home.expert_gates", "home.group_gate.kernel", "home.group_gate.bias"}  # no effect, as published
    for path, leaf in _leaves(gradients).items():
        assert dotted(path) in gates or np.abs(leaf).max() > 0, path


def test_the_default_is_the_published_network():
    assert (TINY.mixer, TINY.experts, TINY.twin) == ("scan", "home", "") and SegMambaConfig().twin == ""
    assert TWIN.twin == "mixer conv, experts ffn" and network_from_json(TWIN.to_json()) == TWIN
    earlier = {name: value for name, value in TINY.to_json().items() if name not in ("mixer", "experts")}
    assert network_from_json(earlier) == TINY
    with pytest.raises(mh.ConfigError, match="mixer is 'attention'; expected one of scan, conv, none"):
        TINY.replace(mixer="attention")


def test_a_twin_comes_back_from_its_checkpoint(tmp_path):
    params = saved(tmp_path / "twin", TWIN)
    model = mh.load_model(tmp_path / "twin")
    assert model.config == TWIN
    for path, leaf in _leaves(model).items():
        np.testing.assert_array_equal(leaf, params[dotted(path)])
    logits = jax.jit(model)(normal(1, 32, 16, 16, 1))
    assert logits.shape == (1, 32, 16, 16, 3) and np.isfinite(logits).all()


def test_published_names_and_weights_are_refused(tmp_path):
    saved(tmp_path / "twin", TWIN)
    for suffix in (".pth", ".npz", ".safetensors"):
        with pytest.raises(mh.ConfigError, match=rf"w{suffix}: mixer conv, experts ffn: only the published network"):
            write_weights(tmp_path / f"w{suffix}", read_weights(tmp_path / "twin"))
    with pytest.raises(mh.ConfigError, match="only the published network"):
        mh.export_official(mh.load_model(tmp_path / "twin"))
    saved(tmp_path / "w.npz", TINY)
    with np.load(tmp_path / "w.npz") as archive:
        np.savez(tmp_path / "bare.npz", **{name: archive[name] for name in archive.files if name != "config_json"})
    (tmp_path / "bare.json").write_text(json.dumps({"mixer": "none"}))
    with pytest.raises(mh.CheckpointError, match=r"bare.json: .*mixer none: only the published network"):
        mh.load_model(tmp_path / "bare.npz")
    with pytest.raises(mh.CheckpointError, match="mixer is scan, expected conv; experts is home, expected ffn"):
        transfer(read_weights(tmp_path / "w.npz"), {}, TWIN, DataProperties(), "w.npz")


def test_flags_choose_a_twin_of_a_network_that_has_one(tmp_path):
    flags = {"model": "MambaHoME_tiny", "mixer": "none", "experts": "level1"}
    assert model_config(TrainConfig(tmp_path, **flags), 1, 3).twin == "mixer none, experts level1"
    with pytest.raises(mh.ConfigError, match=r"this network has no experts\. Leave --experts out"):
        model_config(TrainConfig(tmp_path, model="SegMamba", experts="ffn"), 1, 3)
