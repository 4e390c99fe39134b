"""The network on a GPU against the float64 goldens of the published code, in each precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.weights.weights import load_model
from tests.conftest import REDUCED, golden_path

pytestmark = pytest.mark.skipif(
    jax.devices()[0].platform != "gpu", reason="there is no GPU (JAX_PLATFORMS=cuda,cpu runs these tests)"
)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 1e-1)])
def test_logits(precision, bound):
    with np.load(REDUCED / "mambahome_tiny_expected.npz") as archive:
        x, exact = (np.moveaxis(archive[f"input_b/{name}"], 1, -1) for name in ("x", "logits"))
    model = load_model(golden_path("mambahome_tiny.pth"), precision=precision)
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    logits = np.asarray(run(params, jnp.asarray(x, jnp.float32)), np.float64)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    print(precision, f"{error:.1e}")
    assert error < bound
