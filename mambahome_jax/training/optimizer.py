"""Optimizers and the learning rate as published (parity/README.md, section 5), functions of the step count alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """What decides an update. `steps_per_period` updates share a learning rate; after `t_max` periods it is eta_min."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    eps: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    steps_per_period: int = 1
    t_max: int = 1
    eta_min: float = 0.0
    schedule_step: Literal["epoch", "published"] = "epoch"


class Optimizer(NamedTuple):
    """An optax transformation together with its learning rate: update number (from 0) -> scalar."""

    init: Callable
    update: Callable
    schedule: Callable[[jax.Array], jax.Array]


def make_schedule(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """Cosine annealing, constant within a period: function of the number of updates already made.

    "epoch" lowers the rate after the last update of a period, as the textbook has it; "published" one update later,
    since the published loop steps its scheduler after the first update of the next epoch.
    """
    late = int(config.schedule_step == "published")

    def schedule(count: jax.Array) -> jax.Array:
        period = jnp.clip((count - late) // config.steps_per_period, 0, config.t_max)
        # sin² of the way left equals (1 + cos)/2 of the way done, without its cancellation near the end.
        left = jnp.sin(jnp.pi / 2 * (config.t_max - period) / config.t_max)
        return config.eta_min + (config.lr - config.eta_min) * left**2

    return schedule


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """torch's AdamW (decoupled decay), Adam and SGD (decay added to the gradient); decay acts on every parameter.

    Adam and AdamW correct the bias of both moments and add eps outside the root, after the correction.
    """
    schedule = make_schedule(config)
    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(*config.betas, eps=config.eps)
    parts = {"AdamW": (adam, decay), "Adam": (decay, adam), "SGD": (decay,)}[config.name]
    transform = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    return Optimizer(transform.init, transform.update, schedule)
