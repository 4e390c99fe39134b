"""Training patches, validation and inference show the network the same window of a scan that is smaller than it."""

import dataclasses
from concurrent.futures import Future, wait

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.evaluation.metrics import dice
from mambahome_jax.imaging.normalisation import ZScore, normalisations
from mambahome_jax.imaging.pictures import render
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.segment import segment
from mambahome_jax.patches.loader import read_patch
from mambahome_jax.training.distributed import device_put_tree, make_mesh, replicated
from mambahome_jax.training.validation import ValidationSettings, compile_ahead, make_validate
from tests.patches.test_loader import make_store

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


def test_a_network_compiled_ahead_is_not_compiled_again(tmp_path, caplog):
    store = make_store(tmp_path, [SHAPE, SHAPE], label=lambda shape: np.ones(shape, np.uint8))
    graphdef, params = nnx.split(FindsZerosAround())
    settings, device = ValidationSettings(("c0", "c1"), {1: "all"}, PATCH, 0.5, sw_batch_size=3), jax.devices()[0]
    params = device_put_tree(params, jax.tree.map(lambda _: replicated(make_mesh([device])), params))  # as in training
    step = Future()
    ahead = compile_ahead(graphdef, params, 1, settings, device, after=step)
    assert not wait([ahead], timeout=0.1).done
    step.set_result(None)
    ahead.result()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert make_validate(graphdef, store, settings, device, ahead)(params, lambda: False).dice == 1
        assert "_logits" not in caplog.text
        other = dataclasses.replace(settings, sw_batch_size=1)
        assert make_validate(graphdef, store, other, device)(params, lambda: False).dice == 1
        assert "_logits" in caplog.text  # what jax says, so that the line above can fail


class Thresholds(nnx.Module):
    """Class 1 above 0.5, class 2 above 1.5."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, windows):
        x = windows[..., 0] * self.weight[...]
        return jnp.stack([0 * x, x - 0.5, 2 * x - 2], -1)


def _validate(model, store, cases, labels, values=None):
    graphdef, params = nnx.split(model)
    settings = ValidationSettings(cases, labels, PATCH, 0.5, normalisations(override="mr"), values=values)
    return make_validate(graphdef, store, settings, jax.devices()[0])(params, lambda: False)


def test_volumes_of_many_windows_are_scored_as_their_images_say(tmp_path):
    def label(shape):
        return np.random.default_rng(1).integers(0, 3, shape).astype(np.uint8)

    store = make_store(tmp_path, [(40, 37, 21)], label=label)
    image = ZScore()(store.read_image("c0"), store.entry("c0").statistics)
    predicted = np.asarray(Thresholds()(image[None])[0]).argmax(-1)
    expected = dice(predicted, store.read_label("c0"), [1, 2])
    result = _validate(Thresholds(), store, ("c0",), {1: "one", 2: "two"})
    np.testing.assert_allclose(list(result.structures.values()), expected, rtol=1e-6)
    assert 0 < result.dice < 1
    # The folder of these cases numbers its structures the other way round.
    swapped = _validate(Thresholds(), store, ("c0",), {1: "one", 2: "two"}, {1: 2, 2: 1})
    reference = np.array([0, 2, 1])[store.read_label("c0")]
    np.testing.assert_allclose(list(swapped.structures.values()), dice(predicted, reference, [1, 2]), rtol=1e-6)


def test_logits_that_are_not_finite_are_a_failure_of_that_case(tmp_path):
    store = make_store(tmp_path, [SHAPE], label=lambda shape: np.ones(shape, np.uint8))
    model = Thresholds()
    model.weight[...] = jnp.asarray(jnp.nan)
    result = _validate(model, store, ("c0",), {1: "one"})
    ((case, reason),) = result.failures
    assert case == "c0" and "NaN or infinite logits" in reason


def test_the_picture_shows_the_same_slices_of_prediction_and_reference(tmp_path):
    def label(shape):
        labels = np.zeros(shape, np.uint8)
        labels[2:4, 12:15, 9:11] = 1
        return labels

    class Elsewhere(Thresholds):
        """Class 1 in the last planes of the window."""

        def __call__(self, windows):
            x = jnp.zeros(windows.shape[:4]).at[:, 10:].set(1) * self.weight[...]
            return jnp.stack([0 * x, x - 0.5], -1)

    store = make_store(tmp_path, [(16, 16, 16)], label=label)
    picture = _validate(Elsewhere(), store, ("c0",), {1: "one"}).picture
    entry, where = store.entry("c0"), np.array(store.entry("c0").affine)
    scan, reference = Volume(store.read_image("c0"), where), Volume(store.read_label("c0"), where)
    below = np.asarray(render(scan, reference, {1: "one"}, entry.modality, "c0: reference"))
    np.testing.assert_array_equal(picture[-below.shape[0] :, : below.shape[1]], below)
    predicted = np.zeros((16, 16, 16), np.uint8)
    predicted[10:] = 1
    named = ({1: "one"}, entry.modality, "c0: prediction")
    above = np.asarray(render(scan, Volume(predicted, where), *named, slices_of=reference.array))
    np.testing.assert_array_equal(picture[: above.shape[0], : above.shape[1]], above)
    alone = np.asarray(render(scan, Volume(predicted, where), *named))
    assert alone.shape != above.shape or (alone != above).any()
