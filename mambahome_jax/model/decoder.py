"""The decoder: skip connections through residual blocks, and the way back to the full grid."""

import itertools

import jax
from flax import nnx

from mambahome_jax.config import ModelConfig, Precision
from mambahome_jax.model.blocks import ResidualBlock, UpBlock
from mambahome_jax.model.dropout import ChannelDropout
from mambahome_jax.model.layers import Conv3d
from mambahome_jax.model.remat import remat


class Decoder(nnx.Module):
    """Input and four encoder stages -> logits (batch, depth, height, width, classes) on the input's grid."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.use_checkpoint = config.use_checkpoint
        features = config.feat_size
        channels = (config.in_chans, *features, config.hidden_size)
        skips = (features[0], *features[1:], config.hidden_size)
        inputs = (channels[0], *features)
        sizes = config.kernel_sizes
        self.skips = nnx.List(
            [ResidualBlock(i, o, size, **common) for i, o, size in zip(inputs, skips, sizes, strict=True)]
        )
        levels = itertools.pairwise((config.hidden_size, *features[::-1]))
        ups = zip(levels, config.strides[::-1], sizes[3::-1], strict=True)
        self.ups = nnx.List([UpBlock(i, o, stride, size, **common) for (i, o), stride, size in ups])
        self.last = ResidualBlock(features[0], features[0], sizes[0], **common)
        self.out = Conv3d(features[0], config.out_chans, 1, bias=True, **common)

    def __call__(self, x: jax.Array, stages: list[jax.Array]) -> jax.Array:
        return self.with_levels(x, stages)[0]

    def with_levels(
        self, x: jax.Array, stages: list[jax.Array], dropout: ChannelDropout | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Logits, and the volumes on the grids of the first three stages that they come from.

        `dropout` acts on what each of the four steps up gives, from place 4 on.
        """
        skips = [remat(self.use_checkpoint, block, v) for block, v in zip(self.skips, (x, *stages), strict=True)]
        y = skips.pop()
        levels: list[jax.Array] = []
        for number, up in enumerate(self.ups, len(stages)):
            y = remat(self.use_checkpoint, up, y, skips.pop())
            if dropout is not None:
                y = dropout(y, number)
            levels.insert(0, y)
        return self.out(remat(self.use_checkpoint, self.last, y)), levels[1:]
