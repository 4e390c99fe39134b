"""From the download to the scores, for a dataset of two modalities and for one of which structures are merged.

With a small network: the real one goes through these commands in tests/commands/test_demo.py.
"""

import pytest
from flax import nnx

from mambahome_jax.config import DataProperties, ModelConfig
from mambahome_jax.inference import batch
from mambahome_jax.training import train as training
from mambahome_jax.weights.checkpoint import read_checkpoint_config, read_checkpoint_params
from tests.datasets.all_layouts import end_to_end
from tests.training.stand_in import SmallNet


class Small(SmallNet):
    def __init__(self, config, *, metadata, rngs=None, precision=None):
        super().__init__(config.out_chans)
        self.config, self.metadata = config, nnx.static(metadata)


def load_small(path, precision=None):
    saved = read_checkpoint_config(path)
    model = Small(ModelConfig(**saved["model"]), metadata=DataProperties.from_json(saved["data"]))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, read_checkpoint_params(path))
    nnx.update(model, state)
    return model


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(training, "make_network", Small)
    monkeypatch.setattr(batch, "load_model", load_small)


def test_amos(tmp_path):
    assert end_to_end("amos", tmp_path)["8"] == "aorta"


def test_panorama_merged(tmp_path):
    (tmp_path / "map.toml").write_text("PDAC = [1]\npancreas = [4, 5]\n")
    labels = end_to_end("panorama", tmp_path, "--label_map", str(tmp_path / "map.toml"))
    assert labels == {"1": "PDAC", "2": "pancreas"}
