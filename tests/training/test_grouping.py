"""Joined small arrays: the same tree comes back, and an optimizer makes the same updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mambahome_jax.training import optimizer
from mambahome_jax.training.optimizer import group, on_groups, ungroup


@pytest.fixture
def tree(monkeypatch):
    monkeypatch.setattr(optimizer, "SMALL", 20)
    rng = np.random.default_rng(0)
    shapes = {"encoder": {"a": (3, 4), "b": (40,)}, "decoder": [(), (5,), (2, 30)]}
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))


def test_there_and_back(tree):
    grouped = group(tree)
    assert set(grouped["large"]) == {"encoder/b", "decoder/2"}
    assert {name: v.shape for name, v in grouped["small"].items()} == {"float32": (1024,)}
    back = ungroup(grouped, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_types_are_not_mixed(x64):
    tree = {"a": jnp.ones(3, jnp.float32), "b": jnp.full(2, 2.0, jnp.float64), "c": jnp.zeros(1, jnp.float32)}
    grouped = group(tree)
    assert {name: (v.dtype.name, v.size) for name, v in grouped["small"].items()} == {
        "float32": ("float32", 1024),
        "float64": ("float64", 1024),
    }
    jax.tree.map(np.testing.assert_array_equal, ungroup(grouped, tree), tree)


def test_updates_are_those_of_the_tree(tree):
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    plain, joined = (inner.init(tree), on_groups(inner).init(tree))
    for step in range(3):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(p * (step + 1)), tree)
        expected, plain = inner.update(gradients, plain, tree)
        got, joined = on_groups(inner).update(gradients, joined, tree)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), got, expected)
