"""DiceCE, as MONAI's DiceCELoss(to_onehot_y=True, softmax=True) computes it."""

import jax
import jax.numpy as jnp

SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr


def dice_ce(
    logits: jax.Array,
    labels: jax.Array,
    *,
    include_background: bool = True,
    batch: bool = False,
    squared: bool = False,
) -> jax.Array:
    """Dice loss plus cross entropy.

    Args:
        logits: (batch, D, H, W, classes), floating; evaluated in float32 at least.
        labels: (batch, D, H, W), integer in 0..classes-1.
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
    p = jnp.exp(log_p)
    # A comparison inside the sums fuses into them; a one-hot array of its own would be as large as the logits.
    is_class = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    overlap = jnp.sum(jnp.where(is_class, p, 0), axis=axes)
    predicted = jnp.sum(p * p if squared else p, axis=axes)
    present = jnp.sum(is_class, axis=axes, dtype=p.dtype)
    dice = 1 - (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
    if not include_background:
        dice = dice[..., 1:]
    cross_entropy = -jnp.sum(jnp.where(is_class, log_p, 0)) / labels.size
    return jnp.mean(dice) + cross_entropy
