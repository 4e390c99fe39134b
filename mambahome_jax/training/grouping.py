"""Small arrays of a tree joined into one vector: what is done to each element by itself is then one program, not
hundreds, which XLA compiles and a GPU starts in a fraction of the time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mambahome_jax.training.sharding import SMALLEST_SPLIT

# Both are part of what a checkpoint looks like.
SMALL = SMALLEST_SPLIT  # elements of an array below which it is joined: what is split would have to be gathered for it
_MULTIPLE = 1024  # of elements of a vector, so that it can be split over any usual number of devices


def group(tree: Any) -> dict[str, Any]:
    """{"large": {path: array}, "small": {dtype: vector}} of a tree of arrays; vectors end with zeros."""
    large: dict[str, jax.Array] = {}
    small: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.size < SMALL:
            small.setdefault(str(leaf.dtype), []).append(leaf.ravel())
        else:
            large[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return {"large": large, "small": {dtype: _joined(leaves) for dtype, leaves in small.items()}}


def _joined(vectors: list[jax.Array]) -> jax.Array:
    rest = -sum(v.size for v in vectors) % _MULTIPLE
    return jnp.concatenate([*vectors, jnp.zeros(rest, vectors[0].dtype)])


def ungroup(grouped: dict[str, Any], like: Any) -> Any:
    """The tree that `group` was given, from its result; `like` has its structure, shapes and dtypes."""
    starts = dict.fromkeys(grouped["small"], 0)

    def leaf_of(path: tuple, leaf: jax.Array) -> jax.Array:
        if leaf.size >= SMALL:
            return grouped["large"][jax.tree_util.keystr(path, simple=True, separator="/")]
        dtype = str(leaf.dtype)
        start = starts[dtype]
        starts[dtype] += leaf.size
        return grouped["small"][dtype][start : start + leaf.size].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(leaf_of, like)


def on_groups(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, which must treat every element alike, on the grouped tree; its state is grouped too."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(group(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        grouped, state = inner.update(group(updates), state, None if params is None else group(params), **extra)
        return ungroup(grouped, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
