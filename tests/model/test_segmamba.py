"""SegMamba against float64 goldens of the published code, its weights in both directions, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.config import SegMambaConfig, network_from_json
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.weights.weights import read_weights, write_weights
from tests.conftest import golden_path
from tests.model.golden_gradients import compare_gradients
from tests.model.test_parity import weighting, with_stages

GOLDEN = "baselines/segmamba_tiny.npz"


@pytest.fixture(scope="module")
def data():
    with np.load(golden_path(GOLDEN)) as archive:
        return {key: archive[key] for key in archive.files}


def published_of(data):
    return {key.removeprefix("param/"): array for key, array in data.items() if key.startswith("param/")}


@pytest.fixture
def official(data):
    return published_of(data)


def load(path, num_slices, official, **arguments):
    """The golden's network, from bare weights with the slices in a .json beside them."""
    np.savez(path / "w.npz", **official)
    (path / "w.json").write_text(json.dumps({"num_slices": np.asarray(num_slices).tolist()}))
    return mh.load_model(path / "w.npz", **arguments)


def input_of(data, which):
    x = data[f"{which}/x"]
    # The part kept here has the multiples of 1/1024 as integers.
    return np.moveaxis(x / 1024 if x.dtype == np.int16 else x, 1, -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "which"),
    # What a grid changes shows in float64, what float32 changes on one grid.
    [(jnp.float64, "input_a"), (jnp.float64, "input_b"), (jnp.float32, "input_b")],
    ids=["float64-input_a", "float64-input_b", "float32-input_b"],
)
def test_logits_stages_and_gradients(data, official, which, dtype, tmp_path, x64):
    if f"{which}/x" not in data:
        pytest.skip("this input is only in the full set of goldens, ../shared/parity")
    single = dtype == jnp.float32
    values, gradient = (3e-5, 3e-3) if single else (1e-10, 1e-8)
    graphdef, state = nnx.split(load(tmp_path, data[f"{which}/num_slices"], official, param_dtype=dtype))
    x = jnp.asarray(input_of(data, which), dtype)

    @jax.jit
    def run(state):
        def loss(state):
            logits, volumes = with_stages(nnx.merge(graphdef, state), x)
            return jnp.sum(logits * jnp.asarray(weighting(logits.shape), dtype)) / logits.size, (logits, volumes)

        (value, (logits, volumes)), gradients = jax.value_and_grad(loss, has_aux=True)(state)
        return value, logits, gradients, volumes

    value, logits, gradients, volumes = run(state)
    logits = np.moveaxis(logits, -1, 1)
    assert logits.dtype == dtype
    assert abs(float(value) - data[f"{which}/loss"]) < (1e-7 if single else 1e-12)
    assert np.abs(logits[:, :, ::3, ::3, ::3] - data[f"{which}/logits_s3"]).max() < values
    wide = logits.astype(np.float64)
    assert np.abs(wide.sum((2, 3, 4)) - data[f"{which}/logits_sum"]).max() < (3e-2 if single else 1e-7)
    np.testing.assert_allclose(
        np.square(wide).sum((2, 3, 4)), data[f"{which}/logits_sumsq"], rtol=1e-6 if single else 1e-10
    )
    for stage, volume in enumerate(volumes if f"{which}/enc0" in data else []):
        assert np.abs(np.moveaxis(volume, -1, 1) - data[f"{which}/enc{stage}"]).max() < values
    if f"{which}/planes" in data:
        assert np.abs(logits[:, :, data[f"{which}/planes"]] - data[f"{which}/logits_planes"]).max() < values
    zero = 1e-7 if single else 1e-14
    compare_gradients(mh.export_official(gradients), data, which, data["exact_zero"], gradient, zero)


def test_bfloat16_stays_near(data, official, tmp_path):
    model = load(tmp_path, data["input_b/num_slices"], official, precision="bf16")
    logits = np.asarray(jax.jit(model)(jnp.asarray(input_of(data, "input_b"), jnp.float32)))
    assert logits.dtype == np.float32
    error = np.moveaxis(logits, -1, 1)[:, :, ::3, ::3, ::3] - data["input_b/logits_s3"]
    assert 1e-5 < np.abs(error).mean() < 0.05


def test_published_size():
    model = nnx.eval_shape(lambda: mh.SegMamba(4, 4, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 67_416_196
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), nnx.to_pure_dict(nnx.state(model)))
    exported = mh.export_official(zeros)
    assert len(exported) == 291 and sum(array.size for array in exported.values()) == 67_416_196


@pytest.mark.parametrize("suffix", ["", ".pth", ".npz", ".safetensors"])
def test_round_trip_is_bit_equal(suffix, official, tmp_path):
    """Slices too, which no tensor tells."""
    model = load(tmp_path, (16, 8, 4, 2), official)
    assert isinstance(model, mh.SegMamba)
    weights = read_weights(tmp_path / "w.npz")
    write_weights(tmp_path / f"again{suffix}", weights)
    again = mh.load_model(tmp_path / f"again{suffix}")
    assert again.config == model.config and again.config.num_slices == (16, 8, 4, 2)
    exported = mh.export_official(again)
    assert exported.keys() == official.keys()
    for name, array in official.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
        assert exported[name].dtype == array.dtype


def test_bare_weights_have_the_published_slices(official, tmp_path):
    np.savez(tmp_path / "bare.npz", **{f"module.{name}": array for name, array in official.items()})
    config = read_weights(tmp_path / "bare.npz").config
    assert config == SegMambaConfig(2, 3, (1, 2, 1, 1), (4, 5, 6, 8), hidden_size=10)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((48, 48, 48), r"48 48 48, which makes 216 tokens of stage 3; its 16 slices .* multiples of 32,.* 24 12 6 3"),
        ((96, 96, 48), r"96 96 48, which makes 108 tokens of stage 4.* multiples of 32,.* 48 24 12 6"),
        ((64, 64, 40), "width is 40, which 16 does not divide"),
        ((16, 16, 16), "one voxel at the deepest stage"),
    ],
)
def test_sizes_that_the_slices_do_not_divide(size, match):
    model = nnx.eval_shape(lambda: mh.SegMamba(rngs=nnx.Rngs(0)))
    with pytest.raises(mh.ConfigError, match=match):
        model(jnp.zeros((1, *size, 1)))


@pytest.mark.parametrize(
    "size", [(128,) * 3, (96,) * 3, (64,) * 3, (32,) * 3, (160,) * 3, (128, 128, 64), (96, 96, 32), (192, 192, 48)]
)
def test_sizes_that_the_release_takes(size):
    config = SegMambaConfig()
    config.check_size(size)
    assert config.for_patch(size) == config


@pytest.mark.parametrize("size", [(48, 48, 48), (80, 80, 80), (112, 112, 112), (96, 96, 48), (32, 48, 32)])
def test_other_patches_get_slices_that_fit(size):
    config = SegMambaConfig().for_patch(size)
    config.check_size(size)
    assert config.num_slices == tuple(size[0] // 2**stage for stage in range(1, 5))


def test_the_name_of_a_network_that_there_is_not():
    assert network_from_json(SegMambaConfig(4, 4).to_json()) == SegMambaConfig(4, 4)
    with pytest.raises(mh.ConfigError, match="network is 'UNETR'; expected one of MambaHoME, SegMamba"):
        network_from_json({"network": "UNETR"})


def test_windows_that_no_member_of_an_ensemble_may_refuse():
    members = nnx.eval_shape(lambda: [mh.SegMamba(rngs=nnx.Rngs(0))])
    Ensemble.of(members).check_window((96, 96, 96))
    with pytest.raises(mh.ConfigError, match="48 48 48, which makes 216 tokens"):
        Ensemble.of(members).check_window((48, 48, 48))
