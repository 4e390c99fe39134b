"""Gradients sample by sample, summed in one order: the same bits on one CPU device, several, and several processes.

The network's gradients are sums of terms that nearly cancel, and its optimizer brings all of them to one size, so what
one order of summation differs from another in the last bit is a thousand times as large after ten steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mambahome_jax.config import Strategy
from mambahome_jax.training.grouping import group, ungroup
from mambahome_jax.training.sharding import AXIS, replicated, tree_sharding

EACH, ALL = PartitionSpec(AXIS), PartitionSpec()


def step_by_sample(
    gradient: Callable, update: Callable, mesh: Mesh, strategy: Strategy, options: dict[str, str | bool]
) -> Callable:
    """(state, batch, fraction=None, *, seeded=None) -> (state, metrics), state donated, of several compiled programs.

    The one that takes the time knows a single sample and nothing of the devices. Two samples, then two pairs and so on
    are added, on each device first and then between them, so that the order is the same where the samples of a device
    and the devices are powers of two; other numbers differ by rounding, and so do other numbers of XLA's threads. With
    "fsdp" each device has the whole state during the update: exact, not small.

    Args:
        gradient: (params, step, batch, numbers, seeded) -> (loss, gradients): means over the samples of the batch,
            which are those numbers (b,) of the whole one.
        update: (state, loss, gradients, fraction) -> (state, metrics).
        options: of the compiler.
    """
    compiled = partial(jax.jit, compiler_options=options)
    on_each = partial(jax.shard_map, mesh=mesh, check_vma=False)

    @partial(compiled, static_argnums=1)
    def train_step_sample(batch: dict[str, jax.Array], place: int) -> tuple[dict[str, jax.Array], jax.Array]:
        """One sample of each device, and its number in the whole batch."""

        def pick(share: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            (samples,) = {len(array) for array in share.values()}
            number = jax.lax.axis_index(AXIS) * samples + place
            return {name: array[place : place + 1] for name, array in share.items()}, number[None]

        return on_each(pick, in_specs=EACH, out_specs=EACH)(batch)

    @compiled
    def train_step_gradient(params: Any, step: jax.Array, sample: Any, number: jax.Array, seeded: Any) -> Any:
        """(loss, gradients) of the sample of each device, one beside the other."""

        def each(*args: Any) -> Any:
            loss, grads = gradient(*args)
            return jax.tree.map(lambda value: value[None], (loss, group(grads)))

        specs = (ALL, ALL, EACH, EACH, ALL)
        return on_each(each, in_specs=specs, out_specs=EACH)(params, step, sample, number, seeded)

    @partial(compiled, donate_argnums=0)
    def train_step_add(a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

    @compiled
    def train_step_sum(sums: Any) -> Any:
        """Over the devices."""

        def between(value: jax.Array) -> jax.Array:
            value, apart = value[0], 1
            if mesh.size & (mesh.size - 1):
                return jax.lax.psum(value, AXIS)
            while apart < mesh.size:
                pairs = [(device, device ^ apart) for device in range(mesh.size)]
                value, apart = value + jax.lax.ppermute(value, AXIS, pairs), 2 * apart
            return value

        return on_each(lambda tree: jax.tree.map(between, tree), in_specs=EACH, out_specs=ALL)(sums)

    @partial(compiled, donate_argnums=0, static_argnums=2)
    def train_step_update(state: Any, total: Any, samples: int, fraction: jax.Array | None) -> Any:
        loss, grads = jax.tree.map(lambda value: value / samples, total)
        return update(state, loss, ungroup(grads, state.params), fraction)

    # Programs of their own, so that those above are the same where the parameters are split.
    whole = compiled(lambda state: state, out_shardings=replicated(mesh))

    @partial(compiled, donate_argnums=0)
    def split(state: Any) -> Any:
        return jax.lax.with_sharding_constraint(state, tree_sharding(state, mesh, strategy))

    def train_step(state: Any, batch: dict[str, jax.Array], fraction: Any = None, *, seeded: Any = None) -> Any:
        state = state if strategy == "ddp" else whole(state)
        samples = len(batch["image"])
        sums: list[tuple[int, Any]] = []
        for place in range(samples // mesh.size):
            size, total = 1, train_step_gradient(state.params, state.step, *train_step_sample(batch, place), seeded)
            while sums and sums[-1][0] == size:
                size, total = 2 * size, train_step_add(sums.pop()[1], total)
            sums.append((size, total))
        while len(sums) > 1:
            (_, last), (_, before) = sums.pop(), sums.pop()
            sums.append((0, train_step_add(before, last)))
        # What was summed is not kept for the time of the update.
        total = train_step_sum(sums.pop()[1])
        state, metrics = train_step_update(state, total, samples, fraction)
        return state if strategy == "ddp" else split(state), metrics

    return train_step
