"""What recipes add to a step: moving average, clipping, momentum, deep supervision, a frozen or slower encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mambahome_jax.config import ModelConfig
from mambahome_jax.model.network import MambaHoME
from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.checkpoints import CheckpointWriter, restore_state
from mambahome_jax.training.distributed import make_mesh, put_batch
from mambahome_jax.training.losses import DeepSupervision, at_all_levels, dice_ce, network_params
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.step import (
    abstract_state,
    average_decay,
    deployed_params,
    init_state,
    make_train_step,
)
from mambahome_jax.weights.checkpoint import read_checkpoint_params

MESH = make_mesh(jax.devices()[:1])


class Levels(nnx.Module):
    """A network with an encoder and volumes at half and quarter resolution, as MambaHoME has them."""

    config = ModelConfig(out_chans=2, feat_size=(4, 3, 5, 6))

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.Linear(1, 4, rngs=rngs)
        self.coarse = nnx.List([nnx.Linear(4, width, rngs=rngs) for width in (3, 5)])
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def with_levels(self, x):
        y = jax.nn.relu(self.encoder(x))
        levels = [layer(y[:, :: 2**k, :: 2**k, :: 2**k]) for k, layer in enumerate(self.coarse, 1)]
        return self.out(y), levels

    def __call__(self, x):
        return self.with_levels(x)[0]


def _batch(number=0):
    image = np.random.default_rng(number).normal(size=(2, 8, 8, 4, 1)).astype(np.float32)
    return {"image": image, "label": (image[..., 0] > 0).astype(np.int32)}


def _train(model, steps=3, optimizer=None, loss_fn=dice_ce, ema_decay=0.0, **settings):
    graphdef, params = nnx.split(model)
    optimizer = optimizer or make_optimizer(OptimizerConfig(lr=1e-2, t_max=9))
    state = init_state(nnx.to_pure_dict(params), optimizer, MESH, ema=ema_decay > 0)
    step = make_train_step(graphdef, optimizer, loss_fn, MESH, 0, ema_decay=ema_decay, **settings)
    seen = [jax.device_get(state.params)]
    for number in range(steps):
        state, metrics = step(state, put_batch(_batch(number), MESH), 1e-2)
        seen.append(jax.device_get(state.params))
    return state, seen, metrics


def test_the_moving_average_is_its_formula_and_is_what_is_deployed():
    state, seen, _ = _train(Levels(), ema_decay=0.25)
    kernels = [params["out"]["kernel"] for params in seen]
    expected = kernels[0]
    for number, kernel in enumerate(kernels[1:], 1):
        decay = min(0.25, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * kernel
    np.testing.assert_allclose(state.ema["out"]["kernel"], expected, rtol=1e-5)
    assert abs(expected - kernels[-1]).max() > 1e-4
    assert deployed_params(state) is state.ema


def test_decay_of_the_average_grows_to_the_one_given():
    decays = [float(average_decay(0.9, jnp.int32(n))) for n in (1, 10, 79, 1000)]
    np.testing.assert_allclose(decays, [2 / 11, 11 / 20, 80 / 89, 0.9], rtol=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.25])
@pytest.mark.parametrize("heads", [False, True])
def test_checkpoints_keep_the_deployed_network_and_resume_what_is_trained(tmp_path, ema_decay, heads):
    model = DeepSupervision(Levels(), rngs=nnx.Rngs(1)) if heads else Levels()
    loss = at_all_levels(dice_ce) if heads else dice_ce
    state, _, _ = _train(model, steps=2, loss_fn=loss, ema_decay=ema_decay)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", state, {"model": {}}, {"at": 2})
    saved = read_checkpoint_params(tmp_path / "last")
    assert set(saved) == {"encoder", "coarse", "out"}
    deployed = deployed_params(state)
    np.testing.assert_array_equal(saved["out"]["kernel"], deployed["out"]["kernel"])
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2, t_max=9))
    abstract = abstract_state(nnx.to_pure_dict(nnx.state(model)), optimizer, ema_decay > 0)
    restored, data = restore_state(tmp_path / "last", abstract, MESH)
    assert data == {"at": 2}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_clipping_bounds_the_norm_of_the_gradient():
    optimizer = make_optimizer(OptimizerConfig("SGD", lr=1.0, weight_decay=0.0, clip_norm=0.5))
    params = {"w": jnp.zeros(2)}
    updates, _ = optimizer.update({"w": jnp.array([3.0, -4.0])}, optimizer.init(params), params, rate=1.0)
    np.testing.assert_allclose(updates["w"], [-0.3, 0.4], rtol=1e-6)
    updates, _ = optimizer.update({"w": jnp.array([0.3, 0.0])}, optimizer.init(params), params, rate=1.0)
    np.testing.assert_allclose(updates["w"], [-0.3, 0.0], rtol=1e-6)


def test_sgd_with_nesterov_momentum_as_torch_has_it():
    optimizer = make_optimizer(OptimizerConfig("SGD", lr=0.1, weight_decay=0.01, momentum=0.9, steps_per_period=9))
    w, expected, buffer = jnp.array([1.0, -2.0]), np.array([1.0, -2.0]), np.zeros(2)
    state = optimizer.init(w)
    for gradient in ([0.5, 0.1], [-0.2, 0.3], [0.1, 0.1]):
        updates, state = optimizer.update(jnp.array(gradient), state, w, rate=0.1)
        w = w + updates
        g = np.array(gradient) + 0.01 * expected
        buffer = 0.9 * buffer + g
        expected = expected - 0.1 * (g + 0.9 * buffer)
    np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_a_slower_and_a_frozen_encoder():
    def moved(scale, **settings):
        optimizer = make_optimizer(OptimizerConfig(lr=1e-2, t_max=9, eps=1e-8, encoder_lr_scale=scale))
        _, seen, _ = _train(Levels(), steps=1, optimizer=optimizer, **settings)
        return [seen[1][name]["kernel"] - seen[0][name]["kernel"] for name in ("encoder", "out")]

    (full, out), (slow, same), (none, too) = moved(1.0), moved(0.1), moved(0.0, freeze_encoder=True)
    np.testing.assert_allclose(slow, 0.1 * full, rtol=1e-3)
    assert (none == 0).all() and abs(full).max() > 1e-3
    np.testing.assert_allclose(same, out, rtol=1e-6)
    np.testing.assert_allclose(too, out, rtol=1e-6)


def test_loss_at_all_levels_weighs_each_half_as_much():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (1, 8, 8, 4)).astype(np.int32)
    outputs = [rng.normal(size=(1, 8 // s, 8 // s, 4 // s, 2)).astype(np.float32) for s in (1, 2, 4)]
    parts = [dice_ce(o, label[:, ::s, ::s, ::s]) for o, s in zip(outputs, (1, 2, 4), strict=True)]
    expected = (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75
    np.testing.assert_allclose(at_all_levels(dice_ce)(outputs, label), expected, rtol=1e-6)


def test_heads_learn_beside_the_network_which_gives_its_volumes_in_the_order_of_their_grids():
    model = DeepSupervision(Levels(), rngs=nnx.Rngs(1))
    state, seen, metrics = _train(model, loss_fn=at_all_levels(dice_ce))
    assert np.isfinite(metrics["loss"]) and set(network_params(state.params)) == {"encoder", "coarse", "out"}
    assert abs(seen[1]["heads"][1]["kernel"] - seen[0]["heads"][1]["kernel"]).max() > 0
    config = ModelConfig(
        feat_size=(8, 16, 24, 32), hidden_size=48, depths=(1, 1, 1, 1), experts_list=(2, 2, 2, 2), out_chans=3
    )
    network = nnx.eval_shape(lambda: DeepSupervision(MambaHoME(config, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)))
    shapes = nnx.eval_shape(lambda m, x: m(x), network, jax.ShapeDtypeStruct((1, 32, 32, 16, 1), jnp.float32))
    assert [s.shape for s in shapes] == [(1, 32, 32, 16, 3), (1, 16, 16, 8, 3), (1, 8, 8, 4, 3)]


def test_a_step_gives_the_loss_what_each_sample_was_labelled_with():
    given = []

    def loss(logits, labels, labelled=None):
        given.append(labelled.shape)
        return dice_ce(logits, labels, labelled)

    graphdef, params = nnx.split(Levels())
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state(nnx.to_pure_dict(params), optimizer, MESH)
    step = make_train_step(graphdef, optimizer, loss, MESH, 0)
    _, metrics = step(state, put_batch(_batch() | {"labelled": np.ones((2, 2), bool)}, MESH), 1e-4)
    plain = make_train_step(graphdef, optimizer, dice_ce, MESH, 0)
    state = init_state(nnx.to_pure_dict(params), optimizer, MESH)
    _, without = plain(state, put_batch(_batch(), MESH), 1e-4)
    assert given == [(2, 2)]
    np.testing.assert_allclose(metrics["loss"], without["loss"], rtol=1e-6)
    assert optax.tree.norm(metrics) > 0
