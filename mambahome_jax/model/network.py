"""MambaHoME (Płotka et al., NeurIPS 2025, arXiv 2507.06363), from its blocks up; published MambaHoME.py.

Blocks: gated spatial convolution (Xing et al. 2024), residual and up block (as in MONAI's UNETR). Encoder: four stages
of downsampling, gated spatial convolution, and Mamba with HoME over voxels as tokens. Decoder: skip connections
through residual blocks, and the way back to the full grid. SegMamba (`baselines/segmamba.py`) shares all but the inside
of the stages.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from mambahome_kernels import norm_act
from mambahome_kernels.conv3d.api import Size

from mambahome_jax.config import (
    MODEL_SIZES,
    DataProperties,
    FourStageConfig,
    ModelConfig,
    NetworkConfig,
    Precision,
    triple,
)
from mambahome_jax.errors import ConfigError
from mambahome_jax.model.home import FeedForward, HoME
from mambahome_jax.model.layers import (
    FLOAT32,
    LEAKY_SLOPE,
    Array,
    ChannelDropout,
    Conv3d,
    DynamicTanh,
    Numerics,
    Upsample,
    instance_norm,
    remat,
    require_array,
)
from mambahome_jax.model.mamba import GatedConv, Mamba

SizeName = Literal["MambaHoME", "MambaHoME_small", "MambaHoME_tiny", "small", "tiny"]


class GatedSpatialConv(nnx.Module):
    """relu(IN(conv1(a + b))) + x with a from two convolutions of `size`, 3x3x3 as published, and b from a 1x1x1 one.

    The biases before the norms have no effect; they are kept for the exchange of weights.
    """

    def __init__(self, channels: int, size: Size = 3, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.proj, self.proj2, self.proj3, self.proj4 = (
            Conv3d(channels, channels, n, bias=True, rngs=rngs, numerics=numerics) for n in (size, size, 1, 1)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        a = norm_act((self.proj(x),), slope=0)
        a = norm_act((self.proj2(a),), slope=0)
        b = norm_act((self.proj3(x),), slope=0)
        return norm_act((self.proj4(a + b),), slope=0) + x


class ResidualBlock(nnx.Module):
    """Two convolutions of `size`, instance norm and leaky ReLU, and a shortcut (1x1x1 where the channels change)."""

    def __init__(self, inputs: int, outputs: int, size: Size = 3, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        def conv(inputs: int, size: Size) -> Conv3d:
            return Conv3d(inputs, outputs, size, bias=False, rngs=rngs, numerics=numerics)

        self.conv1, self.conv2 = conv(inputs, size), conv(outputs, size)
        self.conv3 = conv(inputs, 1) if inputs != outputs else None

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of the channels of `parts` side by side."""
        y = self.conv2(norm_act((self.conv1(*parts),), slope=LEAKY_SLOPE))
        if self.conv3 is None:
            return norm_act((y,), plus=jnp.concatenate(parts, -1), slope=LEAKY_SLOPE)
        return norm_act((y, self.conv3(*parts)), slope=LEAKY_SLOPE)


class UpBlock(nnx.Module):
    """Refines the grid of x by `stride`, joins the skip connection behind it, and applies a residual block."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: Size = 2,
        size: Size = 3,
        *,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.up = Upsample(inputs, outputs, stride, rngs=rngs, numerics=numerics)
        self.block = ResidualBlock(2 * outputs, outputs, size, rngs=rngs, numerics=numerics)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.block(self.up(x), skip)


class MambaHoMEBlock(nnx.Module):
    """v + Mamba(DyT(v)), then v + HoME(DyT(v)), the tokens being the voxels of (batch, depth, height, width, channels).

    A twin (`ModelConfig.mixer`, `experts`) has another layer in the place of one of the two, or leaves Mamba out.
    """

    def __init__(self, config: ModelConfig, stage: int, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        channels, dtype, mult = config.feat_size[stage], numerics.param_dtype, config.expert_mult
        shared: dict[str, Any] = {"rngs": rngs, "numerics": numerics}
        self.mamba_norm: Any = DynamicTanh(channels, param_dtype=dtype) if config.mixer != "none" else None
        self.mamba = Mamba(channels, **shared) if config.mixer == "scan" else None
        self.conv = GatedConv(channels, config.kernel_sizes[stage + 1], **shared) if config.mixer == "conv" else None
        self.home_norm = DynamicTanh(channels, param_dtype=dtype)
        self.ffn = FeedForward(channels, mult, **shared) if config.experts == "ffn" else None
        self.home = (
            None
            if config.experts == "ffn"
            else HoME(
                channels,
                group_size=config.group_list[stage],
                num_experts=config.experts_list[stage],
                slots_per_expert=config.num_slots_per_expert_first,
                num_experts_second=config.experts_list_second[stage] if config.experts == "home" else None,
                expert_mult=mult,
                **shared,
            )
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.conv is not None:
            x = x + self.conv(self.mamba_norm(x))
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.mamba is not None:
            tokens = tokens + self.mamba(self.mamba_norm(tokens))
        layer: Any = self.home if self.ffn is None else self.ffn
        return (tokens + layer(self.home_norm(tokens))).reshape(x.shape)


class Stage(nnx.Module):
    """Coarsens the grid of a volume (batch, depth, height, width, channels before) by its stride, and mixes it.

    block: (config, stage, rngs=, numerics=) -> a module from a volume to one of the same shape.
    """

    def __init__(
        self,
        config: FourStageConfig,
        stage: int,
        block: Callable[..., nnx.Module],
        *,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        channels = config.feat_size[stage]
        self.use_checkpoint = config.use_checkpoint
        stride = size = config.strides[stage]
        if stage == 0:
            # 7 along the axes that the stem halves, along the others as wide as the full grid's convolutions.
            size = triple(7 if n == 2 else wide for n, wide in zip(stride, config.kernel_sizes[0], strict=True))
        self.downsample = Conv3d(
            config.feat_size[stage - 1] if stage else config.in_chans,
            channels,
            size,
            stride=stride,
            padding=None if stage == 0 else 0,
            bias=True,
            rngs=rngs,
            numerics=numerics,
        )
        self.gsc = GatedSpatialConv(channels, config.kernel_sizes[stage + 1], rngs=rngs, numerics=numerics)
        self.blocks = nnx.List(
            [block(config, stage, rngs=rngs, numerics=numerics) for _ in range(config.depths[stage])]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x is normalised already, but for the network's input."""
        x = remat(self.use_checkpoint, self.gsc, self.downsample(x))
        for block in self.blocks:
            x = remat(self.use_checkpoint, block, x)
        return x


class Encoder(nnx.Module):
    """(batch, depth, height, width, in) -> four volumes, instance-normalised, each coarser by its stage's stride: with
    the published ones at 1/2, 1/4, 1/8 and 1/16 of the grid."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.stages = nnx.List(
            [Stage(config, stage, MambaHoMEBlock, rngs=rngs, numerics=numerics) for stage in range(4)]
        )

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


class Decoder(nnx.Module):
    """Input and four encoder stages -> logits (batch, depth, height, width, classes) on the input's grid."""

    def __init__(self, config: FourStageConfig, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.use_checkpoint = config.use_checkpoint
        features = config.feat_size
        channels = (config.in_chans, *features, config.hidden_size)
        skips = (features[0], *features[1:], config.hidden_size)
        inputs = (channels[0], *features)
        sizes = config.kernel_sizes
        self.skips = nnx.List(
            [
                ResidualBlock(i, o, size, rngs=rngs, numerics=numerics)
                for i, o, size in zip(inputs, skips, sizes, strict=True)
            ]
        )
        levels = itertools.pairwise((config.hidden_size, *features[::-1]))
        ups = zip(levels, config.strides[::-1], sizes[3::-1], strict=True)
        self.ups = nnx.List([UpBlock(i, o, stride, size, rngs=rngs, numerics=numerics) for (i, o), stride, size in ups])
        self.last = ResidualBlock(features[0], features[0], sizes[0], rngs=rngs, numerics=numerics)
        self.out = Conv3d(features[0], config.out_chans, 1, bias=True, rngs=rngs, numerics=numerics)

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


class Network(nnx.Module):
    """An encoder and a decoder, each made by (config, rngs=, numerics=); param_dtype, precision: see `Numerics`.

    model(x): (batch, depth, height, width, in_chans) -> logits (batch, depth, height, width, out_chans), float32
    (float64 with float64 parameters). Raises ConfigError for an x that it cannot take, see `NetworkConfig.check_size`.
    model(x, dropout): with channels dropped, as training may have it.
    """

    def __init__(
        self,
        config: NetworkConfig,
        encoder: Callable[..., nnx.Module],
        decoder: Callable[..., nnx.Module] = Decoder,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any,
        precision: Precision,
        metadata: DataProperties | None,
    ):
        numerics = Numerics(param_dtype, precision)
        self.config, self.precision, self.metadata = config, numerics.precision, metadata
        self.dtype = numerics.activation_dtype
        self.encoder: Any = encoder(config, rngs=rngs, numerics=numerics)
        self.decoder: Any = decoder(config, rngs=rngs, numerics=numerics)

    def __call__(self, x: Array, dropout: ChannelDropout | None = None) -> jax.Array:
        return self.with_levels(x, dropout)[0]

    def with_levels(self, x: Array, dropout: ChannelDropout | None = None) -> tuple[jax.Array, list[jax.Array]]:
        """Logits, and the decoder's volumes on coarser grids, the finest first, feat_size[1], [2], ... channels."""
        require_array("the input is a", x)
        check_input(x.shape, self.config)
        if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ConfigError(f"the input has dtype {x.dtype}; expected real numbers")
        x = jnp.asarray(x, self.dtype)
        logits, levels = self.decoder.with_levels(x, self.encoder(x, dropout), dropout)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), levels


class MambaHoME(Network):
    """U-shaped network of Mamba layers and hierarchical soft mixtures of experts.

    model(x): (batch, depth, height, width, in_chans) -> logits (batch, depth, height, width, out_chans), float32
    (float64 with float64 parameters). depth, height and width are multiples of `config.multiples`, 16 as published,
    and not all of them equal to it.

    Args:
        config: shape of the network; the default is the published one.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        param_dtype: float32 or float64 (with JAX x64).
        precision: of matrix products and convolutions and the activations between them.
        metadata: what the weights were trained on (spacing, orientation, modality, labels ...), carried along.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        precision: Precision = "fp32",
        metadata: DataProperties | None = None,
    ):
        config = ModelConfig() if config is None else config
        super().__init__(config, Encoder, rngs=rngs, param_dtype=param_dtype, precision=precision, metadata=metadata)

    @classmethod
    def of_size(
        cls,
        size: SizeName,
        in_chans: int = ModelConfig.in_chans,
        out_chans: int = ModelConfig.out_chans,
        *,
        rngs: nnx.Rngs | None = None,
        param_dtype=jnp.float32,
        precision: Precision = "fp32",
        metadata: DataProperties | None = None,
    ) -> "MambaHoME":
        """Make a network of a size that `train --model` takes; "tiny" is "MambaHoME_tiny", and "small" likewise.

        Args:
            in_chans: channels of the scan. out_chans: classes, background included.
            rngs: `nnx.Rngs(0)` by default.
            param_dtype, precision, metadata: as of the constructor.

        Raises ConfigError: no such size.
        """
        if size not in get_args(SizeName):
            raise ConfigError(f"size is {size!r}; expected one of {', '.join(get_args(SizeName))}")
        name = size if size.startswith("MambaHoME") else f"MambaHoME_{size}"
        config = MODEL_SIZES[name].model.replace(in_chans=in_chans, out_chans=out_chans)
        assert isinstance(config, ModelConfig)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        return cls(config, rngs=rngs, param_dtype=param_dtype, precision=precision, metadata=metadata)


def check_input(shape: tuple[int, ...], config: NetworkConfig) -> None:
    """Raises ConfigError, naming the axis and the remedy, where the network cannot take an array of this shape."""
    if len(shape) != 5 or not shape[0]:
        raise ConfigError(f"the input has shape {shape}; expected (batch, depth, height, width, channels)")
    if shape[-1] != config.in_chans:
        raise ConfigError(f"the input has {shape[-1]} channels (shape {shape}); this network takes {config.in_chans}")
    config.check_size(triple(shape[1:4]))
