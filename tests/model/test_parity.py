"""The network against float64 goldens of the published code: logits, encoder stages, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax.weights.weights as weights
from mambahome_jax.config import MODEL_SIZES, ModelConfig
from mambahome_jax.model.layers import Numerics
from mambahome_jax.model.network import MambaHoME, MambaHoMEBlock, Stage
from mambahome_jax.weights.model_path import load_model
from tests.conftest import REDUCED, golden_path, load_golden

# What float32 reaches on a CPU, as the golden's page says: these two gradients are small sums of large terms.
HARD_IN_FLOAT32 = ("encoder1.layer.conv3.conv.weight", "mamba_encoder.mamba_blocks.2.1.norm.alpha")


def _expected():
    """The full golden where it is there, else the reduced one."""
    try:
        return load_golden("mambahome_tiny.npz")
    except pytest.skip.Exception:
        with np.load(REDUCED / "mambahome_tiny_expected.npz") as archive:
            return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="module")
def expected():
    return _expected()


def _exact_zero() -> dict[str, bool]:
    data = load_golden("training_tiny.npz")
    return dict(zip(data["param_names"], data["exact_zero"], strict=True))


def weighting(shape) -> np.ndarray:
    """R of the golden's loss, channels last."""
    b, z, y, x, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return np.sin(0.5 + 1.3 * b + 0.9 * c + 0.11 * z + 0.23 * y + 0.31 * x)


def with_stages(model, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Logits, and the volumes of the encoder on the way: compiling it a second time takes long."""
    volumes: list[jax.Array] = []
    encoder = model.encoder
    object.__setattr__(model, "encoder", lambda *arguments: volumes.extend(encoder(*arguments)) or tuple(volumes))
    logits = model(x)
    assert len(volumes) == 4
    return logits, volumes


def _forward_and_gradients(x: np.ndarray, dtype):
    model = load_model(golden_path("mambahome_tiny.pth"), param_dtype=dtype)
    graphdef, state = nnx.split(model)
    x = jnp.asarray(np.moveaxis(x, 1, -1), dtype)

    @jax.jit
    def run(state):
        def loss(state):
            logits, volumes = with_stages(nnx.merge(graphdef, state), x)
            return jnp.sum(logits * jnp.asarray(weighting(logits.shape), dtype)) / logits.size, (logits, volumes)

        (value, (logits, volumes)), gradients = jax.value_and_grad(loss, has_aux=True)(state)
        return value, logits, gradients, volumes

    value, logits, gradients, volumes = run(state)
    return value, np.moveaxis(logits, -1, 1), weights.export_official(gradients), volumes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "values", "gradient", "zero"),
    [(jnp.float32, 3e-5, 1e-4, 1e-5), (jnp.float64, 1e-9, 1e-8, 1e-13)],
    ids=["float32", "float64"],
)
def test_logits_stages_and_gradients(expected, dtype, values, gradient, zero, x64):
    """Of one scan; test_trajectory has batches of two."""
    value, logits, gradients, stages = _forward_and_gradients(expected["input_b/x"], dtype)
    assert logits.dtype == dtype
    assert abs(float(value) - expected["input_b/loss"]) < (1e-6 if dtype == jnp.float32 else 1e-12)
    assert np.abs(logits - expected["input_b/logits"]).max() < values
    for i, stage in enumerate(stages):
        assert np.abs(np.moveaxis(stage, -1, 1) - expected[f"input_b/enc{i}"]).max() < values
    exact_zero = _exact_zero()
    norms = dict(zip(expected["grad_names"], expected["input_b/grad_l2"], strict=True))
    assert set(gradients) == set(norms)
    errors = {}
    for name, norm in norms.items():
        got = np.asarray(gradients[name], np.float64)
        if exact_zero[name]:
            assert np.abs(got).max() < zero, name
            continue
        errors[name] = abs(np.linalg.norm(got) - norm) / norm
        if f"input_b/grad/{name}" in expected:
            errors[name] = max(errors[name], np.linalg.norm(got - expected[f"input_b/grad/{name}"]) / norm)
    for name, error in errors.items():
        hard = dtype == jnp.float32 and name in HARD_IN_FLOAT32
        assert error <= (1e-2 if hard else gradient), name


def test_rematerialisation_changes_no_number(x64):
    """On one stage of the encoder, in float64: in float32 the sign of a ReLU's argument could change by round-off."""
    config = MODEL_SIZES["MambaHoME_tiny"].model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 8, config.feat_size[1])))

    def gradients(use_checkpoint):
        changed, numerics = config.replace(use_checkpoint=use_checkpoint), Numerics(jnp.float64)
        stage = Stage(changed, 2, MambaHoMEBlock, rngs=nnx.Rngs(0), numerics=numerics)
        graphdef, state = nnx.split(stage)
        run = jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x)))))
        return str(jax.make_jaxpr(run)(state)).count("remat"), run(state)

    plain_calls, plain = gradients(False)
    remat_calls, remat = gradients(True)
    assert (plain_calls, remat_calls > 0) == (0, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), remat, plain)


def test_bfloat16_stays_near(expected):
    model = load_model(golden_path("mambahome_tiny.pth"), precision="bf16")
    x = jnp.asarray(np.moveaxis(expected["input_b/x"], 1, -1))
    logits = np.asarray(jax.jit(model)(x))
    assert logits.dtype == np.float32
    exact = np.moveaxis(expected["input_b/logits"], 1, -1)
    assert np.abs(logits - exact).mean() < 0.05
    assert (logits.argmax(-1) == exact.argmax(-1)).mean() > 0.97


def test_published_size():
    model = nnx.eval_shape(lambda: MambaHoME(ModelConfig(), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == 170_128_101
