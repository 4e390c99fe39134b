"""One training step as one compiled function: augmentation, loss, gradient, update. Knows no files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mambahome_jax.config import AugmentationConfig, Strategy
from mambahome_jax.data.augmentation import augment
from mambahome_jax.training.optimizer import Optimizer
from mambahome_jax.training.sharding import put_tree, replicated, tree_sharding

LossFunction = Callable[[jax.Array, jax.Array], jax.Array]
Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes."""

    step: jax.Array  # int32 scalar, updates made
    params: Any  # nested dict of arrays, as nnx.to_pure_dict gives it
    opt_state: Any


def abstract_state(params: Any, optimizer: Optimizer) -> TrainState:
    """Shapes and dtypes of a state, from those of its parameters: what a checkpoint is restored into."""
    return jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p)), params)


def init_state(params: Any, optimizer: Optimizer, mesh: Mesh, strategy: Strategy = "ddp") -> TrainState:
    """State before the first step. The parameters are copied, as each step gives its state's memory to the next."""

    def start(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    shardings = tree_sharding(abstract_state(params, optimizer), mesh, strategy)
    # From the host the arrays go straight to where they belong.
    params = put_tree(params, shardings.params)
    return jax.jit(start, out_shardings=shardings)(params)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    mesh: Mesh,
    seed: int,
    augmentation: AugmentationConfig | None = None,
    strategy: Strategy = "ddp",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """jit of (state, batch) -> (state, metrics): batch split over `data`, state donated.

    Args:
        graphdef: of the model, `nnx.split(model)[0]`; model((b, D, H, W, in)) -> logits (b, D, H, W, classes).
        loss_fn: (logits, labels (b, D, H, W) integer) -> scalar, a mean over the batch.
        seed: of the augmentation; its key is fold_in(key(seed), step), so that nothing but the step is to be stored.
        augmentation: None for none.

    The batch is {"image": (b, D, H, W, in), "label": (b, D, H, W)}. Metrics are scalars of this step: loss and
    grad_norm before its update, update_norm, and the lr used.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        image, label = batch["image"], batch["label"]
        if augmentation is not None:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            image, label = augment(key, image, label, augmentation)

        def objective(params: Any) -> jax.Array:
            return loss_fn(nnx.merge(graphdef, params)(image), label)

        loss, grads = jax.value_and_grad(objective)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.lax.with_sharding_constraint(new, tree_sharding(new, mesh, strategy))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "lr": optimizer.schedule(state.step),
        }
        return new, jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return jax.jit(train_step, donate_argnums=0)
