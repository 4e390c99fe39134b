"""The U-Nets of nnU-Net (Isensee et al. 2021; with residual encoder 2024): PlainConvUNet and ResidualEncoderUNet.

As dynamic-network-architectures has them: convolutions with bias, instance norm with scale and shift, leaky ReLU; the
grid is coarsened by strided convolutions and refined by transposed ones. Every grid of the decoder but the coarsest has
a head, which deep supervision trains.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from mambahome_kernels import norm_act
from mambahome_kernels.conv3d.api import Size

from mambahome_jax.config import DataProperties, PlainUNetConfig, Precision, ResEncUNetConfig, Triple, UNetConfig
from mambahome_jax.model.layers import FLOAT32, HE, LEAKY_SLOPE, ChannelDropout, Conv3d, Numerics, Upsample, remat
from mambahome_jax.model.network import Network

if TYPE_CHECKING:
    from mambahome_jax.keywords import UNetShape

ONE = (1, 1, 1)


class InstanceNorm(nnx.Module):
    """Scale and shift of an instance norm, as `norm_act` takes them: (channels,) each."""

    def __init__(self, channels: int, scale: float = 1.0, *, param_dtype):
        self.scale = nnx.Param(jnp.full(channels, scale, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    @property
    def affine(self) -> tuple[jax.Array, jax.Array]:
        return self.scale[...], self.bias[...]


class Unit(nnx.Module):
    """leaky(norm(conv(x))), and the two parts alone for those who add up before the activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: Size,
        stride: Size = 1,
        *,
        bias: bool = True,
        scale: float = 1.0,
        rngs: nnx.Rngs,
        numerics: Numerics = FLOAT32,
    ):
        self.conv = Conv3d(inputs, outputs, size, stride=stride, bias=bias, initial=HE, rngs=rngs, numerics=numerics)
        self.norm = InstanceNorm(outputs, scale, param_dtype=numerics.param_dtype)

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of the channels of `parts` side by side."""
        return norm_act((self.conv(*parts),), affine=(self.norm.affine,), slope=LEAKY_SLOPE)


class AveragePool(nnx.Module):
    """Mean over blocks as large as the stride: (batch, depth, height, width, channels), coarser by it."""

    def __init__(self, stride: Triple):
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, *grid, channels = x.shape
        blocks = itertools.chain(*((n // step, step) for n, step in zip(grid, self.stride, strict=True)))
        return x.reshape(batch, *blocks, channels).mean((2, 4, 6))


class ResidualBlock(nnx.Module):
    """leaky(norm(conv(unit(x))) + skip(x)); skip: averaged where there is a stride, 1x1x1 conv where channels change.

    The last norm begins with scale 0, so that the block begins as its skip.
    """

    def __init__(
        self, inputs: int, outputs: int, size: Size, stride: Triple, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32
    ):
        self.conv1 = Unit(inputs, outputs, size, stride, rngs=rngs, numerics=numerics)
        self.conv2 = Unit(outputs, outputs, size, scale=0.0, rngs=rngs, numerics=numerics)
        skip: list[nnx.Module] = [AveragePool(stride)] if max(stride) > 1 else []
        if inputs != outputs:
            skip.append(Unit(inputs, outputs, 1, bias=False, rngs=rngs, numerics=numerics))
        self.skip = nnx.List(skip)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv2.conv(self.conv1(x))
        affine = self.conv2.norm.affine
        for part in self.skip:
            if isinstance(part, Unit):
                return norm_act((y, part.conv(x)), affine=(affine, part.norm.affine), slope=LEAKY_SLOPE)
            x = part(x)
        return norm_act((y,), x, (affine,), slope=LEAKY_SLOPE)


def _stage(
    part: Callable[..., nnx.Module], count: int, inputs: int, outputs: int, size: Size, stride: Triple, **arguments: Any
) -> nnx.List:
    """So many parts, to be called one after the other; the first takes `inputs` channels and has the stride."""
    first = part(inputs, outputs, size, stride, **arguments)
    return nnx.List([first, *(part(outputs, outputs, size, ONE, **arguments) for _ in range(count - 1))])


class UNetEncoder(nnx.Module):
    """(batch, depth, height, width, in) -> the volume of each stage, the full grid first."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.use_checkpoint = config.use_checkpoint
        widths, sizes, inputs = config.feat_size, config.kernel_sizes, config.in_chans
        residual = isinstance(config, ResEncUNetConfig)
        self.stem = Unit(inputs, widths[0], sizes[0], rngs=rngs, numerics=numerics) if residual else None
        part, inputs = (ResidualBlock, widths[0]) if residual else (Unit, inputs)
        stages = zip(config.depths, (inputs, *widths[:-1]), widths, sizes, (ONE, *config.strides), strict=True)
        self.stages = nnx.List([_stage(part, *stage, rngs=rngs, numerics=numerics) for stage in stages])

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> list[jax.Array]:
        """`dropout` acts on the volume of each stage, places 0, 1, ..."""
        x = x if self.stem is None else remat(self.use_checkpoint, self.stem, x)
        volumes = []
        for number, stage in enumerate(self.stages):
            for part in stage:
                x = remat(self.use_checkpoint, part, x)
            if dropout is not None:
                x = dropout(x, number)
            volumes.append(x)
        return volumes


class UpStage(nnx.Module):
    """A step of the decoder: refines the grid by the stride, and convolves that beside the skip connection."""

    def __init__(
        self, count: int, inputs: int, outputs: int, size: Size, stride: Triple, *, rngs: nnx.Rngs, numerics: Numerics
    ):
        self.up = Upsample(inputs, outputs, stride, bias=True, initial=HE, rngs=rngs, numerics=numerics)
        self.units = _stage(Unit, count, 2 * outputs, outputs, size, ONE, rngs=rngs, numerics=numerics)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        first, *others = self.units
        x = first(self.up(x), skip)
        for unit in others:
            x = unit(x)
        return x


class UNetDecoder(nnx.Module):
    """The volumes of the encoder -> logits (batch, depth, height, width, classes) on the full grid.

    Steps and heads, 1x1x1 convolutions to classes, come from the coarsest to the finest.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, numerics: Numerics = FLOAT32):
        self.use_checkpoint = config.use_checkpoint
        widths, steps = config.feat_size[::-1], zip(config.strides[::-1], config.kernel_sizes[-2::-1], strict=True)
        stages = zip(config.decoder_depths, itertools.pairwise(widths), steps, strict=True)
        self.stages = nnx.List(
            [
                UpStage(count, i, o, size, stride, rngs=rngs, numerics=numerics)
                for count, (i, o), (stride, size) in stages
            ]
        )
        self.heads = nnx.List(
            [
                Conv3d(width, config.out_chans, 1, bias=True, initial=HE, rngs=rngs, numerics=numerics)
                for width in widths[1:]
            ]
        )

    @property
    def coarse_heads(self) -> tuple[Conv3d, ...]:
        """The heads on the grids of `with_levels`, the finest first. The coarsest weighs nothing in nnU-Net's loss."""
        return tuple(self.heads)[-2:0:-1]

    def with_levels(
        self, x: jax.Array, stages: list[jax.Array], dropout: ChannelDropout | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Logits, and the volumes on the coarser grids, the finest first.

        `dropout` acts on what each step gives, from the place after those of the encoder on.
        """
        *skips, y = stages
        levels: list[jax.Array] = []
        for number, stage in enumerate(self.stages, len(stages)):
            y = remat(self.use_checkpoint, stage, y, skips.pop())
            if dropout is not None:
                y = dropout(y, number)
            levels.insert(0, y)
        return self.heads[-1](y), levels[1:]


class _UNet(Network):
    """A U-Net of the configuration `form`."""

    form: ClassVar[type[UNetConfig]]

    def __init__(
        self,
        in_chans: int = 1,
        out_chans: int = 13,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        precision: Precision = "fp32",
        metadata: DataProperties | None = None,
        **shape: "Unpack[UNetShape]",
    ):
        config = self.form.of_keywords(in_chans, out_chans, shape)
        super().__init__(
            config, UNetEncoder, UNetDecoder, rngs=rngs, param_dtype=param_dtype, precision=precision, metadata=metadata
        )


class PlainUNet(_UNet):
    """nnU-Net's PlainConvUNet: two convolutions a stage, each with instance norm and leaky ReLU.

    model(x): (batch, depth, height, width, in_chans) -> logits (batch, depth, height, width, out_chans), float32
    (float64 with float64 parameters). depth, height and width are multiples of `config.multiples`, and not all of them
    equal to it; others raise ConfigError.

    Args:
        in_chans: channels of the scan. out_chans: classes, background included.
        rngs: `nnx.Rngs(seed)`; its stream `params` gives the initial values.
        param_dtype, precision, metadata: as of MambaHoME.
        shape: any other field of `PlainUNetConfig`, such as feat_size, strides and kernel_sizes.
    """

    form = PlainUNetConfig


class ResEncUNet(_UNet):
    """nnU-Net's ResidualEncoderUNet: residual blocks in the encoder, one convolution a step in the decoder.

    Called and constructed as PlainUNet is; shape: any other field of `ResEncUNetConfig`.
    """

    form = ResEncUNetConfig
