"""Recipes: named sets of defaults for the flags that decide how a network is trained; a flag given wins.

Part of the configuration (config.py), in a file of its own; nothing here imports jax.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mambahome_jax.config import AnatomicalAxis, Mirror
from mambahome_jax.errors import ConfigError

MirrorAxis = Literal["none", AnatomicalAxis]
ADAM_EPS = 1e-8
MOST_ELASTIC_STD = 3.0


@dataclass(frozen=True)
class OptimizerConfig:
    """What decides an update. `steps_per_period` updates share a learning rate; after `t_max` periods it is eta_min.

    warmup_steps: the rate of the first updates is multiplied by 1/n, 2/n ... 1. clip_norm: largest Euclidean norm of
    the gradient of all parameters together. momentum: of SGD, Nesterov's form. encoder_lr_scale: factor on the updates
    of the parameters under "encoder", 0 keeps them as they are.
    """

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    eps: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    steps_per_period: int = 1
    t_max: int = 1
    eta_min: float = 0.0
    schedule_step: Literal["epoch", "published"] = "epoch"
    warmup_steps: int = 0
    clip_norm: float | None = None
    momentum: float = 0.0
    encoder_lr_scale: float = 1.0


@dataclass(frozen=True)
class AugmentationConfig:
    """Probabilities and ranges of the published data_loader.py, applied to each patch of a batch on its own.

    What follows from `mirror` on is not in it; a probability of None leaves the operation out of the program.
    """

    zoom_probability: float = 0.3
    zoom_range: tuple[float, float] = (1.3, 1.5)
    rotate90_probability: float = 0.1
    shift_probability: float = 0.2
    shift_range: float = 0.1
    smooth_probability: float = 0.2
    smooth_sigma_range: tuple[float, float] = (0.5, 1.15)
    noise_probability: float = 0.2
    noise_std: float = 0.01
    mirror: tuple[Mirror, ...] = ()
    affine_probability: float | None = None
    affine_rotation: float = 15.0
    affine_scale: tuple[float, float] = (0.85, 1.15)
    elastic_probability: float | None = None
    elastic_std: float = 2.0
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    brightness_probability: float | None = None
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float | None = None
    contrast_range: tuple[float, float] = (0.75, 1.25)
    gamma_probability: float | None = None
    gamma_range: tuple[float, float] = (0.7, 1.5)


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """The ingredients. None: as the recipe has it."""

    recipe: Literal["published", "strong"] = "published"
    """Defaults of the flags from here to --brightness_probability: as in the published code, or stronger."""
    optimizer: Literal["AdamW", "Adam", "SGD"] | None = None
    """Optimizer (published: AdamW; strong: AdamW)."""
    lr: float | None = None
    """Learning rate (published: 1e-4 for MambaHoME, 3e-4 for _small, 2e-3 for _tiny; strong: 3e-4, 1e-3, 2e-3)."""
    weight_decay: float | None = None
    """Decoupled weight decay of AdamW; coupled for Adam and SGD, as published (published: 1e-4; strong: 0.05)."""
    eps: float | None = None
    """Epsilon of AdamW (published: 1e-4 for MambaHoME, 1e-8 for the smaller sizes; strong: 1e-8)."""
    momentum: float | None = None
    """Nesterov momentum of SGD (published: 0; strong: 0.99)."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly (published: 0; strong: 100)."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together, 0 for any (published: 0; strong: 1)."""
    ema_decay: float | None = None
    """Validate and save a moving average of the weights with this decay, 0 for none (published: 0; strong: 0.999)."""
    label_smoothing: float | None = None
    """Share of the target that cross entropy spreads over all classes (published: 0; strong: 0)."""
    dropout: float | None = None
    """Share of the channels of the encoder's and the decoder's volumes that each step of training drops (published: 0;
    strong: 0.1)."""
    deep_supervision: bool | None = None
    """Loss at half and quarter resolution too (published: False; strong: True)."""
    class_balanced: bool | None = None
    """Centre positive patches on a class drawn evenly, not on a voxel of the foreground (published: False; strong:
    True)."""
    augment: bool | None = None
    """Augmentation as a whole; the published one zooms, turns, shifts, smooths and adds noise (both: True)."""
    zoom_probability: float | None = None
    """Published zoom in, by 1.3 to 1.5 (published: 0.3; strong: 0, as the affine map scales)."""
    rotate90_probability: float | None = None
    """Published turns by 90, 180 or 270 degrees in the plane of the first two axes (published: 0.1; strong: 0)."""
    affine_probability: float | None = None
    """Rotation about all axes and isotropic scale, resampled once (published: 0; strong: 0.7)."""
    affine_rotation: float | None = None
    """Largest angle about each axis, in degrees (published: 15; strong: 30)."""
    affine_scale: tuple[float, float] | None = None
    """Smallest and largest scale (published: 0.85 1.15; strong: 0.7 1.4)."""
    elastic_probability: float | None = None
    """Smooth random deformation, in the same resampling (published: 0; strong: 0.5)."""
    elastic_std: float | None = None
    """Largest standard deviation of it in voxels of the finest axis, at points 16 such voxels apart (both: 2)."""
    mirror: tuple[MirrorAxis, ...] | None = None
    """Axes to mirror along, each with probability 1/2; labels of pairs such as left and right kidney are swapped with
    it (published: none; strong: LR)."""
    gamma_probability: float | None = None
    """Power of 0.7 to 1.5 of the intensities between their extremes (published: 0; strong: 0.3)."""
    contrast_probability: float | None = None
    """Distance to the mean times 0.75 to 1.25 (published: 0; strong: 0.15)."""
    brightness_probability: float | None = None
    """Intensities times 0.75 to 1.25 (published: 0; strong: 0.15)."""


@dataclass(frozen=True)
class Ingredients:
    """The flags of RecipeFlags, each with its value; the defaults are the published ones.

    lr and eps None: those of the network's size (config.MODEL_SIZES).
    """

    optimizer: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: float | None = None
    weight_decay: float = 1e-4
    eps: float | None = None
    momentum: float = 0.0
    warmup_steps: int = 0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    deep_supervision: bool = False
    class_balanced: bool = False
    augment: bool = True
    zoom_probability: float = 0.3
    rotate90_probability: float = 0.1
    affine_probability: float = 0.0
    affine_rotation: float = 15.0
    affine_scale: tuple[float, float] = (0.85, 1.15)
    elastic_probability: float = 0.0
    elastic_std: float = 2.0
    mirror: tuple[MirrorAxis, ...] = ("none",)
    gamma_probability: float = 0.0
    contrast_probability: float = 0.0
    brightness_probability: float = 0.0


RECIPES: Mapping[str, Ingredients] = {
    "published": Ingredients(),
    "strong": Ingredients(
        eps=1e-8,
        weight_decay=0.05,
        momentum=0.99,
        warmup_steps=100,
        clip_norm=1.0,
        ema_decay=0.999,
        dropout=0.1,
        deep_supervision=True,
        class_balanced=True,
        zoom_probability=0.0,
        rotate90_probability=0.0,
        affine_probability=0.7,
        affine_rotation=30.0,
        affine_scale=(0.7, 1.4),
        elastic_probability=0.5,
        mirror=("LR",),
        gamma_probability=0.3,
        contrast_probability=0.15,
        brightness_probability=0.15,
    ),
}
_PARTS = (
    "label_smoothing",
    "zoom_probability",
    "rotate90_probability",
    "affine_probability",
    "elastic_probability",
    "gamma_probability",
    "contrast_probability",
    "brightness_probability",
)


def resolve(flags: RecipeFlags, size_lr: float, size_eps: float, strong_lr: float) -> Ingredients:
    """Every ingredient's value: that of its flag, else that of the recipe, else that of the size.

    Raises ConfigError for a value that cannot work.
    """
    names = [field.name for field in dataclasses.fields(Ingredients)]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    found = dataclasses.replace(RECIPES[flags.recipe], **given)
    if found.lr is None:
        found = dataclasses.replace(found, lr=size_lr if flags.recipe == "published" else strong_lr)
    if found.eps is None:
        # torch's default; the published Adam keeps it, unlike the published AdamW.
        found = dataclasses.replace(found, eps=size_eps if found.optimizer == "AdamW" else ADAM_EPS)
    _check(found)
    return found


def _check(found: Ingredients) -> None:
    if found.lr is None or found.eps is None or not (found.lr > 0 and found.eps > 0 and found.weight_decay >= 0):
        raise ConfigError(
            f"--lr {found.lr}, --weight_decay {found.weight_decay}, --eps {found.eps}; expected a positive lr and eps, "
            "and a weight decay of 0 or more"
        )
    for name in _PARTS:
        if not 0 <= getattr(found, name) <= 1:
            raise ConfigError(f"--{name} {getattr(found, name)}; expected 0 to 1")
    for name in ("momentum", "ema_decay", "dropout"):
        if not 0 <= getattr(found, name) < 1:
            raise ConfigError(f"--{name} {getattr(found, name)}; expected 0 or more, and below 1")
    if found.warmup_steps < 0 or found.clip_norm < 0:
        raise ConfigError(f"--warmup_steps {found.warmup_steps}, --clip_norm {found.clip_norm}; expected 0 or more")
    low, high = found.affine_scale
    if not 0 <= found.elastic_std <= MOST_ELASTIC_STD:
        found_std = f"--elastic_std {found.elastic_std}"
        raise ConfigError(f"{found_std}; expected 0 to {MOST_ELASTIC_STD:g}, beyond which tissue would fold")
    if not 0 < low <= high or found.affine_rotation < 0:
        raise ConfigError(
            f"--affine_scale {low} {high}, --affine_rotation {found.affine_rotation}; expected a smaller and a larger "
            "positive scale, and an angle of 0 degrees or more"
        )
