"""SegMamba (Xing et al., MICCAI 2024, arXiv 2401.13560) as ge-xing/SegMamba has it since June 2024: segmamba.py.

Blocks around the stages, decoder and sizes are those of MambaHoME; the inside of the encoder differs. Weights of the
release's versions from March to June 2024, which had no residual around the Mamba layers, have the same names and
shapes, and would load without a word.
"""

from typing import TYPE_CHECKING, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import DataProperties, Precision, SegMambaConfig
from mambahome_jax.model.layers import FLOAT32, ChannelDropout, Conv3d, Numerics, gelu, instance_norm, remat
from mambahome_jax.model.mamba import BiMamba
from mambahome_jax.model.network import Network, Stage

if TYPE_CHECKING:
    from mambahome_jax.keywords import SegMambaShape

LAYER_NORM_EPS = 1e-5


class SegMambaBlock(nnx.Module):
    """v + BiMamba(LayerNorm(v)), with the voxels of v as tokens; v (batch, depth, height, width, channels)."""

    def __init__(self, config: SegMambaConfig, stage: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        channels = config.feat_size[stage]
        self.norm = nnx.LayerNorm(
            channels,
            epsilon=LAYER_NORM_EPS,
            dtype=numerics.activation_dtype,
            param_dtype=numerics.param_dtype,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.mamba = BiMamba(channels, num_slices=config.num_slices[stage], rngs=rngs, numerics=numerics)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return (tokens + self.mamba(self.norm(tokens))).reshape(x.shape)


class Mlp(nnx.Module):
    """Two 1x1x1 convolutions with the exact GELU between them, twice as many channels there; no residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.fc1 = Conv3d(channels, 2 * channels, 1, bias=True, rngs=rngs, numerics=numerics)
        self.fc2 = Conv3d(2 * channels, channels, 1, bias=True, rngs=rngs, numerics=numerics)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


class Level(nnx.Module):
    """A stage, and the MLP between its volume and the decoder."""

    def __init__(self, config: SegMambaConfig, stage: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.stage = Stage(config, stage, SegMambaBlock, rngs=rngs, numerics=numerics)
        self.mlp = Mlp(config.feat_size[stage], rngs=rngs, numerics=numerics)


class SegMambaEncoder(nnx.Module):
    """(batch, depth, height, width, in) -> four volumes, each coarser by its stage's stride: as published at 1/2, 1/4,
    1/8 and 1/16 of the grid. The next stage takes the instance norm of a stage, the decoder an MLP of that."""

    def __init__(self, config: SegMambaConfig, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.use_checkpoint = config.use_checkpoint
        self.levels = nnx.List([Level(config, stage, rngs=rngs, numerics=numerics) for stage in range(4)])

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> list[jax.Array]:
        """`dropout` acts on each of the four norms, places 0 to 3."""
        outputs = []
        for number, level in enumerate(self.levels):
            x = instance_norm(level.stage(x))
            if dropout is not None:
                x = dropout(x, number)
            outputs.append(remat(self.use_checkpoint, level.mlp, x))
        return outputs


class SegMamba(Network):
    """U-shaped network of Mamba layers in three directions.

    model(x): (batch, depth, height, width, in_chans) -> logits (batch, depth, height, width, out_chans), float32
    (float64 with float64 parameters). depth, height and width are multiples of 16, and the slices of each stage divide
    its tokens: with the published ones (depth / 16) (height / 16) (width / 16) is a multiple of 8. Others raise
    ConfigError.

    Args:
        in_chans: channels of the scan. out_chans: classes, background included.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        param_dtype, precision, metadata: as of MambaHoME.
        shape: any other field of `SegMambaConfig`, such as num_slices.
    """

    def __init__(
        self,
        in_chans: int = 1,
        out_chans: int = 13,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        precision: Precision = "fp32",
        metadata: DataProperties | None = None,
        **shape: "Unpack[SegMambaShape]",
    ):
        config = SegMambaConfig.of_keywords(in_chans, out_chans, shape)
        super().__init__(
            config, SegMambaEncoder, rngs=rngs, param_dtype=param_dtype, precision=precision, metadata=metadata
        )
