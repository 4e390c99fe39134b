"""One mesh with one axis, `data`: the batch is split over it; parameters are copied (ddp) or split (fsdp)."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mambahome_jax.config import Strategy

AXIS = "data"
# Below this number of elements the messages of splitting an array cost more than its memory. The optimizer joins arrays
# below it.
SMALLEST_SPLIT = 2**17
Tree = TypeVar("Tree")


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """Mesh of all given devices along `data`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def tree_sharding(tree: Any, mesh: Mesh, strategy: Strategy) -> Any:
    """Sharding of every array of a tree of parameters or optimizer state.

    Args:
        tree: arrays, or anything with a shape.
        strategy: "ddp" copies everything; "fsdp" splits each array along its largest axis that the number of devices
            divides, and copies those that are small or have no such axis.

    Returns:
        tree of NamedSharding.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh.size, strategy)), tree)


def _spec(shape: tuple[int, ...], devices: int, strategy: Strategy) -> PartitionSpec:
    if strategy == "ddp" or np.prod(shape, dtype=np.int64) < SMALLEST_SPLIT:
        return PartitionSpec()
    divisible = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == largest else None for axis in range(len(shape))))


def device_put_tree(tree: Any, shardings: Any) -> Any:
    """Place host values (identical in every process) on devices according to `shardings`."""

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def copy_to(tree: Any, device: jax.Device) -> Any:
    """Whole arrays on one device of this process; with several processes all of them have to call it."""

    def local(value: jax.Array) -> jax.Array:
        return next(shard.data for shard in value.addressable_shards if shard.device == device)

    sharding = jax.tree.leaves(tree)[0].sharding
    if sharding.is_fully_addressable:
        return jax.device_put(tree, device)
    return jax.tree.map(local, jax.jit(_unchanged, out_shardings=replicated(sharding.mesh))(tree))


def _unchanged(tree: Tree) -> Tree:
    return tree


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Start the transfer of this process' share of a batch; the first axes of all processes together are the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
