"""Updates and learning rates against the published facts and against formulas evaluated in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.schedule import learning_rate, progress_in_steps
from tests.conftest import load_golden

GRADIENTS = np.array([[0.5, -2e-5, 0.0], [0.1, 3e-5, 0.0], [-0.7, 1e-5, 0.0]])
START = np.array([1.0, -0.3, 2.0])


@pytest.mark.parametrize(("run", "step"), [("A", "published"), ("B", "epoch")])
def test_learning_rates_of_the_golden_runs(run, step):
    golden = load_golden("training_tiny.npz")
    config = OptimizerConfig(lr=1e-3, steps_per_period=3, t_max=4, schedule_step=step)
    rates = [_rate(config, k) for k in range(12)]
    np.testing.assert_allclose(rates, golden[f"{run}/lr"], rtol=1e-12)


def test_the_polynomial_rate_is_that_of_nnunet():
    golden = load_golden("baselines/recipe_nnunet.npz")
    config = OptimizerConfig(lr=0.01, scheduler="polynomial", steps_per_period=250, t_max=1000)
    rates = [_rate(config, 250 * epoch + 249 * (epoch < 999)) for epoch in golden["poly/epoch"]]
    np.testing.assert_allclose(rates, golden["poly/lr"], rtol=1e-12)
    assert _rate(config, 250_000) == 0


def test_the_rate_is_exact_to_the_end_and_stays_at_the_minimum():
    config = OptimizerConfig(lr=1e-4, steps_per_period=2, t_max=800)
    last = 1e-4 * (1 + np.cos(np.pi * np.float64(799) / 800)) / 2
    np.testing.assert_allclose(_rate(config, 1599), last, rtol=1e-6)
    assert _rate(config, 1600) == 0 and _rate(config, 10**6) == 0


def _rate(config, step):
    return learning_rate(config, progress_in_steps(config, step), step)


def _run(config):
    optimizer = make_optimizer(config)
    params = {"w": jnp.asarray(START)}
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params, rate=config.lr)
        params = jax.tree.map(jnp.add, params, updates)
    return np.asarray(params["w"])


def _adam_direction(gradients, eps):
    m = v = np.zeros(3)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        yield (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps)


def test_adamw_decays_decoupled_and_everything(x64):
    p = START.copy()
    for direction in _adam_direction(GRADIENTS, 1e-4):
        p = p * (1 - 1e-2 * 0.1) - 1e-2 * direction
    got = _run(OptimizerConfig("AdamW", lr=1e-2, weight_decay=0.1, eps=1e-4, t_max=1, steps_per_period=9))
    np.testing.assert_allclose(got, p, rtol=1e-12)
    np.testing.assert_allclose(got[2], 2 * (1 - 1e-3) ** 3, rtol=1e-14)


def test_adam_and_sgd_decay_coupled(x64):
    m = v = np.zeros(3)
    p, q = START.copy(), START.copy()
    for t, gradient in enumerate(GRADIENTS, 1):
        g = gradient + 0.1 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        q = q - 1e-2 * (gradient + 0.1 * q)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8, "t_max": 1, "steps_per_period": 9}
    np.testing.assert_allclose(_run(OptimizerConfig("Adam", **settings)), p, rtol=1e-12)
    np.testing.assert_allclose(_run(OptimizerConfig("SGD", **settings)), q, rtol=1e-12)
