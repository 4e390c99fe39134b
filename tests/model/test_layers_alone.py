"""The layers that can be used alone: against float64 goldens of the published ones, and what they refuse."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from tests.conftest import FULL, REDUCED, ROOT

# published name -> ours
DIRECTION = {
    "A{}_log": "A_log",
    "D{}": "D",
    "conv1d{}.weight": "conv.kernel",
    "conv1d{}.bias": "conv.bias",
    "x_proj{}.weight": "x_proj.kernel",
    "dt_proj{}.weight": "dt_proj.kernel",
    "dt_proj{}.bias": "dt_bias",
}
PROJECTIONS = {
    f"{name}.{part}": f"{name}.{ours}"
    for name in ("in_proj", "out_proj")
    for part, ours in (("weight", "kernel"), ("bias", "bias"))
}
MAMBA = {name.format(""): ours for name, ours in DIRECTION.items()} | PROJECTIONS
BIMAMBA = PROJECTIONS | {
    name.format(suffix): f"{place}.{ours}"
    for suffix, place in (("", "forward"), ("_b", "backward"), ("_s", "slices"))
    for name, ours in DIRECTION.items()
}
SOFTMOE = {
    "mu": "mu",
    "scale": "scale",
    **{f"{part}{n}": f"{part}_{way}" for n, way in ((1, "in"), (2, "out")) for part in ("kernel", "bias")},
}


def _mamba(config, **common):
    return mh.Mamba(**config, **common)


def _bimamba(config, **common):
    return mh.BiMamba(config["d_model"], num_slices=config["nslices"], **common)


def _softmoe(config, **common):
    shape = {"num_experts": config["num_experts"], "slots_per_expert": config["num_slots"], "hidden": config["mlp_dim"]}
    return mh.SoftMoE(config["dim"], **shape, approximate_gelu=config["gelu"] == "tanh", **common)


CASES = {
    "mamba_default": (_mamba, MAMBA),
    "mamba_options": (_mamba, MAMBA),
    "mamba_short": (_mamba, MAMBA),
    "bimamba": (_bimamba, BIMAMBA),
    "softmoe": (_softmoe, SOFTMOE),
    "softmoe_erf": (_softmoe, SOFTMOE),
    "softmoe_uneven": (_softmoe, SOFTMOE),
}
LAYERS = {
    "Mamba": lambda **more: mh.Mamba(6, **more),
    "BiMamba": lambda **more: mh.BiMamba(6, **more),
    "HoME": lambda **more: mh.HoME(6, **{"group_size": 5} | more),
    "SoftMoE": lambda **more: mh.SoftMoE(6, **{"num_experts": 3} | more),
}


@pytest.fixture(scope="module")
def data():
    """The full golden where it is there, else the part of it kept here."""
    folder = next(root for root in (FULL, REDUCED) if (root / "baselines/layers_baselines.npz").exists())
    with np.load(folder / "baselines/layers_baselines.npz") as archive:
        return {key: archive[key] for key in archive.files}


def _ours(published: np.ndarray, name: str) -> np.ndarray:
    """A published array in our layout: linear and convolution weights have their inputs last."""
    if "conv1d" in name and name.endswith("weight"):
        return published[:, 0].T
    return published.T if name.endswith("weight") else published


def _close(got, expected, bound, what):
    assert np.shape(got) == expected.shape, what
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= bound * np.abs(expected).max(), what


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "values", "gradient"), [(jnp.float32, 3e-6, 1e-5), (jnp.float64, 1e-12, 1e-11)], ids=["f32", "f64"]
)
def test_outputs_and_gradients(data, case, dtype, values, gradient, x64):
    if f"{case}/x" not in data:
        pytest.skip("this case is only in the full set of goldens, ../shared/parity")
    make, names = CASES[case]
    layer = make(json.loads(str(data[f"{case}/config_json"])), rngs=nnx.Rngs(0), numerics=mh.Numerics(dtype))
    state = nnx.state(layer)
    given = {key.split("/param/")[1]: key for key in data if key.startswith(f"{case}/param/")}
    flat = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
    assert {names[name] for name in given} == {*flat}
    graphdef, _ = nnx.split(layer)
    params = nnx.from_flat_state(
        [(flat[names[name]], nnx.Param(jnp.asarray(_ours(data[key], name), dtype))) for name, key in given.items()]
    )
    x, R = (jnp.asarray(data[f"{case}/{name}"], dtype) for name in ("x", "R"))

    @jax.jit
    def run(params, x):
        def loss(params, x):
            out = nnx.merge(graphdef, params)(x)
            return jnp.sum(out * R), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (dparams, dx), out = run(params, x)
    assert out.dtype == dtype
    _close(out, data[f"{case}/out"], values, "out")
    _close(dx, data[f"{case}/grad/x"], gradient, "x")
    gradients = dict(nnx.to_flat_state(dparams))
    for name in given:
        expected = _ours(data[f"{case}/grad/param/{name}"], name)
        _close(gradients[flat[names[name]]][...], expected, gradient, name)


def test_the_three_directions_are_one_layer_each(x64):
    """Against Mamba itself on the tokens in the order of each direction."""
    numerics = mh.Numerics(jnp.float64)
    layer = mh.BiMamba(6, num_slices=3, rngs=nnx.Rngs(0), numerics=numerics)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 6)))
    orders = {
        "forward": np.arange(12),
        "backward": np.arange(12)[::-1],
        "slices": np.array([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
    }
    expected = np.zeros((2, 12, 6))
    for name, order in orders.items():
        alone = mh.Mamba(6, rngs=nnx.Rngs(1), numerics=numerics)
        nnx.update(alone, nnx.state(getattr(layer, name)))
        nnx.update(alone.in_proj, nnx.state(layer.in_proj))
        nnx.update(alone.out_proj, nnx.state(layer.out_proj))
        expected[:, order] += np.asarray(alone(tokens[:, order]))
    np.testing.assert_allclose(layer(tokens), expected, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_defaults_keep_shape_and_dtype(name, precision):
    layer = LAYERS[name](rngs=nnx.Rngs(0), numerics=mh.Numerics(precision=precision))
    tokens = jnp.ones((2, 7, 6), jnp.bfloat16 if precision == "bf16" else jnp.float32)
    out = jax.jit(lambda tokens: layer(tokens))(tokens)
    assert (out.shape, out.dtype) == (tokens.shape, tokens.dtype) and bool(jnp.isfinite(out).all())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(layer)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (np.zeros((2, 7, 5)), r"shape \(2, 7, 5\); expected \(batch, length from 1 on, 6\)"),
        (np.zeros((7, 6)), r"shape \(7, 6\); expected \(batch"),
        (np.zeros((2, 0, 6)), r"shape \(2, 0, 6\); expected \(batch"),
        (np.zeros((2, 7, 6), int), "are int32; expected float32"),
    ],
)
def test_tokens_that_cannot_be(name, tokens, match):
    layer = LAYERS[name](rngs=nnx.Rngs(0))
    with pytest.raises(mh.ConfigError, match=match):
        layer(jnp.asarray(tokens))
    with pytest.raises(mh.ConfigError, match="the tokens are a list; expected an array"):
        layer([[1.0]])


def test_slices_that_do_not_divide_the_length():
    with pytest.raises(mh.ConfigError, match=r"10 tokens .*, which num_slices = 4 does not divide"):
        mh.BiMamba(6, num_slices=4, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 6)))


@pytest.mark.parametrize(
    ("name", "size"),
    [("Mamba", "d_state"), ("BiMamba", "num_slices"), ("HoME", "group_size"), ("SoftMoE", "num_experts")],
)
def test_sizes_that_cannot_be(name, size):
    with pytest.raises(mh.ConfigError, match=f"{size} is 0; expected 1 or more"):
        LAYERS[name](rngs=nnx.Rngs(0), **{size: 0})
    with pytest.raises(mh.ConfigError, match=f"{size} is 1.5; expected a whole number"):
        LAYERS[name](rngs=nnx.Rngs(0), **{size: 1.5})


def test_only_the_forward_direction_begins_with_small_steps():
    layer = mh.BiMamba(48, rngs=nnx.Rngs(0))
    steps = {name: np.log1p(np.exp(getattr(layer, name).dt_bias[...])) for name in ("forward", "backward", "slices")}
    assert 0.00099 < steps["forward"].min() < steps["forward"].max() < 0.101
    for name in ("backward", "slices"):
        # softplus of a bias within +-1/sqrt(rank 3)
        assert 0.44 < steps[name].min() < 0.5 and 0.9 < steps[name].max() < 1.03


def test_soft_moe_begins_as_published():
    layer = mh.SoftMoE(32, num_experts=5, slots_per_expert=2, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel_in[...])
    assert kernel.shape == (5, 32, 128) and (kernel == kernel[0]).all()
    bound = np.sqrt(6 / 160)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert 0 < np.abs(layer.bias_out[...]).max() < 1e-5
    assert float(layer.scale[...]) == 1 and abs(float(jnp.std(layer.mu[...])) * np.sqrt(32) - 1) < 0.1


def test_the_examples_of_the_page_run():
    lines = (ROOT / "docs/reference/layers.md").read_text(encoding="utf-8").splitlines()
    code = [line.removeprefix("    ") for line in lines if line.startswith("    ")]
    assert len(code) > 15
    exec("\n".join(code), {})
