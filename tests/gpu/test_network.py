"""The networks on a GPU against the float64 goldens of the published code, in each precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.weights.model_path import load_model
from tests.conftest import REDUCED, golden_path, load_golden
from tests.model.test_segmamba import GOLDEN, input_of, load, published_of

pytestmark = pytest.mark.skipif(
    jax.devices()[0].platform != "gpu", reason="there is no GPU (JAX_PLATFORMS=cuda,cpu runs these tests)"
)

PRECISIONS = pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 1e-1)])


@PRECISIONS
def test_logits(precision, bound):
    with np.load(REDUCED / "mambahome_tiny_expected.npz") as archive:
        x, exact = (np.moveaxis(archive[f"input_b/{name}"], 1, -1) for name in ("x", "logits"))
    model = load_model(golden_path("mambahome_tiny.pth"), precision=precision)
    _compare(_logits(model, x), exact, precision, bound)


@PRECISIONS
def test_logits_of_segmamba(precision, bound, tmp_path):
    data = load_golden(GOLDEN)
    model = load(tmp_path, data["input_b/num_slices"], published_of(data), precision=precision)
    logits = _logits(model, input_of(data, "input_b"))[:, ::3, ::3, ::3]
    _compare(logits, np.moveaxis(data["input_b/logits_s3"], 1, -1), precision, bound)


def _logits(model, x):
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    return np.asarray(run(params, jnp.asarray(x, jnp.float32)), np.float64)


def _compare(logits, exact, precision, bound):
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    print(precision, f"{error:.1e}")
    assert error < bound
