"""Dropout of whole channels, which training alone asks for: no part of the network and none of its parameters."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class ChannelDropout:
    """dropout(x, number): each channel of each sample of (batch, ..., channels) 0 with probability `rate`, the others
    divided by 1 - rate (spatial dropout, Tompson et al., CVPR 2015); dtype and shape stay.

    key: from jax.random.key, another at each step. number: of the place in the network, so that each draws its own.
    samples: (batch,) integer, the samples' numbers in the whole batch, from which and the key they draw.
    """

    key: jax.Array
    rate: float
    samples: jax.Array

    def __call__(self, x: jax.Array, number: int) -> jax.Array:
        batch, channels = x.shape[0], x.shape[-1]
        place = jax.random.fold_in(self.key, number)
        kept = jax.vmap(
            lambda sample: jax.random.bernoulli(jax.random.fold_in(place, sample), 1 - self.rate, (channels,))
        )(self.samples)
        # In float32: 1 / 0.9 in bfloat16 would raise every channel that is kept by 0.16 % too little or too much.
        factor = (kept / (1 - self.rate)).reshape(batch, *[1] * (x.ndim - 2), channels)
        return (x * factor).astype(x.dtype)
