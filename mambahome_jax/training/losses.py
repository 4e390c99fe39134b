"""DiceCE, as MONAI's DiceCELoss(to_onehot_y=True, softmax=True) computes it, and deep supervision of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mambahome_jax.config import Precision, UNetConfig
from mambahome_jax.errors import ConfigError
from mambahome_jax.model.layers import Array, ChannelDropout, Conv3d, Numerics, require_array
from mambahome_jax.recipes import CoarseLabels, Recipe

# (logits, labels[, labelled]) -> scalar
LossFunction = Callable[..., jax.Array]
SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr
HEADS = 2
NETWORK = "network"


def dice_ce(
    logits: Array,
    labels: Array,
    labelled: Array | None = None,
    *,
    include_background: bool = True,
    batch: bool = False,
    squared: bool = False,
) -> jax.Array:
    """Compute Dice loss plus cross entropy.

    Args:
        logits: (batch, D, H, W, classes), floating; evaluated in float32 at least.
        labels: (batch, D, H, W), integer in 0..classes-1.
        labelled: (batch, classes) bool, the classes that the dataset of each sample has labels of; None: all.
            Unlabelled classes are merged into the background (predicting them is not penalised) and excluded from the
            Dice mean.
        include_background: count class 0 in the Dice term (the cross entropy always does).
        batch: sum the Dice term over the samples as well.
        squared: square the probabilities in the denominator of the Dice term.

    Returns:
        scalar, float32 or float64: mean over samples and classes of 1 - (2 sum(p y) + s) / (sum p + sum y + s), absent
        classes included, plus mean over voxels of -log p[label].

    Raises ConfigError: arrays of other shapes, labels that are no integers.
    """
    require_array("logits are a", logits)
    require_array("labels are a", labels)
    if labelled is not None:
        require_array("labelled is a", labelled)
    if logits.ndim != 5 or labels.shape != logits.shape[:-1]:
        expected = "(batch, D, H, W), and the same with classes behind"
        raise ConfigError(f"labels have shape {labels.shape}, logits {logits.shape}; expected {expected}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ConfigError(f"labels are {labels.dtype}; expected integers")
    if labelled is not None and jnp.shape(labelled) != (len(logits), logits.shape[-1]):
        expected = f"(batch, classes), {(len(logits), logits.shape[-1])}"
        raise ConfigError(f"labelled has shape {labelled.shape}; expected {expected}")
    logits, labels = jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32)), jnp.asarray(labels)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    if labelled is not None:
        labelled = jnp.asarray(labelled).at[:, 0].set(True)
        log_p, labels = _merge_into_background(log_p, labels, labelled)
    p = jnp.exp(log_p)
    # A comparison inside the sums fuses into them; a one-hot array of its own would be as large as the logits.
    is_class = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    axes = (0, 1, 2, 3) if batch and labelled is None else (1, 2, 3)
    overlap = jnp.sum(jnp.where(is_class, p, 0), axis=axes)
    predicted = jnp.sum(p * p if squared else p, axis=axes)
    present = jnp.sum(is_class, axis=axes, dtype=p.dtype)
    counts = None
    if labelled is not None:
        overlap, predicted, present = (jnp.where(labelled, total, 0) for total in (overlap, predicted, present))
        counts = labelled
        if batch:
            overlap, predicted, present = (total.sum(axis=0) for total in (overlap, predicted, present))
            counts = labelled.any(axis=0)
    dice = 1 - (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
    if not include_background:
        dice = dice[..., 1:]
        counts = None if counts is None else counts[..., 1:]
    cross_entropy = -jnp.sum(jnp.where(is_class, log_p, 0)) / labels.size
    if counts is None:
        return jnp.mean(dice) + cross_entropy
    # Each sample by the classes that it can be judged by; without any (no background wanted) it does not count.
    weight = counts.sum(axis=-1)
    means = jnp.sum(jnp.where(counts, dice, 0), axis=-1) / jnp.maximum(weight, 1)
    return jnp.sum(means) / jnp.maximum(jnp.sum(weight > 0), 1) + cross_entropy


def _merge_into_background(log_p: jax.Array, labels: jax.Array, labelled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and labels in which every unlabelled class is background."""
    known = labelled[:, None, None, None, :]
    background = jnp.arange(log_p.shape[-1]) == 0
    merged = jax.nn.logsumexp(jnp.where(known & ~background, -jnp.inf, log_p), axis=-1, keepdims=True)
    log_p = jnp.where(background, merged, jnp.where(known, log_p, jnp.finfo(log_p.dtype).min))
    has_label = jax.vmap(lambda row, values: row[values])(labelled, labels)
    return log_p, jnp.where(has_label, labels, 0)


class DeepSupervision(nnx.Module):
    """A network with a 1x1x1 convolution on its decoder's volumes at 1/2 and 1/4 of the grid (Lee et al. 2015).

    model(x): (batch, D, H, W, in) -> [logits (batch, D, H, W, classes), the same at 1/2, at 1/4]. The heads lie beside
    the network, not in it, so that checkpoints and exported weights are those of the network. A U-Net of nnU-Net has
    heads of its own, and as many levels.
    """

    def __init__(self, network: Any, *, rngs: nnx.Rngs, precision: Precision = "fp32"):
        config = network.config
        self.network = network
        widths = () if isinstance(config, UNetConfig) else config.feat_size[1 : 1 + HEADS]
        self.heads = nnx.List(
            [
                Conv3d(width, config.out_chans, 1, bias=True, rngs=rngs, numerics=Numerics(precision=precision))
                for width in widths
            ]
        )

    def __call__(self, x: jax.Array, *dropout: ChannelDropout) -> list[jax.Array]:
        logits, levels = self.network.with_levels(x, *dropout)
        heads = self.heads or self.network.decoder.coarse_heads
        return [logits, *(head(level) for head, level in zip(heads, levels, strict=False))]


def network_params(params: Any) -> Any:
    """The network's own part of parameters that may have heads beside it."""
    return params.get(NETWORK, params)


def recipe_loss(recipe: Recipe) -> LossFunction:
    """The loss of a recipe, of a list of logits with deep supervision."""
    loss = functools.partial(dice_ce, include_background=recipe.dice_background, batch=recipe.batch_dice)
    return at_all_levels(loss, recipe.coarse_labels) if recipe.deep_supervision else loss


def at_all_levels(loss_fn: LossFunction, coarse_labels: CoarseLabels = "first") -> LossFunction:
    """Sum the loss over a list of logits, each on a grid half as fine and weighing half as much as the one before.

    The weights sum to 1 (as in nnU-Net). Labels of a coarse grid are every n-th voxel along each axis, the first one or
    that in which the coarse voxel's centre lies.
    """

    def loss(outputs: list[jax.Array], labels: jax.Array, *more: jax.Array) -> jax.Array:
        weights = [0.5**level for level in range(len(outputs))]
        terms = []
        for logits, weight in zip(outputs, weights, strict=True):
            steps = [n // m for n, m in zip(labels.shape[1:4], logits.shape[1:4], strict=True)]
            coarse = [slice(step // 2 if coarse_labels == "centre" else 0, None, step) for step in steps]
            terms.append(weight / sum(weights) * loss_fn(logits, labels[:, *coarse], *more))
        return sum(terms[1:], start=terms[0])

    return loss
