"""Training of SegMamba: its slices follow the patch, travel with its checkpoints, and weights start only their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import CheckpointError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.model.layers import ChannelDropout
from mambahome_jax.training.checkpoints import checkpoint_settings
from mambahome_jax.training.losses import DeepSupervision
from mambahome_jax.training.pretrained import transfer
from mambahome_jax.training.setup import make_setup
from mambahome_jax.training.train import build_networks
from mambahome_jax.weights.checkpoint import write_checkpoint
from mambahome_jax.weights.weights import read_weights
from tests.commands.test_train import _dataset


def setup_for(tmp_path, **flags):
    if not (tmp_path / "data").exists():
        _dataset(tmp_path / "data")
    prepared = read_prepared(tmp_path / "data")
    flags = {"model": "SegMamba", "feature_size": 4, "steps": 1} | flags
    return make_setup(TrainConfig(prepared.root, **flags), prepared, None, devices=1)


@pytest.mark.parametrize(
    ("patch", "slices"),
    [((128, 128, 128), (64, 32, 16, 8)), ((64, 64, 32), (64, 32, 16, 8)), ((48, 48, 48), (24, 12, 6, 3))],
)
def test_the_published_slices_where_they_divide_the_patch(patch, slices, tmp_path):
    model = setup_for(tmp_path, patch_size=patch).model
    assert (model.num_slices, model.feat_size, model.hidden_size) == (slices, (4, 8, 16, 32), 64)
    model.check_size(patch)


def test_a_checkpoint_says_which_network_it_is_of(tmp_path):
    setup = setup_for(tmp_path, patch_size=(48, 48, 48))
    graphdef, _, params, _ = build_networks(setup, new=True)
    write_checkpoint(tmp_path / "best", params, checkpoint_settings(setup))
    model = mh.load_model(tmp_path / "best")
    assert isinstance(model, mh.SegMamba) and model.config == setup.model
    assert model.config.num_slices == (24, 12, 6, 3) and model.metadata.patch_size == (48, 48, 48)
    ours, theirs = mh.export_official(model), mh.export_official(nnx.merge(graphdef, params))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_weights_start_a_training_of_their_own_network(tmp_path):
    setup = setup_for(tmp_path, patch_size=(48, 48, 48))
    _, _, params, _ = build_networks(setup, new=True)
    write_checkpoint(tmp_path / "best", params, checkpoint_settings(setup))
    _, _, started, found = build_networks(
        setup_for(tmp_path, patch_size=(64, 64, 64), seed=1, use_pretrained=str(tmp_path / "best")), new=True
    )
    np.testing.assert_array_equal(started["decoder"]["out"]["kernel"], params["decoder"]["out"]["kernel"])
    assert "291 parameters loaded" in str(found)
    assert str(found).endswith("num_slices was 24 12 6 3, is 64 32 16 8")
    other = mh.MODEL_SIZES["MambaHoME_tiny"].model
    with pytest.raises(CheckpointError, match=r"best is a SegMamba, expected a MambaHoME\. Choose --model"):
        transfer(read_weights(tmp_path / "best"), {}, other, DataProperties(), "best")


def test_it_is_supervised_at_coarser_levels_and_drops_channels():
    def logits(x):
        network = DeepSupervision(mh.SegMamba(1, 3, rngs=nnx.Rngs(0), feat_size=(4, 8, 16, 32)), rngs=nnx.Rngs(1))
        return network(x, ChannelDropout(jax.random.key(0), 0.1))

    shapes = [level.shape for level in jax.eval_shape(logits, jnp.zeros((1, 64, 32, 32, 1)))]
    assert shapes == [(1, 64, 32, 32, 3), (1, 32, 16, 16, 3), (1, 16, 8, 8, 3)]


def test_other_channels_start_the_first_convolutions_anew(tmp_path):
    setup = setup_for(tmp_path)
    _, _, params, _ = build_networks(setup, new=True)
    write_checkpoint(tmp_path / "best", params, checkpoint_settings(setup))
    weights = read_weights(tmp_path / "best")
    _, found = transfer(weights, params, setup.model.replace(in_chans=2), setup.properties, "best")
    assert {"encoder.levels.0.stage.downsample.kernel", "decoder.skips.0.conv1.kernel"} < {*found.reinitialised}
