"""The whole network (Płotka et al., NeurIPS 2025, arXiv 2507.06363; published MambaHoME.py)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import DataProperties, ModelConfig, Precision
from mambahome_jax.errors import ConfigError
from mambahome_jax.model.decoder import Decoder
from mambahome_jax.model.dropout import ChannelDropout
from mambahome_jax.model.encoder import Encoder
from mambahome_jax.model.layers import activation_dtype


def default_precision() -> Precision:
    """bf16 on a GPU, fp32 elsewhere."""
    return "bf16" if jax.default_backend() == "gpu" else "fp32"


class MambaHoME(nnx.Module):
    """U-shaped network of Mamba layers and hierarchical soft mixtures of experts.

    model(x): (batch, depth, height, width, in_chans) -> logits (batch, depth, height, width, out_chans), float32
    (float64 with float64 parameters). depth, height and width are multiples of `config.multiples`, 16 as published,
    and not all of them equal to it.
    model(x, dropout): with channels dropped, as training may have it.

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
        config = config or ModelConfig()
        common = {"rngs": rngs, "param_dtype": param_dtype, "precision": precision}
        self.config, self.precision, self.metadata = config, precision, metadata
        self.dtype = activation_dtype(precision, param_dtype)
        self.encoder = Encoder(config, **common)
        self.decoder = Decoder(config, **common)

    def __call__(self, x: jax.Array, dropout: ChannelDropout | None = None) -> jax.Array:
        return self.with_levels(x, dropout)[0]

    def with_levels(self, x: jax.Array, dropout: ChannelDropout | None = None) -> tuple[jax.Array, list[jax.Array]]:
        """Logits, and the decoder's volumes on the grids of the first three stages (1/2, 1/4 and 1/8 as published),
        feat_size[1], [2] and [3] channels."""
        check_input(x.shape, self.config)
        x = x.astype(self.dtype)
        logits, levels = self.decoder.with_levels(x, self.encoder(x, dropout), dropout)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), levels


def check_input(shape: tuple[int, ...], config: ModelConfig) -> None:
    """Raises ConfigError, naming the axis and the remedy, where the network cannot take an array of this shape."""
    if len(shape) != 5:
        raise ConfigError(f"the input has shape {shape}; expected (batch, depth, height, width, channels)")
    if shape[-1] != config.in_chans:
        raise ConfigError(f"the input has {shape[-1]} channels (shape {shape}); this network takes {config.in_chans}")
    for name, size, multiple in zip(("depth", "height", "width"), shape[1:4], config.multiples, strict=True):
        if size < multiple or size % multiple:
            below, above = size // multiple * multiple, -(-size // multiple) * multiple
            near = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"{name} is {size}, which {multiple} does not divide (shape {shape}). Pad or crop {name} to {near}, "
                "or use sliding_window, which takes volumes of any size"
            )
    if shape[1:4] == config.multiples:
        found = " ".join(map(str, config.multiples))
        raise ConfigError(
            f"depth, height and width are {found}, which leaves one voxel at the deepest stage, where instance norm "
            f"would give zeros. Make at least one of them twice as large"
        )
