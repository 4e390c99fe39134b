"""What a training command says of itself: its ingredients, its length, and what made it."""

from mambahome_jax.commands.train_setup import Setup
from mambahome_jax.training.loop import Plan
from mambahome_jax.training.progress import duration


def say_ingredients(setup: Setup) -> str:
    """The ingredients that are used, as one line."""
    used, optimizer = setup.ingredients, setup.optimizer
    parts = [f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"]
    if optimizer.name != "SGD":
        parts.append(f"eps {optimizer.eps:g}")
    names = ["warmup_steps", "clip_norm", "ema_decay", "label_smoothing", "deep_supervision", "class_balanced"]
    if optimizer.momentum:
        names.insert(0, "momentum")
    parts += [f"{name} {getattr(used, name)}" for name in names if getattr(used, name)]
    if setup.augmentation is None:
        parts.append("no augmentation")
    else:
        mirrors = [f"axis {axis}, {len(pairs)} pairs of labels swapped" for axis, pairs in setup.augmentation.mirror]
        parts.append(f"mirrored along {'; '.join(mirrors)}" if mirrors else "not mirrored")
    return ", ".join(parts)


def say_plan(plan: Plan) -> str:
    """How long the run is, and when it validates."""
    length = f"{plan.total_steps} steps"
    if plan.budget is not None:
        length = f"{duration(plan.budget.seconds)}, of which {duration(plan.budget.spent())} are spent"
    validation = "validation as time allows" if plan.val_every is None else f"validation every {plan.val_every} steps"
    return f"{length}; {plan.steps_per_epoch} steps an epoch; {validation}"
