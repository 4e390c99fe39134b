"""What the figures of benchmarks rest on: operations counted, memory planned, JSON written."""

import argparse
import importlib
import json
import math

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import ROOT


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), [(1, 1)] * 3, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


X, KERNEL, MATRIX = jnp.ones((2, 8, 8, 8, 4)), jnp.ones((3, 3, 3, 4, 6)), jnp.ones((6, 6))
CONVOLUTION, PRODUCT = 2 * 2 * 512 * 6 * 27 * 4, 2 * 1024 * 6 * 6


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: _convolve(X, KERNEL), CONVOLUTION),
        (lambda: jax.grad(lambda x, k: _convolve(x, k).sum(), (0, 1))(X, KERNEL), 3 * CONVOLUTION),
        (lambda: jax.jit(_convolve)(X, KERNEL) @ MATRIX, CONVOLUTION + PRODUCT),
        (lambda: jax.lax.scan(lambda y, _: (y @ MATRIX, None), jnp.ones((1024, 6)), length=5)[0], 5 * PRODUCT),
        (lambda: jax.lax.cond(X.sum() > 0, lambda a: a @ MATRIX, lambda a: a, jnp.ones((1024, 6))), PRODUCT),
        # Once forward, once more for the backward pass, twice in it.
        (
            lambda: jax.grad(jax.checkpoint(lambda a, m: jnp.sin(jnp.sin(a @ m) @ m).sum()), (0, 1))(
                jnp.ones((1024, 6)), MATRIX
            ),
            8 * PRODUCT,
        ),
    ],
    ids=["convolution", "its gradients", "with a product", "scan", "cond", "checkpoint"],
)
def test_operations_are_those_counted_by_hand(load, function, expected):
    assert load("flops").matrix_flops(jax.jit(function).trace().jaxpr) == expected


def test_planned_memory_has_arguments_and_results(load):
    compiled = jax.jit(lambda a: a @ a + 1).lower(jax.ShapeDtypeStruct((512, 512), jnp.float32)).compile()
    planned = load("figures").planned_gib(compiled)
    assert math.isnan(planned) or 2 * 2**20 <= planned * 2**30 < 6 * 2**20


def test_a_table_is_json_where_something_was_not_measured(load, tmp_path):
    path = tmp_path / "rows.json"
    args = argparse.Namespace(json=path, store=tmp_path, runs=3)
    load("figures").write_rows(path, args, [{"ms": 1.5, "of_peak": math.nan, "size": (16, 16, 16)}])
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["rows"] == [{"ms": 1.5, "of_peak": None, "size": [16, 16, 16]}]
    assert found["about"]["runs"] == 3 and found["about"]["store"] == str(tmp_path) and "json" not in found["about"]
