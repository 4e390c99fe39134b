"""Optimizers and the learning rate as published (parity/README.md, section 5), and what other recipes change."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training.grouping import on_groups


class Schedule(Protocol):
    """(number of updates already made, fraction of the time spent or None) -> learning rate, both scalars."""

    def __call__(self, count: jax.Array, fraction: jax.Array | None = None) -> jax.Array: ...


class Optimizer(NamedTuple):
    """An optax transformation together with its learning rate; `update` also takes `fraction`, see make_schedule."""

    init: Callable
    update: Callable
    schedule: Schedule


def make_schedule(config: OptimizerConfig) -> Schedule:
    """Cosine annealing, constant within a period: function of the number of updates already made.

    With a fraction (0 to 1) of a time budget, the cosine runs over that, without periods, and the count matters for the
    warm-up alone. "epoch" lowers the rate after the last update of a period, as the textbook has it; "published" one
    update later, since the published loop steps its scheduler after the first update of the next epoch.
    """
    late = int(config.schedule_step == "published")

    def schedule(count: jax.Array, fraction: jax.Array | None = None) -> jax.Array:
        # sin² of the way left equals (1 + cos)/2 of the way done, without its cancellation near the end.
        if fraction is None:
            period = jnp.clip((count - late) // config.steps_per_period, 0, config.t_max)
            left = jnp.sin(jnp.pi / 2 * (config.t_max - period) / config.t_max)
        else:
            left = jnp.sin(jnp.pi / 2 * (1 - jnp.clip(fraction, 0, 1)))
        rate = config.eta_min + (config.lr - config.eta_min) * left**2
        if config.warmup_steps:
            rate = rate * jnp.minimum(count + 1, config.warmup_steps) / config.warmup_steps
        return rate

    return schedule


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """torch's AdamW (decoupled decay), Adam and SGD (decay added to the gradient); decay acts on every parameter.

    Adam and AdamW correct the bias of both moments and add eps outside the root, after the correction. Clipping comes
    before everything else.
    """
    schedule = make_schedule(config)
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(*config.betas, eps=config.eps)
    sgd = (decay, optax.trace(config.momentum, nesterov=True)) if config.momentum else (decay,)
    parts = list({"AdamW": (adam, decay), "Adam": (decay, adam), "SGD": sgd}[config.name])
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    transform = on_groups(optax.chain(*parts, _scale_by_rate(schedule)))
    if config.encoder_lr_scale != 1:
        transform = optax.chain(transform, _scale_encoder(config.encoder_lr_scale))
    return Optimizer(transform.init, transform.update, schedule)


def is_encoder(path: tuple) -> bool:
    """Whether a path of jax.tree_util leads to a parameter of the encoder."""
    return any(getattr(key, "key", None) == "encoder" for key in path)


def _scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_learning_rate with a rate that may follow the fraction of a time budget; same state."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: optax.ScaleByScheduleState,
        params: Any = None,
        *,
        fraction: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = -schedule(state.count, fraction)
        updates = jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_encoder(scale: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
            lambda path, u: u * scale if is_encoder(path) else u, updates
        )
    )
