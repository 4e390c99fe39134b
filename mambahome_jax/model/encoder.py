"""The encoder: four stages of downsampling, gated spatial convolution, and Mamba with HoME over voxels as tokens."""

import jax
from flax import nnx

from mambahome_jax.config import ModelConfig, Precision, Triple
from mambahome_jax.model.blocks import GatedSpatialConv, same
from mambahome_jax.model.dropout import ChannelDropout
from mambahome_jax.model.home import HoME
from mambahome_jax.model.layers import Conv3d
from mambahome_jax.model.mamba import Mamba
from mambahome_jax.model.norms import DynamicTanh, instance_norm
from mambahome_jax.model.remat import remat


class MambaHoMEBlock(nnx.Module):
    """t + Mamba(DyT(t)), then t + HoME(DyT(t)), on tokens (batch, length, channels)."""

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        channels = config.feat_size[stage]
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.mamba_norm = DynamicTanh(channels, param_dtype=param_dtype)
        self.mamba = Mamba(channels, **common)
        self.home_norm = DynamicTanh(channels, param_dtype=param_dtype)
        self.home = HoME(
            channels,
            group=config.group_list[stage],
            experts=config.experts_list[stage],
            slots=config.num_slots_per_expert_first,
            experts_second=config.experts_list_second[stage],
            mult=config.expert_mult,
            **common,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        tokens = tokens + self.mamba(self.mamba_norm(tokens))
        return tokens + self.home(self.home_norm(tokens))


def stem_size(config: ModelConfig) -> Triple:
    """7 along the axes that the first convolution halves; along the others that of the full grid's convolutions."""
    a, b, c = (
        7 if stride == 2 else size for stride, size in zip(config.strides[0], config.kernel_sizes[0], strict=True)
    )
    return a, b, c


class Stage(nnx.Module):
    """Coarsens the grid of a volume (batch, depth, height, width, channels before) by its stride, and mixes it."""

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        channels = config.feat_size[stage]
        self.first, self.use_checkpoint = stage == 0, config.use_checkpoint
        stride = config.strides[stage]
        if self.first:
            size = stem_size(config)
            self.downsample = Conv3d(
                config.in_chans, channels, size, stride=stride, padding=same(size), bias=True, **common
            )
        else:
            self.downsample = Conv3d(config.feat_size[stage - 1], channels, stride, stride=stride, bias=True, **common)
        self.gsc = GatedSpatialConv(channels, config.kernel_sizes[stage + 1], **common)
        self.blocks = nnx.List([MambaHoMEBlock(config, stage, **common) for _ in range(config.depths[stage])])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x is normalised already, but for the network's input."""
        x = remat(self.use_checkpoint, self.gsc, self.downsample(x))
        batch, depth, height, width, channels = x.shape
        tokens = x.reshape(batch, depth * height * width, channels)
        for block in self.blocks:
            tokens = remat(self.use_checkpoint, block, tokens)
        return tokens.reshape(x.shape)


class Encoder(nnx.Module):
    """(batch, depth, height, width, in) -> four volumes, instance-normalised, each coarser by its stage's stride: with
    the published ones at 1/2, 1/4, 1/8 and 1/16 of the grid."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype, precision: Precision):
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.stages = nnx.List([Stage(config, stage, **common) for stage in range(4)])

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> list[jax.Array]:
        """`dropout` acts on each of the four, places 0 to 3, before the next stage takes it."""
        # Each stage but the first begins with the instance norm of the volume before: the decoder takes the same one.
        outputs = []
        for number, stage in enumerate(self.stages):
            x = instance_norm(stage(x))
            if dropout is not None:
                x = dropout(x, number)
            outputs.append(x)
        return outputs
