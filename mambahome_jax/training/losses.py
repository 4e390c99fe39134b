"""DiceCE, as MONAI's DiceCELoss(to_onehot_y=True, softmax=True) computes it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (logits, labels[, labelled]) -> scalar
LossFunction = Callable[..., jax.Array]
SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr


def dice_ce(
    logits: jax.Array,
    labels: jax.Array,
    labelled: jax.Array | None = None,
    *,
    include_background: bool = True,
    batch: bool = False,
    squared: bool = False,
) -> jax.Array:
    """Dice loss plus cross entropy.

    Args:
        logits: (batch, D, H, W, classes), floating; evaluated in float32 at least.
        labels: (batch, D, H, W), integer in 0..classes-1.
        labelled: (batch, classes) bool, which classes the dataset of each sample has labels of; None: all. The others
            are one with the background, so that predicting them there is no mistake, and take no part in the mean of
            the Dice term.
        include_background: class 0 counts in the Dice term (in the cross entropy it always does).
        batch: sums of the Dice term run over the samples as well.
        squared: squared probabilities in the denominator of the Dice term.

    Returns:
        scalar, float32 or float64: mean over samples and classes of 1 - (2 sum(p y) + s) / (sum p + sum y + s), absent
        classes included, plus mean over voxels of -log p[label].
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels are {labels.shape}, logits {logits.shape}; expected {logits.shape[:-1]}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    if labelled is not None:
        labelled = labelled.at[:, 0].set(True)
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
    """Log-probabilities in which class 0 is the background or any class that was not labelled, those at 0 probability;
    and labels in which such a class, should it occur, is background."""
    known = labelled[:, None, None, None, :]
    background = jnp.arange(log_p.shape[-1]) == 0
    merged = jax.nn.logsumexp(jnp.where(known & ~background, -jnp.inf, log_p), axis=-1, keepdims=True)
    log_p = jnp.where(background, merged, jnp.where(known, log_p, jnp.finfo(log_p.dtype).min))
    has_label = jax.vmap(lambda row, values: row[values])(labelled, labels)
    return log_p, jnp.where(has_label, labels, 0)
