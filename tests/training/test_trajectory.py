"""Twelve steps of the published training, against torch (parity/README.md, section 5)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.distributed import make_mesh, put_batch
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.optimizer import make_optimizer, ungroup
from mambahome_jax.training.schedule import learning_rate, progress_in_steps
from mambahome_jax.training.step import init_state, make_train_step
from mambahome_jax.weights.model_path import load_model
from mambahome_jax.weights.weights import export_official
from tests.conftest import golden_path, load_golden

# The published training of the golden, and the steps after which its tensors are compared.
RUN, TOLD = "A", (1, 6, 12)


@pytest.fixture(scope="module")
def golden():
    return load_golden("training_tiny.npz")


def _config(golden):
    hyper = json.loads(str(golden["hyper_json"]))[RUN]
    return OptimizerConfig(
        "AdamW",
        lr=hyper["lr"],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        betas=tuple(hyper["betas"]),
        steps_per_period=3,
        t_max=hyper["T_max"],
        eta_min=hyper["eta_min"],
        schedule_step="published",
    )


def _trajectory(golden, dtype, steps):
    """Metrics of the first steps, published tensors before them and after those of TOLD, gradient of step 1."""
    model = load_model(golden_path("mambahome_tiny.pth"), param_dtype=dtype, precision="fp32")
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    mesh, config = make_mesh(jax.devices()[:1]), _config(golden)
    optimizer = make_optimizer(config)
    step = make_train_step(graphdef, optimizer, dice_ce, mesh, seed=0)
    batches = [
        {
            "image": np.moveaxis(golden[f"batch{k}/x"], 1, -1).astype(dtype),
            "label": golden[f"batch{k}/y"][:, 0].astype(np.int32),
        }
        for k in range(3)
    ]
    state = init_state(params, optimizer, mesh)
    metrics, tensors = [], {0: export_official(params)}
    for number, batch in enumerate(golden["batch_of_step"][:steps], 1):
        rate = learning_rate(config, progress_in_steps(config, number - 1), number - 1)
        state, values = step(state, put_batch(batches[batch], mesh), dtype(rate))
        metrics.append(jax.device_get(values))
        if number == 1:
            # After one step the first moment is (1 - beta1) times the gradient.
            moment = next(s.mu for s in state.opt_state if hasattr(s, "mu"))
            gradient = {name: array / (1 - 0.9) for name, array in export_official(ungroup(moment, params)).items()}
        if number in TOLD:
            tensors[number] = export_official(state.params)
    return {name: np.array([m[name] for m in metrics]) for name in metrics[0]}, tensors, gradient


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _check_tensors(golden, tensors, gradient, bounds):
    exact_zero = {
        str(name) for name, zero in zip(golden["param_names"], golden["exact_zero"], strict=True) if bool(zero)
    }
    assert len(exact_zero) == 33
    decay = json.loads(str(golden["hyper_json"]))[RUN]["weight_decay"]
    for name in golden["tensor_names"]:
        start = tensors[0][name].astype(np.float64)
        for step in [*tensors][1:]:
            expected = golden[f"{RUN}/step{step}/{name}"]
            found = tensors[step][name].astype(np.float64)
            if name in exact_zero:
                kept = np.prod(1 - golden[f"{RUN}/lr"][:step] * decay)
                np.testing.assert_allclose(found, start * kept, atol=bounds["zero"], rtol=0, err_msg=f"{name} {step}")
            elif name.endswith("alpha"):
                np.testing.assert_allclose(found, expected, atol=bounds["alpha"], rtol=0, err_msg=f"{name} {step}")
            else:
                allowed = bounds["tensor"](step, _rms(expected - start), max(1.0, np.abs(expected).max()))
                assert _rms(found - expected) <= allowed, f"{name} after step {step}"
        if name not in exact_zero:
            expected = golden[f"{RUN}/grad1/{name}"]
            error = np.linalg.norm(gradient[name] - expected) / np.linalg.norm(expected)
            assert error <= bounds["gradient"](name), f"gradient of {name}: {error}"


@pytest.mark.slow
def test_float64(golden, x64):
    bounds = {
        "zero": 1e-11,
        "alpha": 1e-11,
        "tensor": lambda step, change, size: 1e-6 * change + 1e-12,
        "gradient": lambda name: 1e-8,
    }
    metrics, tensors, gradient = _trajectory(golden, jnp.float64, 12)
    np.testing.assert_allclose(metrics["lr"], golden[f"{RUN}/lr"], rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], golden[f"{RUN}/loss"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(metrics["grad_norm"], golden[f"{RUN}/grad_norm"], rtol=1e-9)
    _check_tensors(golden, tensors, gradient, bounds)
    l2 = {name: np.linalg.norm(array) for name, array in tensors[12].items()}
    np.testing.assert_allclose([l2[name] for name in golden["param_names"]], golden[f"{RUN}/param_l2"], rtol=1e-9)


@pytest.mark.slow
def test_float32(golden):
    bounds = {
        "zero": 5e-6,
        "alpha": 2e-3,
        "tensor": lambda step, change, size: 0.05 * change + 5e-7 * size if step == 1 else 0.5 * change + 2e-6 * size,
        "gradient": lambda name: 1e-2 if name.startswith("encoder1.layer.conv3") else 1e-3,
    }
    metrics, tensors, gradient = _trajectory(golden, jnp.float32, 6)
    np.testing.assert_allclose(metrics["lr"], golden[f"{RUN}/lr"][:6], rtol=1e-6)
    loss, norm = golden[f"{RUN}/loss"], golden[f"{RUN}/grad_norm"]
    for steps, atol, rtol in ((slice(0, 1), 2e-6, 1e-4), (slice(1, 3), 5e-5, 5e-3), (slice(3, 6), 2e-3, 3e-2)):
        np.testing.assert_allclose(metrics["loss"][steps], loss[steps], atol=atol, rtol=0)
        np.testing.assert_allclose(metrics["grad_norm"][steps], norm[steps], rtol=rtol)
    _check_tensors(golden, tensors, gradient, bounds)
