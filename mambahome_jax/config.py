"""What travels with a model: the shape of the network and the data it was trained on. Imports no jax."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation, ct_from_json, ct_to_json
from mambahome_jax.values import SAMPLE_PERCENTILES as SAMPLE_PERCENTILES
from mambahome_jax.values import AnatomicalAxis as AnatomicalAxis
from mambahome_jax.values import CtIntensity as CtIntensity
from mambahome_jax.values import Modality as Modality
from mambahome_jax.values import Precision as Precision
from mambahome_jax.values import ScanRanges as ScanRanges
from mambahome_jax.values import StructureRange as StructureRange
from mambahome_jax.values import Surface as Surface
from mambahome_jax.values import converted, entries, integers, one_of, text, three

Strategy = Literal["ddp", "fsdp"]
Triple = tuple[int, int, int]
# An axis of the array, and the pairs of label values that trade places where a volume is mirrored along it.
Mirror = tuple[int, tuple[tuple[int, int], ...]]
# The same of anatomical axes (LR, AP, IS).
MirrorPairs = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
# Of layers and experts in a stage, and of channels anywhere: far more than any network has.
MOST_PARTS, MOST_CHANNELS = 1000, 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, in the names of the published constructor (MambaHoME.py); defaults as published.

    One entry a stage in `depths`, `feat_size`, `experts_list` (first level), `experts_list_second` and `group_list`
    (tokens a group, first level). Not published, an entry an axis of the volume: `strides` of each stage, 1 or 2, and
    `kernel_sizes` of the convolutions on each of the five grids, the full one first, 1 or 3.
    """

    in_chans: int = 1
    out_chans: int = 13
    depths: tuple[int, ...] = (2, 2, 2, 2)
    feat_size: tuple[int, ...] = (48, 96, 192, 384)
    hidden_size: int = 768
    expert_mult: int = 2
    num_slots_per_expert_first: int = 4
    experts_list: tuple[int, ...] = (4, 8, 12, 16)
    experts_list_second: tuple[int, ...] = (8, 16, 24, 32)
    group_list: tuple[int, ...] = (2048, 1024, 512, 256)
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 4
    kernel_sizes: tuple[Triple, ...] = ((3, 3, 3),) * 5
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        # The values may come from a file that anybody wrote, so their types are not taken on trust.
        for name in ("depths", "feat_size", "experts_list", "experts_list_second", "group_list"):
            value = converted(name, getattr(self, name), integers, "four positive integers, one a stage")
            object.__setattr__(self, name, value)
            if len(value) != 4 or min(value) < 1:
                raise ConfigError(f"{name} is {value}; expected four positive integers, one a stage of the encoder")
            # A network of a billion layers would be built for ever before its weights are seen to be missing.
            if name != "group_list" and max(value) > (MOST_CHANNELS if name == "feat_size" else MOST_PARTS):
                raise ConfigError(f"{name} is {value}; expected at most {MOST_PARTS}, and {MOST_CHANNELS} channels")
        for name in ("in_chans", "out_chans", "hidden_size", "expert_mult", "num_slots_per_expert_first"):
            if not 1 <= converted(name, getattr(self, name), operator.index, "a positive integer") <= MOST_CHANNELS:
                found = f"{name} is {getattr(self, name)}"
                raise ConfigError(f"{found}; expected a positive integer, at most {MOST_CHANNELS}")
        for name, count, choices in (("strides", 4, (1, 2)), ("kernel_sizes", 5, (1, 3))):
            expected = f"{count} triples of {choices[0]} or {choices[1]}, an entry an axis"
            value = converted(
                name,
                getattr(self, name),
                lambda v: tuple(three(entry, operator.index) for entry in entries(v)),
                expected,
            )
            object.__setattr__(self, name, value)
            if len(value) != count or not {size for entry in value for size in entry} <= set(choices):
                raise ConfigError(f"{name} is {value}; expected {expected}")
        if not isinstance(self.use_checkpoint, bool):
            raise ConfigError(f"use_checkpoint is {self.use_checkpoint!r}; expected true or false")

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    @property
    def multiples(self) -> Triple:
        """What a patch or window is a multiple of, an entry an axis."""
        a, b, c = (math.prod(sizes) for sizes in zip(*self.strides, strict=True))
        return a, b, c


def said_multiples(multiples: Triple) -> str:
    """ "16", or "16 16 2" where the axes differ."""
    return str(multiples[0]) if len(set(multiples)) == 1 else " ".join(map(str, multiples))


@dataclass(frozen=True)
class DataProperties:
    """What a model was trained on, carried along with its weights, so that inference prepares scans the same way."""

    spacing: tuple[float, float, float] | None = (0.8, 0.8, 3.0)
    """Voxel size in mm; None: the scans were left at their own."""
    orientation: str = "RAS"
    modality: Modality = "ct"
    labels: tuple[tuple[int, str], ...] = ()
    """(value, name) of each structure, without the background."""
    channels: tuple[str, ...] = ()
    patch_size: tuple[int, int, int] | None = None
    mirror: tuple[str, ...] = ()
    """Anatomical axes (LR, AP, IS) along which scans were mirrored in training."""
    mirror_pairs: MirrorPairs | None = None
    """(axis, pairs of label values that traded places there) of these axes; None: those whose names differ in the side,
    as in checkpoints of earlier versions."""
    ct_normalisation: CtNormalisation = PUBLISHED_WINDOW
    """How CT is normalised; other modalities have one way each."""
    # Not compared: networks trained on other cases of one dataset share what is compiled for them.
    ranges: tuple[ScanRanges, ...] = dataclasses.field(default=(), compare=False)
    """What the scans were like, one entry a modality; empty where that was not noted."""
    values: tuple[tuple[int, int], ...] = ()
    """(value of `labels`, value that label maps store and results hold), where the two differ; empty elsewhere."""
    val_dice: float | None = dataclasses.field(default=None, compare=False)
    """Best mean Dice of the training's validations, None where it is not known."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataProperties":
        """From the entry "data" of a checkpoint's config.json; entries that are not there keep their defaults.

        Raises ConfigError: an entry of another form.
        """
        forms: dict[str, tuple[Callable[[Any], Any], str]] = {
            "spacing": (lambda v: None if v is None else three(v, float), "three numbers in mm, or null"),
            "orientation": (text, "three letters such as RAS"),
            "modality": (lambda v: one_of(v, get_args(Modality)), f"one of {', '.join(get_args(Modality))}"),
            "labels": (lambda v: tuple((int(value), text(name)) for value, name in v.items()), '{"1": name, ...}'),
            "channels": (lambda v: tuple(text(name) for name in entries(v)), "a list of names"),
            "patch_size": (lambda v: None if v is None else three(v, operator.index), "three integers, or null"),
            "mirror": (
                lambda v: tuple(one_of(name, get_args(AnatomicalAxis)) for name in entries(v)),
                "axes of LR, AP, IS",
            ),
            "mirror_pairs": (
                lambda v: None if v is None else tuple((axis, _pairs(pairs)) for axis, pairs in v.items()),
                '{"LR": [[2, 3], ...]}, or null',
            ),
            "ct_scale": (ct_from_json, "low, high, mean and std, or null"),
            "ranges": (
                lambda v: tuple(
                    ScanRanges.from_json(one_of(name, get_args(Modality)), entry) for name, entry in v.items()
                ),
                "the ranges of each modality",
            ),
            "values": (
                lambda v: _stored(v, values.get("labels") or ()),
                'a stored value of its own, 1 to 65535, for each label: {"1": 255, ...}',
            ),
            "val_dice": (lambda v: None if v is None else float(v), "a number, or null"),
        }
        fields = {name: converted(name, values[name], *form) for name, form in forms.items() if name in values}
        if "ct_scale" in fields:
            fields["ct_normalisation"] = fields.pop("ct_scale")
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json: labels as {"1": name}; pairs, values, ranges and score where there are any."""
        content = dataclasses.asdict(self) | {
            "labels": {str(value): name for value, name in self.labels},
            "ct_scale": ct_to_json(self.ct_normalisation),
        }
        del content["ranges"], content["values"], content["mirror_pairs"], content["ct_normalisation"]
        if self.val_dice is None:
            del content["val_dice"]
        if self.mirror_pairs is not None:
            content["mirror_pairs"] = dict(self.mirror_pairs)
        if self.values:
            content["values"] = {str(value): stored for value, stored in self.values}
        return content | ({"ranges": {item.modality: item.to_json() for item in self.ranges}} if self.ranges else {})


def _stored(values: Any, labels: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """Raises ValueError: no value of its own for one of the labels, whose voxels would become background."""
    stored = tuple((int(number), one_of(value, range(1, 1 << 16))) for number, value in values.items())
    distinct = len({value for _, value in stored}) == len(stored)
    if not distinct or (stored and not {int(label) for label in labels} <= {*dict(stored)}):
        raise ValueError("values of which structures cannot be told apart")
    return stored


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    return tuple((operator.index(one), operator.index(other)) for one, other in entries(values))


@dataclass(frozen=True)
class ModelSize:
    """A size that `--model` picks: learning rate and Adam epsilon as published, and the rate of the strong recipe."""

    model: ModelConfig
    lr: float
    eps: float
    strong_lr: float
    patch_size: tuple[int, int, int]


# Flags of training that older reports and checkpoints do not name, as they were then.
BEFORE_THERE_WERE = {"dropout": 0.0}
# The same of the network.
PUBLISHED_GRID = {"strides": [[2, 2, 2]] * 4, "kernel_sizes": [[3, 3, 3]] * 5}
MODEL_SIZES = {
    "MambaHoME": ModelSize(ModelConfig(), lr=1e-4, eps=1e-4, strong_lr=3e-4, patch_size=(96, 96, 96)),
    "MambaHoME_small": ModelSize(
        ModelConfig(
            depths=(1, 1, 2, 1),
            feat_size=(24, 48, 96, 192),
            hidden_size=384,
            experts_list=(4, 4, 8, 8),
            experts_list_second=(8, 8, 16, 16),
        ),
        lr=3e-4,
        eps=1e-8,
        strong_lr=1e-3,
        patch_size=(96, 96, 96),
    ),
    "MambaHoME_tiny": ModelSize(
        ModelConfig(
            depths=(1, 1, 1, 1),
            feat_size=(8, 16, 24, 32),
            hidden_size=48,
            num_slots_per_expert_first=2,
            experts_list=(2, 4, 4, 4),
            experts_list_second=(4, 8, 8, 8),
        ),
        lr=2e-3,
        eps=1e-8,
        strong_lr=2e-3,
        patch_size=(48, 48, 48),
    ),
}
