"""Dropout of whole channels: which, how many, and where in the network."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.config import ModelConfig
from mambahome_jax.model.layers import ChannelDropout
from mambahome_jax.model.network import MambaHoME

TINY = ModelConfig(
    depths=(1, 1, 1, 1),
    feat_size=(4, 4, 8, 8),
    hidden_size=8,
    num_slots_per_expert_first=2,
    experts_list=(2, 2, 2, 2),
    experts_list_second=(4, 4, 4, 4),
)


def test_whole_channels_of_each_sample_are_dropped_and_the_others_raised():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (40, 2, 3, 2, 50)), jnp.bfloat16)
    y = ChannelDropout(jax.random.key(1), 0.25)(x, 0)
    assert y.dtype == x.dtype and y.shape == x.shape
    dropped = np.asarray(y == 0)
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:, :1, :1, :1], x.shape))
    share = dropped[:, 0, 0, 0].mean()
    # 2,000 draws: five standard deviations.
    assert abs(share - 0.25) < 0.05 and np.ptp(dropped[:, 0, 0, 0].sum(axis=1)) > 0
    kept = ~dropped
    np.testing.assert_allclose(np.asarray(y, np.float32)[kept], np.asarray(x, np.float32)[kept] / 0.75, rtol=1e-2)


def test_each_place_and_each_key_draw_their_own():
    x = jnp.ones((8, 1, 1, 1, 32))
    one = ChannelDropout(jax.random.key(0), 0.5)
    np.testing.assert_array_equal(one(x, 3), one(x, 3))
    assert not np.array_equal(one(x, 3), one(x, 4))
    assert not np.array_equal(one(x, 3), ChannelDropout(jax.random.key(1), 0.5)(x, 3))
    # A sample draws by its number, whatever the others of its batch.
    np.testing.assert_array_equal(one(x, 3)[5], one(x[:6], 3)[5])


def test_the_network_drops_at_eight_places_and_without_it_at_none():
    asked = []

    def note(volume, number):
        asked.append((number, volume.shape[1], volume.shape[-1]))
        return volume

    network = MambaHoME(TINY, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 16, 16, 1)), jnp.float32)
    nnx.eval_shape(lambda x: network(x, note), x)
    encoder = [(0, 16, 4), (1, 8, 4), (2, 4, 8), (3, 2, 8)]
    assert asked == [*encoder, (4, 4, 8), (5, 8, 8), (6, 16, 4), (7, 32, 4)]
    apply = jax.jit(lambda rate: network(x, ChannelDropout(jax.random.key(0), rate)))
    assert abs(apply(0.5) - apply(0.0)).max() > 1e-3
