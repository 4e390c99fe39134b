"""nnU-Net's U-Nets against float64 goldens of dynamic-network-architectures, and their weights in both directions."""

import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import PlainUNetConfig, ResEncUNetConfig, network_from_json
from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.weights.names import all_names, canonical_name
from mambahome_jax.weights.weights import read_weights, write_weights
from tests.conftest import golden_path
from tests.model.golden_gradients import compare_gradients

STRIDES = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 2))
KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
GRIDS = {"strides": STRIDES, "kernel_sizes": KERNELS}
CONFIGS = {
    "plain": PlainUNetConfig(2, 3, (2,) * 5, (4, 6, 8, 10, 10), decoder_depths=(2,) * 4, **GRIDS),
    "resenc": ResEncUNetConfig(2, 3, (1, 2, 3, 2, 1), (4, 6, 8, 10, 10), decoder_depths=(1,) * 4, **GRIDS),
}


def golden(name):
    with np.load(golden_path(f"baselines/{name}_unet_tiny.npz")) as archive:
        return {key: archive[key] for key in archive.files}


def published_of(data):
    """{name: array}; in the part that is kept here the bits of all arrays, rotated, byte by byte."""
    if "param_planes" not in data:
        return {key.removeprefix("param/"): array for key, array in data.items() if key.startswith("param/")}
    bits = np.ascontiguousarray(data["param_planes"].T).view(np.uint32).ravel()
    values = ((bits >> np.uint32(1)) | (bits << np.uint32(31))).view(np.float32)
    shapes = [tuple(int(n) for n in row if n) for row in data["param_shapes"]]
    parts = np.split(values, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    return {str(n): p.reshape(s) for n, p, s in zip(data["grad_names"], parts, shapes, strict=True)}


def input_of(data, which):
    x = data[f"{which}/x"]
    return np.moveaxis(x / 1024 if x.dtype == np.int16 else x, 1, -1)


@pytest.fixture(scope="module")
def official():
    return published_of(golden("resenc"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "which"),
    # What a grid changes shows in float64, what float32 changes on one grid.
    [(jnp.float64, "input_a"), (jnp.float64, "input_b"), (jnp.float32, "input_a")],
    ids=["float64-input_a", "float64-input_b", "float32-input_a"],
)
def test_outputs_loss_and_gradients(name, which, dtype, tmp_path, x64):
    data = golden(name)
    if f"{which}/x" not in data:
        pytest.skip("this input is only in the full set of goldens, ../shared/parity")
    np.savez(tmp_path / "w.npz", **published_of(data))
    model = mh.load_model(tmp_path / "w.npz", param_dtype=dtype)
    assert model.config == CONFIGS[name]
    graphdef, state = nnx.split(model)
    x = jnp.asarray(input_of(data, which), dtype)
    weights = np.array([4, 2, 1, 0]) / 7 if which == "input_a" else np.array([8, 4, 2, 1]) / 15
    targets = [data[f"{which}/target{n}"][:, 0] for n in range(4)]

    @jax.jit
    def run(state):
        def loss(state):
            model = nnx.merge(graphdef, state)
            logits, levels = model.with_levels(x)
            heads = tuple(model.decoder.heads)[-2::-1]
            outputs = [logits, *(head(level) for head, level in zip(heads, levels, strict=True))]
            terms = [
                dice_ce(logits, jnp.asarray(target), include_background=False, batch=which == "input_b")
                for logits, target in zip(outputs, targets, strict=True)
            ]
            return sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight), outputs

        return jax.value_and_grad(loss, has_aux=True)(state)

    (value, outputs), gradients = run(state)
    single = dtype == jnp.float32
    # nnU-Net takes the negative Dice, where ours is 1 less it.
    assert abs(float(value) - 1 - data[f"{which}/loss"]) < (1e-6 if single else 1e-12)
    for level, output in enumerate(outputs):
        got, expected = np.moveaxis(np.asarray(output), -1, 1), data[f"{which}/out{level}"]
        assert got.dtype == dtype
        got = got if got.shape == expected.shape else got[:, :, ::2, ::3, ::3]
        assert np.abs(got - expected).max() < ((1e-4 if level == 0 else 5e-5) if single else 1e-10)
    exact_zero = data[f"{which}/exact_zero"]
    assert 0 < exact_zero.sum() < len(exact_zero) / 2
    bounds = (2e-4, 1e-6) if single else (1e-8, 1e-14)
    compare_gradients(mh.export_official(gradients), data, which, exact_zero, *bounds)


def test_names_of_a_state_dict():
    """Those of the golden, of which each tensor has two or four, lead to ours and come back."""
    model = nnx.eval_shape(lambda: mh.ResEncUNet(rngs=nnx.Rngs(0)))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), nnx.to_pure_dict(nnx.state(model)))
    for name in mh.export_official(zeros):
        aliases = all_names(name)
        assert {canonical_name(alias) for alias in aliases} == {name}
        assert len(aliases) == (2 if re.search(r"conv\.|norm\.", name) else 1) * (1 + name.startswith("encoder."))
    assert all_names("encoder.stem.convs.0.norm.bias") == [
        "encoder.stem.convs.0.norm.bias",
        "encoder.stem.convs.0.all_modules.1.bias",
        "decoder.encoder.stem.convs.0.norm.bias",
        "decoder.encoder.stem.convs.0.all_modules.1.bias",
    ]
    assert all_names("decoder.seg_layers.0.weight") == ["decoder.seg_layers.0.weight"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_dict_of_nnunet(name):
    weights = read_weights(golden_path(f"baselines/{name}_unet_tiny.pth"))
    data = golden(name)
    assert weights.config == CONFIGS[name]
    assert {alias for tensor in data["grad_names"] for alias in all_names(tensor)} == {*data["state_dict_names"]}
    exported = mh.export_official(weights.params)
    assert all(np.array_equal(array, exported[tensor]) for tensor, array in published_of(data).items())


@pytest.mark.parametrize(
    ("network", "parameters"),
    [(mh.PlainUNet, 31_197_204), (mh.ResEncUNet, 102_351_380)],
)
def test_sizes_of_nnunet(network, parameters):
    """One channel, four classes, five halvings of 128 x 128 x 128, every head included."""
    model = nnx.eval_shape(lambda: network(1, 4, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == parameters


@pytest.mark.parametrize("suffix", ["", ".pth", ".npz", ".safetensors"])
def test_round_trip_is_bit_equal(suffix, official, tmp_path):
    np.savez(tmp_path / "w.npz", **{f"module.{name}": array for name, array in official.items()})
    weights = read_weights(tmp_path / "w.npz")
    write_weights(tmp_path / f"again{suffix}", weights)
    again = mh.load_model(tmp_path / f"again{suffix}")
    assert isinstance(again, mh.ResEncUNet) and again.config == CONFIGS["resenc"]
    exported = mh.export_official(again)
    assert exported.keys() == official.keys()
    for name, array in official.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_torch_finds_every_name_and_each_tensor_once(official, tmp_path):
    from mambahome_jax.weights.pth import read_pth

    np.savez(tmp_path / "w.npz", **official)
    write_weights(tmp_path / "w.pth", read_weights(tmp_path / "w.npz"))
    names = read_pth(tmp_path / "w.pth")["model"]
    assert len(names) == 388 and {canonical_name(name) for name in names} == official.keys()
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        assert sum(name.startswith("archive/data/") for name in archive.namelist()) == len(official)


def test_two_names_of_different_values_are_refused(official, tmp_path):
    name = "encoder.stem.convs.0.conv.bias"
    other = {"encoder.stem.convs.0.all_modules.0.bias": official[name] + 1}
    np.savez(tmp_path / "w.npz", **official, **other)
    with pytest.raises(CheckpointError, match=r"all_modules\.0\.bias and encoder\.stem\.convs\.0\.conv\.bias differ"):
        read_weights(tmp_path / "w.npz")


def test_initial_values():
    config = CONFIGS["resenc"]
    model = mh.ResEncUNet(**vars(config), rngs=nnx.Rngs(0))
    exported = mh.export_official(model)
    for name, array in exported.items():
        if name.endswith("norm.weight"):
            assert np.all(array == (0 if "conv2" in name else 1)), name
        elif name.endswith("bias"):
            assert not array.any(), name
        elif array.size > 500:
            std = np.sqrt(2 / (1 + 0.01**2) / np.prod(array.shape[1:]))
            assert abs(array.std() / std - 1) < 0.15, name


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"depths": (2, 2)}, "depths has 2 entries; expected 6 for 6 stages"),
        ({"strides": ((2, 2, 2),) * 6}, "strides has 6 entries; expected 5 for 6 stages"),
        ({"feat_size": (4,)}, "feat_size has 1 entries; expected one a stage, 2 to 16"),
        ({"feat_size": 4}, "feat_size is 4; expected positive integers, one a stage"),
        ({"kernel_sizes": ((5, 5, 5),) * 6}, "kernel_sizes is .*; expected triples of 1 or 3"),
    ],
)
def test_shapes_that_cannot_be(shape, match):
    with pytest.raises(ConfigError, match=match):
        mh.PlainUNet(rngs=nnx.Rngs(0), **shape)


def test_as_many_stages_as_its_grids():
    deep = ResEncUNetConfig().with_grids(((2, 2, 2),) * 6, ((3, 3, 3),) * 7)
    assert (deep.feat_size[-3:], deep.depths, deep.decoder_depths) == ((320,) * 3, (1, 3, 4, 6, 6, 6, 6), (1,) * 6)
    shallow = deep.with_grids(((1, 2, 2),) * 2, ((1, 3, 3),) * 3)
    assert (shallow.feat_size, shallow.depths, shallow.multiples) == ((32, 64, 128), (1, 3, 4), (1, 4, 4))
    assert network_from_json(json.loads(json.dumps(shallow.to_json()))) == shallow
    assert shallow.widened(8).feat_size == (8, 16, 32)
