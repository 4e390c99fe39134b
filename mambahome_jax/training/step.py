"""One training step, compiled: augmentation, loss, gradient, update. Knows no files and no schedule."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mambahome_jax.config import Strategy
from mambahome_jax.model.layers import ChannelDropout
from mambahome_jax.recipes import AugmentationConfig
from mambahome_jax.support.devices import compiler_options
from mambahome_jax.support.processes import in_thread
from mambahome_jax.training.augmentation import augment, augment_labelled
from mambahome_jax.training.distributed import batch_sharding, device_put_tree, replicated, tree_sharding
from mambahome_jax.training.losses import LossFunction, network_params
from mambahome_jax.training.optimizer import group, is_encoder

Batch = dict[str, jax.Array]
# (state, batch, learning rate) -> (state, metrics)
TrainStep = Callable[..., tuple["TrainState", dict[str, jax.Array]]]
_DROPOUT_KEY = 1 << 30  # beyond any sample of a batch, from whose places augmentation draws


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. `ema`: moving average of the network's parameters, None without one."""

    step: jax.Array  # int32 scalar, updates made
    params: Any  # nested dict of arrays, as nnx.to_pure_dict gives it
    opt_state: Any
    ema: Any = None


def deployed_params(state: TrainState) -> Any:
    """The network to validate and to keep for inference: the moving average where there is one; without heads."""
    return network_params(state.params) if state.ema is None else state.ema


def _new_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    average = jax.tree.map(jnp.copy, network_params(params)) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params), average)


def abstract_state(params: Any, optimizer: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """Shapes and dtypes of a state, from those of its parameters: what a checkpoint is restored into."""
    return jax.eval_shape(lambda p: _new_state(p, optimizer, ema), params)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, strategy: Strategy = "ddp", ema: bool = False
) -> TrainState:
    """State before the first step. The parameters are copied, as each step gives its state's memory to the next."""
    shardings = tree_sharding(abstract_state(params, optimizer, ema), mesh, strategy)
    # Split before the state is made of them: no device holds a whole one.
    params = device_put_tree(params, shardings.params)
    return jax.jit(lambda p: _new_state(p, optimizer, ema), out_shardings=shardings)(params)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    loss_fn: LossFunction,
    mesh: Mesh,
    seed: int,
    augmentation: AugmentationConfig | None = None,
    strategy: Strategy = "ddp",
    ema_decay: float = 0.0,
    freeze_encoder: bool = False,
    dropout: float = 0.0,
) -> TrainStep:
    """Compile (state, batch, learning rate) -> (state, metrics): batch split over `data`, state donated.

    The batch is {"image": (b, D, H, W, in), "label": (b, D, H, W)}, and "labelled" (b, classes) where loss_fn is to get
    that too. Metrics are scalars: loss and grad_norm before the update, update_norm, lr. seed: of augmentation and
    dropout, by fold_in(key(seed), step); an argument of the compiled program, so that the compilation cache has it for
    every seed. freeze_encoder: its backward pass is left out.
    """

    def loss_and_gradient(state: TrainState, batch: Batch, seeded: jax.Array | None) -> Any:
        image, label = batch["image"], batch["label"]
        labelled: tuple[jax.Array, ...] = (batch["labelled"],) if "labelled" in batch else ()
        drop: tuple[ChannelDropout, ...] = ()
        if seeded is not None:
            key = jax.random.fold_in(jax.random.wrap_key_data(seeded), state.step)
        if dropout:
            drop = (ChannelDropout(jax.random.fold_in(key, _DROPOUT_KEY), dropout),)
        if augmentation is not None:
            image, label = augment(key, image, label, augmentation)
            labelled = tuple(augment_labelled(key, rows, augmentation) for rows in labelled)

        def objective(params: Any) -> jax.Array:
            if freeze_encoder:
                params = jax.tree_util.tree_map_with_path(
                    lambda path, leaf: jax.lax.stop_gradient(leaf) if is_encoder(path) else leaf, params
                )
            return loss_fn(nnx.merge(graphdef, params)(image, *drop), label, *labelled)

        return jax.value_and_grad(objective)(state.params)

    def train_step(
        state: TrainState, batch: Batch, rate: jax.Array, *, seeded: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads = loss_and_gradient(state, batch, seeded)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, rate=rate)
        params, average = optax.apply_updates(state.params, updates), state.ema
        if average is not None:
            rest = 1 - average_decay(ema_decay, state.step + 1)
            average = jax.tree.map(lambda a, p: a + rest.astype(a.dtype) * (p - a), average, network_params(params))
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(group(grads)),
            "update_norm": optax.tree.norm(group(updates)),
            "lr": rate,
        }
        new = TrainState(state.step + 1, params, opt_state, average)
        new = jax.lax.with_sharding_constraint(new, tree_sharding(new, mesh, strategy))
        return new, jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    # Who splits the parameters does so for the memory.
    options = compiler_options(less_memory=strategy == "fsdp")
    compiled: Callable = jax.jit(train_step, donate_argnums=0, compiler_options=options)
    if augmentation is None and not dropout:
        return compiled
    return with_seed(partial(compiled), seed, mesh)


def abstract_batch(image: tuple[int, ...], classes: int | None, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batches of `make_train_step`. image: shape; classes: with "labelled"."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"image": (image, np.float32), "label": (image[:-1], np.int32)}
    if classes is not None:
        shapes["labelled"] = ((image[0], classes), np.bool_)
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}


def compile_step(
    train_step: TrainStep, state: TrainState, batch: Any, mesh: Mesh, meanwhile: Callable[[Future[Any]], Any]
) -> tuple[TrainStep, Any]:
    """Compile a step of make_train_step for the shapes of `batch` (ShapeDtypeStructs with shardings).

    Returns it, and what `meanwhile` gives: XLA needs no Python, so this is called while the future of the program runs.
    """
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    more = train_step.keywords if isinstance(train_step, partial) else {}
    function: Any = train_step.func if isinstance(train_step, partial) else train_step
    with _no_collection():
        lowered = function.lower(state, batch, rate, **more)
    program = in_thread(lowered.compile)
    result = meanwhile(program)
    return partial(program.result(), **more) if more else program.result(), result


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without looking for cycles among the millions of objects of a trace, which takes a tenth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def with_seed(train_step: TrainStep, seed: int, mesh: Mesh) -> TrainStep:
    """A step of make_train_step, compiled or not, with another seed; one that draws nothing as it is."""
    if not isinstance(train_step, partial):
        return train_step
    seeded = device_put_tree(np.asarray(jax.random.key_data(jax.random.key(seed))), replicated(mesh))
    return partial(train_step.func, seeded=seeded)


def average_decay(decay: float, updates: jax.Array) -> jax.Array:
    """Decay of the moving average: (1 + n) / (10 + n) up to `decay`, so that initial values are soon forgotten."""
    return jnp.minimum(decay, (1 + updates) / (10 + updates))
