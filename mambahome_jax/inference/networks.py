"""Flax networks at work: on a device, and compiled once for validation and inference."""

import functools
from functools import partial
from typing import Any

import jax
from flax import nnx

from mambahome_jax.inference.tiled import Predict
from mambahome_jax.support.devices import compiler_options


def on_device(network: nnx.Module, device: jax.Device | None) -> Predict:
    """Put a network on a device; None leaves it where it is."""
    graph, state = nnx.split(network)
    return partial(apply_network, graph, state if device is None else jax.device_put(state, device))


def bind(network: nnx.Module) -> None:
    """Bind a network to the first device as in validation, so that the program which that compiled is found again."""
    nnx.update(network, jax.device_put(nnx.state(network), jax.devices()[0]))


def apply_network(graph: nnx.GraphDef, state: Any, windows: jax.Array) -> jax.Array:
    """Logits of windows. Validation calls it too, so that inference finds it compiled in the cache."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, windows))):
        return _logits(graph, state, windows)  # a part of what the caller compiles, which may not have own options
    return compiled_network()(graph, state, windows)


def _logits(graph: nnx.GraphDef, state: Any, windows: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(windows)


@functools.cache
def compiled_network() -> Any:
    """jit of (graphdef, state, windows) -> logits."""
    return jax.jit(_logits, static_argnums=0, compiler_options=compiler_options())
