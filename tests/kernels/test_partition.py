"""Splitting the batch of a function over a mesh, as the GPU kernels need it, with plain functions on CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if jax.__version_info__ < (0, 11):
    pytest.skip(
        f"only the GPU kernel uses it, which needs JAX 0.11; this is {jax.__version__}", allow_module_level=True
    )

from mambahome_kernels.mosaic.partition import over_batch

SHARED = {"scale": jnp.arange(5.0), "absent": None}


def centred(shared, batched):
    """Per batch entry, but in a way that XLA could only split with communication if it took the batch for one array."""
    x, y = batched
    order = jnp.sort(x.reshape(x.shape[0], -1), axis=1).reshape(x.shape)
    return order * shared["scale"] + y, jnp.cumsum(y, axis=1)


def arrays(batch: int = 8):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(batch, 3, 5))) for _ in range(2))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


def same(got, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)


@pytest.mark.parametrize("axes", ["data", ("data", "fsdp"), None])
def test_a_sharded_batch_stays_where_it_is(mesh, axes):
    split = NamedSharding(mesh, PartitionSpec(axes))
    batched = jax.device_put(arrays(), split)
    run = jax.jit(lambda batched: over_batch(centred)(SHARED, batched))
    text = run.lower(batched).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    got = run(batched)
    assert all(a.sharding.is_equivalent_to(split, a.ndim) for a in got)
    same(got, centred(SHARED, arrays()))


def test_gradients_of_what_is_shared_take_one_sum(mesh):
    """As the scan does it: per batch entry inside, summed outside."""
    batched = jax.device_put(arrays(), NamedSharding(mesh, PartitionSpec("data")))

    def by_entry(shared, batched):
        return (batched[0] * shared["scale"]).sum(1)

    run = jax.jit(lambda batched: over_batch(by_entry)(SHARED, batched).sum(0))
    text = run.lower(batched).compile().as_text()
    assert "all-gather" not in text
    assert text.count(" all-reduce(") == 1
    same(run(batched), by_entry(SHARED, arrays()).sum(0))


def test_within_shard_map_it_is_the_function(mesh):
    run = jax.shard_map(
        lambda x, y: over_batch(centred)(SHARED, (x, y)),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    same(jax.jit(run)(*arrays()), centred(SHARED, arrays()))


def test_vmap_joins_the_batch():
    sizes = []

    def watched(shared, batched):
        sizes.append(batched[0].shape[0])
        return centred(shared, batched)

    x, y = arrays(12)
    cut = x.reshape(3, 4, 3, 5)
    got = jax.vmap(lambda x: over_batch(watched)(SHARED, (x, y[:4])))(cut)
    assert sizes[-1] == 12
    same(got, jax.vmap(lambda x: centred(SHARED, (x, y[:4])))(cut))


def test_vmap_over_something_shared_goes_one_by_one():
    scales, batched = jnp.stack([SHARED["scale"], 2 + SHARED["scale"]]), arrays(4)
    got = jax.vmap(lambda scale: over_batch(centred)({"scale": scale}, batched))(scales)
    same(got, jax.vmap(lambda scale: centred({"scale": scale}, batched))(scales))
