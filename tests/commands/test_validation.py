"""Training patches, validation and inference show the network the same window of a scan that is smaller than it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.commands.validation import ValidationSettings, make_validate
from mambahome_jax.data.loader import read_patch
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.segment import segment
from tests.data.test_loader import make_store

SHAPE, PATCH = (10, 16, 13), (16, 16, 16)


class FindsZerosAround(nnx.Module):
    """Class 1 everywhere where the first and the last plane of the window are zeros, else background."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, windows):
        padded = (windows[:, 0] == 0).all((1, 2, 3)) & (windows[:, -1] == 0).all((1, 2, 3))
        found = jnp.broadcast_to(padded[:, None, None, None], windows.shape[:4]).astype(jnp.float32)
        return jnp.stack([1 - found, found], -1) * self.weight[...]


def test_small_scans_are_padded_alike_in_training_validation_and_inference(tmp_path):
    model = FindsZerosAround()
    store = make_store(tmp_path, [SHAPE], label=lambda shape: np.ones(shape, np.uint8))
    patch, _ = read_patch(store, "c0", (5, 8, 6), PATCH)
    assert jnp.argmax(model(jnp.asarray(patch)[None]), -1).all()

    graphdef, params = nnx.split(model)
    settings = ValidationSettings(("c0",), {1: "all"}, PATCH, 0.5)
    result = make_validate(graphdef, store, settings, jax.devices()[0])(params, lambda: False)
    assert result.dice == 1

    scan = Volume(store.read_image("c0")[..., 0], np.eye(4))
    assert segment(model, scan, spacing=(0, 0, 0), orientation="RAS", modality="mr", roi_size=PATCH).array.all()
