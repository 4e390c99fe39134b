"""Starting from published weights with other classes and channels: what is taken over, and what is said of it."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from mambahome_jax.commands import train as command
from mambahome_jax.config import MODEL_SIZES, DataProperties, ModelSize
from mambahome_jax.errors import CheckpointError
from mambahome_jax.model.network import MambaHoME
from mambahome_jax.training import train as training
from mambahome_jax.training.pretrained import transfer
from mambahome_jax.weights.weights import read_weights
from tests.commands.test_train import _config, _dataset
from tests.conftest import golden_path

DATA = DataProperties(labels=((1, "box"), (2, "ball")))


@pytest.fixture(scope="module")
def weights():
    return read_weights(golden_path("mambahome_tiny.pth"))


def _fresh(config):
    """Parameters of the network, all of them 7, without initialising one."""
    _, state = nnx.split(nnx.eval_shape(lambda: MambaHoME(config, rngs=nnx.Rngs(0))))
    return nnx.to_pure_dict(nnx.map(lambda _, leaf: np.full(leaf.shape, 7, leaf.dtype), state))


def test_the_same_network_is_taken_over_as_a_whole(weights):
    params, found = transfer(weights, _fresh(weights.config), weights.config, DATA, "w.pth")
    assert (len(found.loaded), found.reinitialised, found.left) == (len(weights.params), (), ())
    np.testing.assert_array_equal(params["decoder"]["out"]["kernel"], weights.params["decoder.out.kernel"])


def test_other_classes_keep_everything_but_the_output_layer(weights):
    config = weights.config.replace(out_chans=5)
    params, found = transfer(weights, _fresh(config), config, DATA, "w.pth")
    out = ("decoder.out.bias", "decoder.out.kernel")
    assert tuple(sorted(found.reinitialised)) == tuple(sorted(found.left)) == out
    assert (params["decoder"]["out"]["kernel"] == 7).all() and params["decoder"]["out"]["kernel"].shape[-1] == 5
    name = "encoder.stages.2.blocks.1.mamba.A_log"
    np.testing.assert_array_equal(params["encoder"]["stages"][2]["blocks"][1]["mamba"]["A_log"], weights.params[name])
    assert f"{len(weights.params) - 2} parameters loaded, re-initialised: decoder.out." in str(found)


def test_the_same_number_of_other_structures_is_another_output_layer(weights):
    for labels, anew in ((((1, "liver"), (2, "spleen")), 2), (DATA.labels, 0), ((), 0)):
        named = weights._replace(data=dataclasses.replace(DATA, labels=labels))
        _, found = transfer(named, _fresh(weights.config), weights.config, DATA, "w.pth")
        assert len(found.reinitialised) == anew


def test_another_number_of_channels_starts_the_first_convolutions_anew(weights):
    config = weights.config.replace(in_chans=2)
    params, found = transfer(weights, _fresh(config), config, DATA, "w.pth")
    assert sorted(found.reinitialised) == [
        "decoder.skips.0.conv1.kernel",
        "decoder.skips.0.conv3.kernel",
        "encoder.stages.0.downsample.bias",
        "encoder.stages.0.downsample.kernel",
    ]
    second = params["decoder"]["skips"][0]["conv2"]["kernel"]
    np.testing.assert_array_equal(second, weights.params["decoder.skips.0.conv2.kernel"])


def test_another_network_is_refused_field_by_field(weights):
    config = weights.config.replace(hidden_size=64, expert_mult=4)
    with pytest.raises(CheckpointError, match=r"hidden_size is 48, expected 64; expert_mult is 2, expected 4"):
        transfer(weights, _fresh(config), config, DATA, "w.pth")


def test_a_run_starts_from_published_weights_and_says_what_it_took(tmp_path, monkeypatch, capsys, weights):
    size = MODEL_SIZES["MambaHoME_tiny"]
    monkeypatch.setitem(
        MODEL_SIZES,
        "MambaHoME_tiny",
        ModelSize(weights.config, size.lr, size.eps, size.strong_lr, patch_size=(32, 16, 16)),
    )
    # Training itself is tested elsewhere; this network takes long to compile.
    monkeypatch.setattr(training, "compiled_step", lambda *_: (None, {}))
    monkeypatch.setattr(training, "train", lambda state, *_: started.append(state))
    monkeypatch.setattr(training, "score_held_out", lambda *_: None)
    started: list[training.TrainState] = []
    path = str(golden_path("mambahome_tiny.pth"))
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", use_pretrained=path, freeze_encoder=True)
    assert command.run(config) == 0
    assert "re-initialised: decoder.out.bias, decoder.out.kernel; left out:" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "run.json").read_text())["pretrained"]
    assert found["path"] == path and "encoder.stages.0.gsc.proj.kernel" in found["loaded"]
    kernel = started[0].params["encoder"]["stages"][0]["gsc"]["proj"]["kernel"]
    np.testing.assert_array_equal(kernel, weights.params["encoder.stages.0.gsc.proj.kernel"])
    assert started[0].params["decoder"]["out"]["kernel"].shape[-1] == 2
