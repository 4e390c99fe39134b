"""Training of nnU-Net's U-Nets: grids by the patch, heads of their own, checkpoints, and a plan made anew for them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import ResEncUNetConfig
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.flags import TrainConfig
from mambahome_jax.model.layers import ChannelDropout
from mambahome_jax.preprocessing.plan import follow_plan
from mambahome_jax.preprocessing.plan_folder import planned_settings
from mambahome_jax.recipes import RECIPES
from mambahome_jax.training.checkpoints import checkpoint_settings
from mambahome_jax.training.distributed import make_mesh
from mambahome_jax.training.losses import DeepSupervision, recipe_loss
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.pretrained import transfer
from mambahome_jax.training.setup import make_setup
from mambahome_jax.training.step import init_state, make_train_step
from mambahome_jax.training.train import build_networks
from mambahome_jax.weights.checkpoint import write_checkpoint
from mambahome_jax.weights.weights import build_model, read_weights
from tests.commands.test_train import SHAPE, _dataset
from tests.conftest import golden_path, load_golden
from tests.nnunet_models import miniature, model_folder


def setup_for(tmp_path, **flags):
    if not (tmp_path / "data").exists():
        _dataset(tmp_path / "data")
    prepared = read_prepared(tmp_path / "data")
    flags = {"model": "ResEncUNet", "feature_size": 4, "steps": 1} | flags
    return make_setup(TrainConfig(prepared.root, **flags), prepared, None, devices=1)


def test_grids_follow_the_patch_and_travel_with_a_checkpoint(tmp_path):
    setup = setup_for(tmp_path, patch_size=(16, 16, 16))
    assert setup.model.strides == ((2, 2, 2),) * 2
    assert (setup.model.feat_size, setup.model.depths) == ((4, 8, 16), (1, 3, 4))
    graphdef, _, params, _ = build_networks(setup, new=True)
    write_checkpoint(tmp_path / "best", params, checkpoint_settings(setup))
    model = mh.load_model(tmp_path / "best")
    assert isinstance(model, mh.ResEncUNet) and model.config == setup.model
    ours, theirs = mh.export_official(model), mh.export_official(nnx.merge(graphdef, params))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    weights = read_weights(tmp_path / "best")
    _, found = transfer(weights, params, setup.model.replace(in_chans=2, out_chans=9), setup.properties, "best")
    assert {*found.reinitialised} == {f"encoder.stem.conv.{part}" for part in ("kernel", "bias")} | {
        f"decoder.heads.{step}.{part}" for step in range(2) for part in ("kernel", "bias")
    }


def test_weights_of_nnunet_are_turned_to_our_axes():
    weights = read_weights(model_folder(miniature("aniso")) / "fold_0")
    preparation = dataclasses.replace(weights.data.nnunet, axes=(1, 2, 0))
    weights = weights._replace(data=dataclasses.replace(weights.data, nnunet=preparation))
    config = weights.config.replace(strides=((2, 1, 2), (2, 2, 2)), kernel_sizes=((3, 1, 3), (3, 3, 3), (3, 3, 3)))
    graphdef, fresh = nnx.split(nnx.eval_shape(lambda: mh.PlainUNet(**vars(config), rngs=nnx.Rngs(0))))
    params, found = transfer(weights, nnx.to_pure_dict(fresh), config, weights.data, "fold_0")
    assert found.reinitialised == () and "axes 1 2 0" in str(found)
    x = np.random.default_rng(0).normal(size=(1, 12, 4, 8, 2)).astype(np.float32)
    theirs, ours = jax.jit(build_model(weights)), jax.jit(nnx.merge(graphdef, params))
    expected = theirs(x.transpose(0, 2, 3, 1, 4)).transpose(0, 3, 1, 2, 4)
    np.testing.assert_allclose(ours(x), expected, atol=1e-4)


def test_it_is_supervised_by_its_own_heads_but_the_coarsest():
    config = ResEncUNetConfig(1, 3, feat_size=(4, 5, 6, 7, 8, 8))

    def logits(x):
        network = DeepSupervision(mh.ResEncUNet(**vars(config), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
        assert not jax.tree.leaves(nnx.state(network.heads))
        return network(x, ChannelDropout(jax.random.key(0), 0.1))

    shapes = [level.shape for level in jax.eval_shape(logits, jnp.zeros((1, 64, 64, 32, 1)))]
    assert shapes == [(1, 64 // n, 64 // n, 32 // n, 3) for n in (1, 2, 4, 8)]


@pytest.mark.slow
def test_eight_updates_of_nnunet(x64):
    """Its optimizer and loss with deep supervision, on two inputs in turn; the last two gradients are clipped."""
    golden, expected = load_golden("baselines/plain_unet_tiny.npz"), load_golden("baselines/recipe_nnunet.npz")
    if "train/loss" not in expected:
        pytest.skip("these updates are only in the full set of goldens, ../shared/parity")
    model = mh.load_model(golden_path("baselines/plain_unet_tiny.pth"), param_dtype=jnp.float64)
    recipe, mesh = RECIPES["nnunet"], make_mesh(jax.devices()[:1])
    graphdef, params = nnx.split(DeepSupervision(model, rngs=nnx.Rngs(0)))
    state = init_state(nnx.to_pure_dict(params), make_optimizer(recipe.optimizer), mesh)
    before = mh.export_official(state.params["network"])
    batches = [
        {
            "image": jnp.asarray(np.moveaxis(golden[f"{which}/x"], 1, -1), jnp.float64),
            "label": jnp.asarray(golden[f"{which}/target0"][:, 0], jnp.int32),
        }
        for which in ("input_a", "input_b")
    ]
    optimizers = [make_optimizer(dataclasses.replace(recipe.optimizer, clip_norm=norm)) for norm in (12.0, 0.05)]
    steps = [make_train_step(graphdef, each, recipe_loss(recipe), mesh, seed=0) for each in optimizers]
    # Where torch clips, it adds 1e-6 to the norm.
    for step, rate in enumerate(expected["train/lr"]):
        state, metrics = steps[step >= 6](state, batches[step % 2], rate)
        assert abs(float(metrics["loss"]) - 1 - expected["train/loss"][step]) < (1e-10 if step < 7 else 1e-9)
        assert abs(float(metrics["grad_norm"]) / expected["train/grad_norm"][step] - 1) < 1e-8
    after = mh.export_official(state.params["network"])
    for name, norm in zip(golden["grad_names"], expected["train/change_l2"], strict=True):
        changed = after[name] - before[name]
        # The coarsest head, which the loss leaves out, decays here.
        unused = name.startswith("decoder.seg_layers.0.")
        assert abs(np.linalg.norm(changed) - norm) < (1e-4 if unused else 1e-6 * norm + 1e-12), name
        if f"train/change/{name}" in expected and not unused:
            assert np.linalg.norm(changed - expected[f"train/change/{name}"]) < 1e-6 * norm + 1e-12, name


@pytest.fixture
def planned(tmp_path):
    """A folder with a plan for another network."""
    _dataset(tmp_path / "data")
    mh.plan(folder=tmp_path / "data", memory=24, output=tmp_path / "data" / "plan.json")
    return tmp_path / "data"


def test_another_network_than_the_planned_one_gets_its_own_patch(planned):
    stored = planned_settings(TrainConfig(planned))
    assert stored.settings["model"].value == "MambaHoME_small"
    flags = TrainConfig(planned, model="ResEncUNet_M", given=("model",))
    plan = planned_settings(flags)
    expected = mh.plan(folder=planned, memory=24, model="ResEncUNet_M").plan
    for name in ("patch_size", "strides", "kernel_sizes", "batch_size"):
        assert plan.settings[name] == getattr(expected, name)
    assert {name: plan.settings[name] for name in ("spacing", "mirror", "length")} == {
        name: stored.settings[name] for name in ("spacing", "mirror", "length")
    }
    followed = follow_plan(flags, plan.settings, plan.machine)
    assert followed.patch_size == (20, 20, 16) and followed.batch_size == plan.settings["batch_size"].value > 2
    setup = make_setup(followed, read_prepared(planned), None, devices=1, settings=plan.settings)
    assert (setup.patch_size, setup.model.strides) == ((20, 20, 16), plan.settings["strides"].value)


def test_what_a_plan_for_a_unet_says_of_mamba_is_not_of_another_network(planned):
    file = planned / "plan.json"
    mh.plan(folder=planned, memory=24, model="PlainUNet", output=file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"mixer": {"value": "none"}}))
    flags = TrainConfig(planned, model="MambaHoME_small", given=("model",))
    assert planned_settings(flags).settings["mixer"].value == "scan"


def test_a_given_patch_gets_its_own_batch(planned):
    flags = TrainConfig(planned, model="PlainUNet", patch_size=(8, 8, 8), given=("model", "patch_size"))
    plan = planned_settings(flags)
    assert plan.settings["patch_size"].value == (8, 8, 8)
    assert follow_plan(flags, plan.settings, plan.machine).batch_size == plan.settings["batch_size"].value
    assert SHAPE == (20, 18, 16) and planned_settings(TrainConfig(planned, patch_size=(16, 16, 16))) == (
        planned_settings(TrainConfig(planned))
    )
