"""Every layer against its float64 golden, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.model.home import GlobalSoftMoE, HoME
from mambahome_jax.model.layers import DynamicTanh, Numerics, RMSNorm
from mambahome_jax.model.mamba import Mamba
from mambahome_jax.model.network import GatedSpatialConv, ResidualBlock, UpBlock
from tests.conftest import load_golden

ROOT = "encoder.stages.1.blocks.0."


@pytest.fixture(scope="module")
def data():
    return load_golden("layers_tiny.npz")


class Block(nnx.Module):
    """DynamicTanh, then Mamba."""

    def __init__(self, norm, mamba):
        self.mamba_norm, self.mamba = norm, mamba

    def __call__(self, x):
        return self.mamba(self.mamba_norm(x))


def _common(dtype):
    return {"rngs": nnx.Rngs(0), "numerics": Numerics(dtype)}


def _home(channels, group, experts, slots, second, mult):
    def make(dtype):
        first = {"group_size": group, "num_experts": experts, "slots_per_expert": slots}
        return HoME(channels, **first, num_experts_second=second, expert_mult=mult, **_common(dtype))

    return make


def _second(experts):
    return lambda dtype: GlobalSoftMoE(10, experts, 2, **_common(dtype))


def _block(dtype):
    return Block(DynamicTanh(16, param_dtype=dtype), Mamba(16, **_common(dtype)))


# case -> (module, where it would stand in the network, published prefix there, inputs)
BLOCK, MLP = "mamba_encoder.mamba_blocks.1.0.", "mamba_encoder.moe_layers.1.0.mlp."
CASES = {
    "mamba": (lambda t: Mamba(20, **_common(t)), ROOT + "mamba", BLOCK + "mamba.", ("x",)),
    "mambablock": (_block, ROOT[:-1], BLOCK, ("x",)),
    "dyt_in": (lambda t: DynamicTanh(11, param_dtype=t), ROOT + "mamba_norm", BLOCK + "norm.", ("x",)),
    "dyt_above": (lambda t: DynamicTanh(11, param_dtype=t), ROOT + "mamba_norm", BLOCK + "norm.", ("x",)),
    "dyt_below": (lambda t: DynamicTanh(11, param_dtype=t), ROOT + "mamba_norm", BLOCK + "norm.", ("x",)),
    "gsc": (lambda t: GatedSpatialConv(6, **_common(t)), "encoder.stages.1.gsc", "mamba_encoder.gscs.1.", ("x",)),
    "home_nopad": (_home(12, 16, 3, 2, 4, 2), ROOT + "home", MLP, ("x",)),
    "home_pad": (_home(12, 16, 3, 2, 4, 2), ROOT + "home", MLP, ("x",)),
    "home_gateclamp": (_home(10, 16, 2, 3, 6, 3), ROOT + "home", MLP, ("x",)),
    "dsm_pad": (_second(6), ROOT + "home.second", MLP + "dynamic_slots_soft_moe.", ("x",)),
    "dsm_nopad": (_second(4), ROOT + "home.second", MLP + "dynamic_slots_soft_moe.", ("x",)),
    "basic_res": (lambda t: ResidualBlock(5, 7, **_common(t)), "decoder.skips.1", "encoder2.", ("x",)),
    "basic_same": (lambda t: ResidualBlock(6, 6, **_common(t)), "decoder.skips.1", "encoder2.", ("x",)),
    "up": (lambda t: UpBlock(8, 5, **_common(t)), "decoder.ups.1", "decoder4.", ("inp", "skip")),
}


def _official(module_state, root: str, prefix: str):
    """Published names below `prefix` of a part of the network that stands at `root`."""
    from mambahome_jax.weights.weights import export_official

    nested = nnx.to_pure_dict(module_state) if isinstance(module_state, nnx.State) else module_state
    for part in reversed(root.split(".")):
        nested = {part: nested}
    return {name.removeprefix(prefix): array for name, array in export_official(nested).items()}


def _load(module, root, prefix, params, dtype):
    """Fill a module from published names, through the exporter run on its own index arrays."""
    state = nnx.state(module)
    leaves, treedef = jax.tree.flatten(state)
    indices, start = [], 0
    for leaf in leaves:
        indices.append(np.arange(start, start + leaf.size).reshape(leaf.shape))
        start += leaf.size
    flat = np.full(start, np.nan)
    for name, index in _official(jax.tree.unflatten(treedef, indices), root, prefix).items():
        flat[index.reshape(-1)] = params[name].reshape(-1)
    assert not np.isnan(flat).any()
    nnx.update(module, jax.tree.unflatten(treedef, [jnp.asarray(flat[i], dtype) for i in indices]))


def _last(array):
    return np.moveaxis(array, 1, -1) if array.ndim == 5 else array


@pytest.mark.parametrize("case", CASES)
def test_layer(data, case, x64):
    """In float64; that float32 loses nothing is tested of the whole network, see test_parity.py."""
    dtype, bound = jnp.float64, 1e-10
    make, root, prefix, names = CASES[case]
    module = make(dtype)
    params = {k.removeprefix(f"{case}/param/"): v for k, v in data.items() if k.startswith(f"{case}/param/")}
    params = {_alias(case, name): value for name, value in params.items()}
    _load(module, root, prefix, params, dtype)
    graphdef, state = nnx.split(module)
    inputs = [jnp.asarray(_last(data[f"{case}/{name}"]), dtype) for name in names]
    R = jnp.asarray(_last(data[f"{case}/R"]), dtype)

    @jax.jit
    def run(state, inputs):
        def loss(state, inputs):
            out = nnx.merge(graphdef, state)(*inputs)
            return jnp.sum(out * R), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, inputs)

    (dparams, dinputs), out = run(state, inputs)
    _close(out, _last(data[f"{case}/out"]), bound, "out")
    for name, gradient in zip(names, dinputs, strict=True):
        _close(gradient, _last(data[f"{case}/grad/{name}"]), bound, name)
    largest = max(np.abs(data[f"{case}/grad/{name}"]).max() for name in names)
    got = _official(dparams, root, prefix)
    for key, value in data.items():
        if key.startswith(f"{case}/grad/param/"):
            name = _alias(case, key.removeprefix(f"{case}/grad/param/"))
            if np.abs(value).max() < 1e-12 * largest:
                assert np.abs(got[name]).max() <= bound * largest, name
            else:
                _close(got[name], value, bound, name)


def _alias(case: str, name: str) -> str:
    """Names of a case as they stand in the network, where the golden's differ."""
    if case == "mambablock" and name.split(".")[0] in ("alpha", "weight", "bias"):
        return f"norm.{name}"
    return name


def _close(got, expected, bound, what):
    scale = max(np.abs(expected).max(), 1e-30)
    assert np.abs(np.asarray(got, np.float64) - expected).max() <= bound * scale, what


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-9, 1])
def test_rms_norm_of_small_vectors_is_as_published_and_has_a_gradient(scale):
    """Air is 0 in a scan, and stays so in a network without biases."""
    norm, x = RMSNorm(4, param_dtype=jnp.float32), scale * np.array([1.0, -2, 3, 0.5], np.float32)
    expected = x / max(np.linalg.norm(x.astype(np.float64)), 1e-8) * 2
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
    assert bool(jnp.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all())
