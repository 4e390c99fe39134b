"""Optimizers as published (parity/README.md, section 5) and what other recipes change, on small arrays joined to one.

What is done to each element by itself is then one program, not hundreds, which XLA compiles and a GPU starts in a
fraction of the time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.distributed import SMALLEST_SPLIT

# Both are part of what a checkpoint looks like.
SMALL = SMALLEST_SPLIT  # elements of an array below which it is joined: what is split would have to be gathered for it
_MULTIPLE = 1024  # of elements of a vector, so that it can be split over any usual number of devices


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Make torch's AdamW (decoupled decay), Adam or SGD (decay added to the gradient); `update` takes `rate` too.

    Adam and AdamW correct the bias of both moments and add eps outside the root, after the correction. Decay acts on
    every parameter; clipping comes before everything else.
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(*config.betas, eps=config.eps)
    sgd = (decay, optax.trace(config.momentum, nesterov=True)) if config.momentum else (decay,)
    parts = list({"AdamW": (adam, decay), "Adam": (decay, adam), "SGD": sgd}[config.name])
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    transform = on_groups(optax.chain(*parts, _scale_by_rate()))
    if config.encoder_lr_scale != 1:
        transform = optax.chain(transform, _scale_encoder(config.encoder_lr_scale))
    return optax.with_extra_args_support(transform)


def is_encoder(path: tuple) -> bool:
    """Whether a path of jax.tree_util leads to a parameter of the encoder."""
    return any(getattr(key, "key", None) == "encoder" for key in path)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply by -rate. The state is that of optax.scale_by_learning_rate, as checkpoints hold it."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> tuple[Any, Any]:
        updates = jax.tree.map(lambda u: jnp.asarray(-rate, u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_encoder(scale: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
            lambda path, u: u * scale if is_encoder(path) else u, updates
        )
    )


def on_groups(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply `inner`, which must treat every element alike, to the grouped tree; its state is grouped too."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(group(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        grouped, state = inner.update(group(updates), state, None if params is None else group(params), **extra)
        return ungroup(grouped, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def group(tree: Any) -> dict[str, Any]:
    """{"large": {path: array}, "small": {dtype: vector}} of a tree of arrays; vectors end with zeros."""
    large: dict[str, jax.Array] = {}
    small: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.size < SMALL:
            small.setdefault(str(leaf.dtype), []).append(leaf.ravel())
        else:
            large[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return {"large": large, "small": {dtype: _concatenate(leaves) for dtype, leaves in small.items()}}


def _concatenate(vectors: list[jax.Array]) -> jax.Array:
    rest = -sum(v.size for v in vectors) % _MULTIPLE
    return jnp.concatenate([*vectors, jnp.zeros(rest, vectors[0].dtype)])


def ungroup(grouped: dict[str, Any], like: Any) -> Any:
    """Undo `group`; `like` has the tree's structure, shapes and dtypes."""
    starts = dict.fromkeys(grouped["small"], 0)

    def leaf_of(path: tuple, leaf: jax.Array) -> jax.Array:
        if leaf.size >= SMALL:
            return grouped["large"][jax.tree_util.keystr(path, simple=True, separator="/")]
        dtype = str(leaf.dtype)
        start = starts[dtype]
        starts[dtype] += leaf.size
        return grouped["small"][dtype][start : start + leaf.size].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(leaf_of, like)
