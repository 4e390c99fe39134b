"""DiceCE against MONAI's values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambahome_jax.errors import ConfigError
from mambahome_jax.recipes import RECIPES
from mambahome_jax.training.losses import at_all_levels, dice_ce, recipe_loss
from tests.conftest import load_golden

OPTIONS = {"": {}, "_batch": {"batch": True}, "_squared": {"squared": True}}


def _channels_last(logits, labels, dtype):
    return jnp.asarray(np.moveaxis(logits, 1, -1), dtype), jnp.asarray(labels[:, 0], jnp.int32)


@pytest.mark.parametrize("case", ["small", "absent"])
@pytest.mark.parametrize("background", [1, 0])
@pytest.mark.parametrize("option", list(OPTIONS))
def test_loss_and_gradient_equal_monai(case, background, option):
    golden = load_golden("pipeline/loss.npz")
    logits, labels = _channels_last(golden[f"{case}/logits"], golden[f"{case}/labels"], jnp.float32)
    loss, grad = jax.value_and_grad(dice_ce)(logits, labels, include_background=bool(background), **OPTIONS[option])
    assert loss.dtype == jnp.float32
    key = f"{case}/bg{background}{option}"
    np.testing.assert_allclose(loss, golden[f"{key}/loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(grad, np.moveaxis(golden[f"{key}/grad"], 1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [False, True])
def test_the_recipe_of_nnunet_has_its_loss(batch, x64):
    """Its Dice is subtracted, where ours is 1 less it; a class of the golden occurs nowhere, another in one sample."""
    golden, which = load_golden("baselines/recipe_nnunet.npz"), "batch" if batch else "sample"
    logits, labels = _channels_last(golden["loss/logits"], golden["loss/labels"], jnp.float64)
    recipe = dataclasses.replace(RECIPES["nnunet"], deep_supervision=False, batch_dice=batch)
    loss, grad = jax.value_and_grad(recipe_loss(recipe))(logits, labels)
    np.testing.assert_allclose(loss - 1, golden[f"loss/ce_{which}"], atol=4e-7, rtol=0)
    expected = np.moveaxis(golden[f"loss/ce_{which}_grad"], 1, -1)
    np.testing.assert_allclose(grad, expected, atol=2e-7 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("coarse_labels", "offset"), [("first", 0), ("centre", 1)])
def test_the_voxel_of_a_coarse_grid_has_the_label_of_one_it_covers(coarse_labels, offset):
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 8, 8, 3)), jnp.int32)
    outputs = [jnp.zeros((1, 8, 8, 3, 3)), jnp.zeros((1, 4, 4, 3, 3)), jnp.zeros((1, 2, 2, 3, 3))]
    seen = []
    at_all_levels(lambda logits, coarse: seen.append(coarse) or logits.sum(), coarse_labels)(outputs, labels)
    for step, coarse in zip((1, 2, 4), seen, strict=True):
        start = offset * (step // 2)
        np.testing.assert_array_equal(coarse, labels[:, start::step, start::step])


@pytest.mark.parametrize("case", ["dicece", "dicece_absent"])
def test_float64_agrees_to_its_own_precision(case, x64):
    golden = load_golden("layers_tiny.npz")
    logits, labels = _channels_last(golden[f"{case}/logits"], golden[f"{case}/labels"], jnp.float64)
    loss, grad = jax.value_and_grad(dice_ce)(logits, labels)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, golden[f"{case}/loss"], atol=1e-12, rtol=0)
    np.testing.assert_allclose(grad, np.moveaxis(golden[f"{case}/grad"], 1, -1), atol=1e-13, rtol=0)


def test_reduced_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 16, 16, 16, 2), jnp.bfloat16)
    loss = dice_ce(logits, jnp.zeros((1, 16, 16, 16), jnp.int32))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(2) + (1 / 3 + 1) / 2, rtol=1e-5)


def test_labels_of_another_shape_are_refused():
    logits = jnp.zeros((1, 2, 2, 2, 2))
    with pytest.raises(ConfigError, match=r"labels have shape \(1, 2, 2, 2, 1\), logits .*; expected \(batch"):
        dice_ce(logits, jnp.zeros((1, 2, 2, 2, 1), jnp.int32))
    with pytest.raises(ConfigError, match="labels are float32; expected integers"):
        dice_ce(logits, jnp.zeros((1, 2, 2, 2)))
    with pytest.raises(ConfigError, match="labels are a list; expected an array"):
        dice_ce(logits, [0])


def _random(classes=4, batch=2):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(batch, 6, 5, 4, classes))
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, classes, (batch, 6, 5, 4)), jnp.int32)


@pytest.mark.parametrize("options", [{}, {"batch": True}, {"include_background": False}])
def test_with_all_classes_labelled_nothing_changes(options, x64):
    logits, labels = _random()
    everything = jnp.ones((2, 4), bool)
    expected = jax.value_and_grad(dice_ce)(logits, labels, **options)
    found = jax.value_and_grad(dice_ce)(logits, labels, everything, **options)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-14)


def test_classes_that_were_never_labelled_count_as_background(x64):
    logits, labels = _random()
    labels = jnp.where(labels == 2, 0, labels)
    labelled = jnp.array([[True, True, False, True], [True, True, False, True]])
    merged = jnp.stack([jax.nn.logsumexp(logits[..., ::2], axis=-1), logits[..., 1], logits[..., 3]], axis=-1)
    expected = dice_ce(merged, jnp.where(labels == 3, 2, labels))
    np.testing.assert_allclose(dice_ce(logits, labels, labelled), expected, rtol=1e-12)
    # Moving belief between background and the class without labels costs nothing.
    gradient = jax.grad(dice_ce)(logits, labels, labelled)
    share = jax.nn.softmax(logits[..., ::2], axis=-1)
    total = gradient[..., ::2].sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient[..., ::2], total * share, atol=1e-14)


def test_each_sample_is_judged_by_the_classes_of_its_own_dataset(x64):
    logits, labels = _random()
    labels = labels.at[1].set(jnp.where(labels[1] == 3, 0, labels[1]))
    labelled = jnp.array([[True] * 4, [True, True, True, False]])
    both = dice_ce(logits, labels, labelled)
    alone = [dice_ce(logits[n : n + 1], labels[n : n + 1], labelled[n : n + 1]) for n in range(2)]
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, rtol=1e-12)
    assert np.isfinite(jax.grad(dice_ce)(logits, labels, labelled)).all()
    # A label that its dataset cannot have is background there.
    stray = labels.at[1, 0, 0, 0].set(3)
    cleared = labels.at[1, 0, 0, 0].set(0)
    np.testing.assert_allclose(dice_ce(logits, stray, labelled), dice_ce(logits, cleared, labelled), rtol=1e-12)
