"""Which values of the forward pass are kept for the backward pass, and which are computed again."""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"
_SCAN = "selective_scan"  # the name that the kernels give to their result and to what their gradient needs
Tree = TypeVar("Tree")


def keep(tree: Tree) -> Tree:
    """Marks what costs much to compute for the memory it takes: results of convolutions and large products, and
    statistics."""
    return checkpoint_name(tree, _KEPT)


def remat(everything: bool, module: nnx.Module, *arrays: jax.Array) -> jax.Array:
    """module(*arrays).

    With `everything` (--use_checkpoint) only the arguments are kept for the backward pass. Otherwise on a GPU, whose
    memory is small and whose time for norms and activations is short, all but what is marked is computed again.
    """
    if everything:
        return nnx.remat(_call)(module, *arrays)
    if jax.default_backend() != "gpu":
        return _call(module, *arrays)
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT, _SCAN)
    return nnx.remat(_call, policy=policy)(module, *arrays)


def _call(module: Any, *arrays: jax.Array) -> jax.Array:
    return module(*arrays)
