"""DiceCE against MONAI's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambahome_jax.training.losses import dice_ce
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
    with pytest.raises(ValueError, match="expected"):
        dice_ce(jnp.zeros((1, 2, 2, 2, 2)), jnp.zeros((1, 2, 2, 2, 1), jnp.int32))
