"""The batch of a function split over the devices of a mesh without any communication, and `vmap` folded into it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mambahome_kernels.mosaic.runtime import interpreting


def over_batch(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """function(shared, batched), which XLA's partitioner could only run with the whole batch on every device.

    The first axis of every array in `batched` and of every result is the batch, and no entry depends on another.
    Within `shard_map` (with check_vma=False) and on one device it is the function itself. Under `vmap` the mapped axis
    becomes part of the batch, unless something shared is mapped too: then one after another.
    """

    if interpreting():  # whose callbacks can be carried by neither; it maps and splits nothing
        return function

    def partition(mesh, arguments, results):
        leading = jax.tree.leaves(results)[0].sharding.spec
        split = NamedSharding(mesh, PartitionSpec(*leading[:1]))
        whole = NamedSharding(mesh, PartitionSpec())
        shared, batched = arguments
        shardings = jax.tree.map(lambda _: whole, shared), jax.tree.map(lambda _: split, batched)
        return mesh, function, jax.tree.map(lambda _: split, results), shardings

    def run(shared, batched):
        partitioned = custom_partitioning(function)
        partitioned.def_partition(partition, sharding_rule=_rule(len(jax.tree.leaves(shared))))
        return partitioned(shared, batched)

    @custom_vmap
    def mapped(shared, batched):
        return run(shared, batched)

    @mapped.def_vmap
    def fold(size, is_mapped, shared, batched):
        if any(jax.tree.leaves(is_mapped[0])):
            leaves, tree = jax.tree.flatten((shared, batched))
            axes = jax.tree.leaves(is_mapped)

            def one(i):
                each = [a[i] if m else a for a, m in zip(leaves, axes, strict=True)]
                return mapped(*jax.tree.unflatten(tree, each))

            out = jax.lax.map(one, jnp.arange(size))
        else:

            def merge(a, m):
                a = a if m else jnp.broadcast_to(a, (size, *a.shape))
                return a.reshape(-1, *a.shape[2:])

            out = mapped(shared, jax.tree.map(merge, batched, is_mapped[1]))
            out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _rule(shared: int) -> Callable:
    """Shardy's rule: the batch is one factor, every other axis is to be whole."""

    def rule(mesh, operands, results):
        whole: list[str] = []

        def axes(i, array, batched):
            names = [f"w{i}_{axis}" for axis in range(batched, array.rank)]
            whole.extend(names)
            return " ".join(["batch"] * batched + names)

        arrays = [axes(i, a, int(i >= shared)) for i, a in enumerate([*operands, *results])]
        sides = (", ".join(part) for part in (arrays[: len(operands)], arrays[len(operands) :]))
        return " -> ".join(sides), {"need_replication_factors": tuple(whole)}

    return rule
