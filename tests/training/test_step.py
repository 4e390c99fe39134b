"""The compiled step: equal on one device and eight, ddp and fsdp, and a function of its state and batch alone."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mambahome_jax.errors import ConfigError
from mambahome_jax.recipes import AugmentationConfig, OptimizerConfig
from mambahome_jax.support.devices import choose_devices
from mambahome_jax.training import distributed
from mambahome_jax.training import optimizer as optimizer_module
from mambahome_jax.training.distributed import device_put_tree, make_mesh, put_batch, replicated, tree_sharding
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.schedule import learning_rate, progress_in_steps
from mambahome_jax.training.step import init_state, make_train_step
from tests.training.stand_in import SmallNet

BATCHES = [
    {
        "image": np.random.default_rng(n).normal(size=(8, 6, 6, 4, 1)).astype(np.float32),
        "label": np.random.default_rng(n).integers(0, 2, (8, 6, 6, 4)).astype(np.int32),
    }
    for n in range(3)
]


def _train(devices, strategy="ddp", steps=20, augmentation=None, seed=0, **settings):
    """SmallNet, whose arrays are split from 1024 elements on."""
    mesh = make_mesh(jax.devices()[:devices])
    graphdef, params = nnx.split(SmallNet())
    config = OptimizerConfig(lr=1e-2, steps_per_period=5, t_max=4)
    optimizer = make_optimizer(config)
    state = init_state(nnx.to_pure_dict(params), optimizer, mesh, strategy)
    train_step = make_train_step(graphdef, optimizer, dice_ce, mesh, seed, augmentation, strategy, **settings)
    metrics = []
    for step in range(steps):
        batch = put_batch(BATCHES[step % len(BATCHES)], mesh)
        rate = learning_rate(config, progress_in_steps(config, step), step)
        rate = device_put_tree(np.float32(rate), replicated(mesh))
        with jax.transfer_guard("disallow"):
            state, values = train_step(state, batch, rate)
        metrics.append(jax.device_get(values))
    return state, {name: np.array([m[name] for m in metrics]) for name in metrics[0]}


@pytest.fixture(scope="module", autouse=True)
def small_arrays_are_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "SMALLEST_SPLIT", 1024)
        patch.setattr(optimizer_module, "SMALL", 1024)
        yield


@pytest.fixture(scope="module")
def one_device():
    return _train(1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_eight_devices_train_as_one(one_device, strategy):
    state, metrics = _train(8, strategy)
    for name in ("loss", "grad_norm", "update_norm", "lr"):
        # From the twelfth step on a ReLU may have turned, which the loss hardly shows.
        steps, rtol = (20, 1e-5) if name == "loss" else (12, 1e-4)
        np.testing.assert_allclose(metrics[name][:steps], one_device[1][name][:steps], rtol=rtol, err_msg=name)
    split = [leaf.sharding.spec for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    # The two linear kernels and both moments of each, and both of all others joined.
    assert len(split) == (8 if strategy == "fsdp" else 0)


def test_loss_falls_and_the_rate_is_the_one_used(one_device):
    state, metrics = one_device
    assert metrics["loss"][-3:].mean() < metrics["loss"][:3].mean()
    assert int(state.step) == 20
    np.testing.assert_allclose(metrics["lr"][::5], 1e-2 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, rtol=1e-6)


def test_augmentation_depends_on_seed_and_step_and_not_on_devices():
    config = AugmentationConfig(noise_probability=1.0, noise_std=1.0)
    first, again, other = (_train(d, steps=2, augmentation=config, seed=s)[1] for d, s in ((1, 5), (8, 5), (1, 6)))
    np.testing.assert_allclose(first["loss"], again["loss"], rtol=1e-5)
    assert abs(first["loss"] - other["loss"]).max() > 1e-3


def test_dropout_depends_on_seed_and_step_and_not_on_devices():
    given = {"steps": 2, "dropout": 0.5}
    first, again, other = (_train(d, seed=s, **given)[1] for d, s in ((1, 5), (8, 5), (1, 6)))
    np.testing.assert_allclose(first["loss"], again["loss"], rtol=1e-5)
    assert abs(first["loss"] - other["loss"]).max() > 1e-3
    # The same batch and weights that do not move: only what is dropped differs from step to step.
    mesh, optimizer = make_mesh(jax.devices()[:1]), make_optimizer(OptimizerConfig(lr=1e-30))
    graphdef, params = nnx.split(SmallNet())
    state = init_state(nnx.to_pure_dict(params), optimizer, mesh)
    step = make_train_step(graphdef, optimizer, dice_ce, mesh, 0, dropout=0.5)
    losses = []
    for _ in range(2):
        state, metrics = step(state, put_batch(BATCHES[0], mesh), 1e-30)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_parameters_given_stay_usable():
    _, params = nnx.split(SmallNet())
    params = nnx.to_pure_dict(params)
    mesh, optimizer = make_mesh(jax.devices()[:1]), make_optimizer(OptimizerConfig())
    state = init_state(params, optimizer, mesh)
    step = make_train_step(nnx.split(SmallNet())[0], optimizer, dice_ce, mesh, 0)
    step(state, put_batch(BATCHES[0], mesh), 1e-4)
    assert np.isfinite(np.asarray(jax.tree.leaves(params)[0])).all()


def test_fsdp_splits_the_largest_axis_that_can_be_divided():
    mesh = make_mesh(jax.devices()[:4])
    shapes = {"wide": (12, 200), "odd": (1025,), "small": (8,), "tall": (4096, 7), "scalar": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: sharding.spec for name, sharding in tree_sharding(tree, mesh, "fsdp").items()}
    assert specs["wide"] == PartitionSpec(None, "data") and specs["tall"] == PartitionSpec("data", None)
    assert specs["odd"] == specs["small"] == specs["scalar"] == PartitionSpec()


def test_choice_of_devices():
    assert len(choose_devices()) == 1
    assert len(choose_devices(num_devices=3)) == 3
    assert len(choose_devices(parallel=False, num_devices=3)) == 1
    with pytest.raises(ConfigError, match="has 8 cpu devices"):
        choose_devices(num_devices=9)
