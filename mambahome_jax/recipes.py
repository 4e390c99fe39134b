"""Recipes: named sets of ingredients that decide how a network is trained. A flag of an ingredient wins over them.

An ingredient is one field here, with its published default, what it is and which values can work; its flag, the help
and the table in docs/ come from the field. Imports no jax.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from tyro.conf import arg

from mambahome_jax.config import MODEL_SIZES, AnatomicalAxis, Mirror
from mambahome_jax.errors import ConfigError

CoarseLabels = Literal["first", "centre"]
MirrorAxis = Literal["none", AnatomicalAxis]
ADAM_EPS = 1e-8  # torch's default: the published Adam keeps it, the published AdamW does not
T = TypeVar("T")


class Valid(NamedTuple):
    """Which values of an ingredient can work, for the program and for its user."""

    holds: Callable[[Any], bool]
    expected: str


POSITIVE = Valid(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Valid(lambda value: value >= 0, "0 or more")
PART = Valid(lambda value: 0 <= value <= 1, "0 to 1")
BELOW_ONE = Valid(lambda value: 0 <= value < 1, "0 or more, and below 1")
SCALES = Valid(lambda scales: 0 < scales[0] <= scales[1], "a smaller and a larger positive scale")
UNFOLDED = Valid(lambda std: 0 <= std <= 3, "0 to 3, beyond which tissue would fold")


def ingredient(default: T, text: str, valid: Valid | None = None, flag: str = "") -> T:
    """A field that is an ingredient of a recipe; its flag has the field's name unless `flag` is another."""
    return dataclasses.field(default=default, metadata={"help": text, "valid": valid, "flag": flag})


@dataclass(frozen=True)
class OptimizerConfig:
    """What decides an update. `steps_per_period` updates share a learning rate; after `t_max` periods it is eta_min.

    momentum: of SGD, in Nesterov's form. schedule_step: "epoch" lowers the rate after the last update of a period,
    "published" one update later. encoder_lr_scale: factor on the updates of the encoder, 0 keeps it as it is.
    """

    name: Literal["AdamW", "Adam", "SGD"] = ingredient("AdamW", "Optimizer.", flag="optimizer")
    lr: float = ingredient(1e-4, "Learning rate.", POSITIVE)
    weight_decay: float = ingredient(1e-4, "Weight decay: decoupled for AdamW, else coupled.", NOT_NEGATIVE)
    eps: float = ingredient(1e-4, "Epsilon of AdamW and Adam (Adam: 1e-8).", POSITIVE)
    betas: tuple[float, float] = (0.9, 0.999)
    steps_per_period: int = 1
    t_max: int = 1
    eta_min: float = 0.0
    schedule_step: Literal["epoch", "published"] = "epoch"
    scheduler: Literal["CALR", "polynomial"] = ingredient(
        "CALR", "Fall of the rate to 0: cosine annealing, or (1 - progress)^0.9."
    )
    warmup_steps: int = ingredient(0, "Steps over which the learning rate rises linearly.", NOT_NEGATIVE)
    clip_norm: float = ingredient(0.0, "Largest norm of the whole gradient; 0: any.", NOT_NEGATIVE)
    momentum: float = 0.0
    encoder_lr_scale: float = 1.0


@dataclass(frozen=True)
class AugmentationConfig:
    """Probabilities and ranges of what is done to each patch of a batch on its own; the defaults are published.

    Zoom, quarter turns, shift, smoothing and noise are the published operations. The others are left out of the
    compiled program where their probability is 0. mirror, voxel_size (mm): of the dataset. scale_apart: rotation and
    scale come each by itself with `affine_probability`, not together.
    """

    zoom_probability: float = ingredient(0.3, "Zoom in by 1.3 to 1.5.", PART)
    zoom_range: tuple[float, float] = (1.3, 1.5)
    rotate90_probability: float = ingredient(0.1, "Quarter turns in the plane of the first two axes.", PART)
    shift_probability: float = 0.2
    shift_range: float = 0.1
    smooth_probability: float = 0.2
    smooth_sigma_range: tuple[float, float] = (0.5, 1.15)
    noise_probability: float = 0.2
    noise_std: float = 0.01
    mirror: tuple[Mirror, ...] = ()
    affine_probability: float = ingredient(0.0, "Rotation about all axes and isotropic scale, resampled once.", PART)
    affine_rotation: float = ingredient(15.0, "Largest angle about each axis, in degrees.", NOT_NEGATIVE)
    plane_rotation: float = ingredient(
        0.0,
        "Largest angle within thick slices, which then move within their plane only; 0: as other scans "
        "(the default with --affine_rotation).",
        NOT_NEGATIVE,
    )
    scale_apart: bool = False
    affine_scale: tuple[float, float] = ingredient((0.85, 1.15), "Smallest and largest scale.", SCALES)
    elastic_probability: float = ingredient(0.0, "Smooth random deformation, in the same resampling.", PART)
    elastic_std: float = ingredient(2.0, "Its largest standard deviation, in voxels of the finest axis.", UNFOLDED)
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma_probability: float = ingredient(0.0, "Power of 0.7 to 1.5 of the intensities between their extremes.", PART)
    gamma_range: tuple[float, float] = (0.7, 1.5)
    gamma_keeps_moments: bool = False
    inverted_gamma_probability: float = 0.0
    low_resolution_probability: float = 0.0
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    contrast_probability: float = ingredient(0.0, "Distance to the mean times 0.75 to 1.25.", PART)
    contrast_range: tuple[float, float] = (0.75, 1.25)
    brightness_probability: float = ingredient(0.0, "Intensities times 0.75 to 1.25.", PART)
    brightness_range: tuple[float, float] = (0.75, 1.25)


@dataclass(frozen=True)
class Recipe:
    """All ingredients of a training; the defaults are those of the published code.

    coarse_labels: which voxel of those that one of a coarser grid covers has its label in deep supervision.
    dice_background: whether the Dice term counts the background.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = ingredient(0.0, "Decay of the average of the weights that is saved; 0: none.", BELOW_ONE)
    dropout: float = ingredient(0.0, "Share of the encoder's and decoder's channels that a step drops.", BELOW_ONE)
    deep_supervision: bool = ingredient(False, "Loss on coarser grids too.")
    coarse_labels: CoarseLabels = "first"
    dice_background: bool = True
    batch_dice: bool = ingredient(False, "Dice of a whole batch, not of each patch.")
    positive_fraction: float = ingredient(0.75, "Share of patches centred on a structure.", PART)
    class_balanced: bool = ingredient(False, "Draw the centres of foreground patches by class, not by voxel.")
    augment: bool = ingredient(True, "Augmentation as a whole.")
    mirror: tuple[MirrorAxis, ...] = ingredient(("none",), "Axes to mirror along, swapping labels of pairs.")
    augmentation: AugmentationConfig = AugmentationConfig()

    def ingredients(self) -> dict[str, Any]:
        """Flag -> value of every ingredient."""
        return {flag: getattr(self._holder(part), field.name) for flag, (part, field) in INGREDIENTS.items()}

    def replace(self, given: Mapping[str, Any]) -> "Recipe":
        """This recipe with other values of some ingredients, by their flags."""
        recipe = self
        for flag, value in given.items():
            part, field = INGREDIENTS[flag]
            holder = dataclasses.replace(recipe._holder(part), **{field.name: value})
            recipe = dataclasses.replace(recipe, **{part: holder}) if part else holder
        return recipe

    def _holder(self, part: str) -> Any:
        return getattr(self, part) if part else self


def _ingredients() -> dict[str, tuple[str, dataclasses.Field]]:
    """Flag -> (the field of Recipe that holds the ingredient, "" for itself; the ingredient's field)."""
    fields = []
    for field in dataclasses.fields(Recipe):
        inner = dataclasses.fields(field.type) if dataclasses.is_dataclass(field.type) else ()
        fields += [(field.name, item) for item in inner] or [("", field)]
    return {field.metadata["flag"] or field.name: (part, field) for part, field in fields if field.metadata}


INGREDIENTS = _ingredients()
RECIPES: Mapping[str, Recipe] = {
    "published": Recipe(),
    "strong": Recipe(
        OptimizerConfig(eps=ADAM_EPS, weight_decay=0.05, momentum=0.99, warmup_steps=100, clip_norm=1.0),
        ema_decay=0.999,
        dropout=0.1,
        deep_supervision=True,
        class_balanced=True,
        mirror=("LR",),
        augmentation=AugmentationConfig(
            # The affine map scales and turns.
            zoom_probability=0.0,
            rotate90_probability=0.0,
            affine_probability=0.7,
            affine_rotation=30.0,
            plane_rotation=180.0,
            affine_scale=(0.7, 1.4),
            elastic_probability=0.5,
            gamma_probability=0.3,
            contrast_probability=0.15,
            brightness_probability=0.15,
        ),
    ),
    # Of nnU-Net 2.8; docs/reference/recipes.md lists what of its augmentation is not here.
    "nnunet": Recipe(
        OptimizerConfig(
            name="SGD",
            lr=1e-2,
            weight_decay=3e-5,
            eps=ADAM_EPS,
            momentum=0.99,
            clip_norm=12.0,
            scheduler="polynomial",
        ),
        deep_supervision=True,
        coarse_labels="centre",
        dice_background=False,
        positive_fraction=0.5,
        class_balanced=True,
        mirror=("LR", "AP", "IS"),
        augmentation=AugmentationConfig(
            zoom_probability=0.0,
            rotate90_probability=0.0,
            shift_probability=0.0,
            affine_probability=0.2,
            affine_rotation=30.0,
            plane_rotation=180.0,
            scale_apart=True,
            affine_scale=(0.7, 1.4),
            # nnU-Net blurs and coarsens with 0.2 and 0.25, then each channel with 0.5.
            smooth_probability=0.1,
            smooth_sigma_range=(0.5, 1.0),
            noise_probability=0.1,
            noise_std=0.1,
            gamma_probability=0.3,
            gamma_keeps_moments=True,
            inverted_gamma_probability=0.1,
            low_resolution_probability=0.125,
            contrast_probability=0.15,
            brightness_probability=0.15,
        ),
    ),
}


def recipe_for(recipe: str, model: str) -> Recipe:
    """The recipe of that name with the learning rate, and the published epsilon, of the model's size."""
    size = MODEL_SIZES[model]
    if recipe == "published":
        return RECIPES[recipe].replace({"lr": size.lr, "eps": size.eps})
    return RECIPES[recipe].replace({"lr": size.strong_lr}) if recipe == "strong" else RECIPES[recipe]


def given_ingredients(flags: Any) -> dict[str, Any]:
    """The ingredients that the flags of a training name."""
    return {flag: getattr(flags, flag) for flag in INGREDIENTS if getattr(flags, flag) is not None}


def resolve(flags: Any) -> Recipe:
    """The recipe of `flags.recipe` for `flags.model`, with the ingredients that the flags name.

    Raises ConfigError: a value that cannot work.
    """
    given = given_ingredients(flags)
    if given.get("optimizer") in ("Adam", "SGD"):
        given = {"eps": ADAM_EPS} | given
    if "affine_rotation" in given:  # of thick slices too
        given = {"plane_rotation": 0.0} | given
    recipe = recipe_for(flags.recipe, flags.model).replace(given)
    for flag, value in recipe.ingredients().items():
        valid = INGREDIENTS[flag][1].metadata["valid"]
        if valid is not None and not valid.holds(value):
            raise ConfigError(f"--{flag} {as_typed(value)}; expected {valid.expected}")
    return recipe


def as_typed(value: Any) -> str:
    """Write a setting's value for a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{number:g} {unit}" for unit, number in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in value)
        return " ".join("".join(map(str, entry)) if nested else as_typed(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_of(flag: str, recipe: str) -> str:
    """The value of an ingredient in a recipe, and that of each --model that has another one."""
    values = {model: as_typed(recipe_for(recipe, model).ingredients()[flag]) for model in MODEL_SIZES}
    ((usual, _),) = Counter(values.values()).most_common(1)
    return ", ".join([usual, *(f"{model} {value}" for model, value in values.items() if value != usual)])


def with_ingredient_flags(cls: type[T]) -> type[T]:
    """Give the class of a command, before it becomes a dataclass, a flag of each ingredient; None: by the recipe.

    The ingredients that a field of Recipe holds are a group of flags with its name.
    """
    for flag, (part, field) in INGREDIENTS.items():
        heading = part or "recipe"
        cls.__annotations__[f"_{heading.upper()}"] = ClassVar
        setattr(cls, f"_{heading.upper()}", heading.capitalize())
        recipes: dict[str, list[str]] = defaultdict(list)
        for recipe in RECIPES:
            recipes[default_of(flag, recipe)].append(recipe)
        rows = sorted(recipes.items(), key=lambda row: len(row[1]))
        named = [f"{names[0] if len(names) == 1 else 'others'}: {value}" for value, names in rows]
        defaults = "; ".join(named) if len(rows) > 1 else rows[0][0]
        described = arg(help=field.metadata["help"], help_behavior_hint=f"({defaults})")
        kind: Any = field.type
        cls.__annotations__[flag] = Annotated[kind | None, described]
        setattr(cls, flag, None)
    return cls
