"""What travels with a model: the shape of the network and the data it was trained on. Imports no jax."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from mambahome_jax.errors import ConfigError
from mambahome_jax.forms import Convert, among, converted, count_up_to, entries, optional, text
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW, CtNormalisation, ct_from_json, ct_to_json
from mambahome_jax.imaging.normalisation import Modality as Modality
from mambahome_jax.ranges import ScanRanges

if TYPE_CHECKING:
    from mambahome_jax.imaging.nnunet import NnunetPreparation

ModelName = Literal[
    "MambaHoME",
    "MambaHoME_small",
    "MambaHoME_tiny",
    "SegMamba",
    "PlainUNet",
    "ResEncUNet",
    "ResEncUNet_M",
    "ResEncUNet_L",
    "ResEncUNet_XL",
]
Precision = Literal["fp32", "tf32", "bf16"]
Platform = Literal["cpu", "cuda", "tpu"]  # that programs are exported for
Strategy = Literal["ddp", "fsdp"]
Mixer = Literal["scan", "conv", "none"]  # what a MambaHoME block has in the place of Mamba
ExpertLayer = Literal["home", "level1", "ffn"]  # and in the place of HoME
TWINS = {"mixer": Mixer, "experts": ExpertLayer}
Surface = Literal["voxels", "area"]  # what metrics of distance count
AnatomicalAxis = Literal["LR", "AP", "IS"]  # each named by the two letters that an orientation such as "RAS" has for it
Resampling = Literal["linear", "cubic"]  # of images, see imaging.geometry.resample
CtIntensity = Literal["window", "percentiles"]  # how CT is normalised, see CtWindow and CtScale
Triple = tuple[int, int, int]
Pairs = tuple[tuple[int, int], ...]
Mirror = tuple[int, Pairs]  # an axis of the array, and the label values that trade places where it is mirrored
MirrorPairs = tuple[tuple[str, Pairs], ...]  # the same of anatomical axes
Contents = tuple[tuple[str, ...], ...]  # for each scan its digests, see imaging.intensity.voxel_digest

PUBLISHED_ROI: Triple = (192, 192, 48)  # the window of the published inference script
# Far more than any network has: building a larger one would never end.
_PARTS, _CHANNELS = count_up_to(1000), count_up_to(1 << 16)
_STAGES = "four positive integers, one a stage of the encoder"
_AXES = "an entry an axis"
_MOST_STAGES = 16  # of a U-Net: each halves the grid
_STRIDE, _KERNEL = entries(among((1, 2)), 3), entries(among((1, 3)), 3)
Forms = dict[str, tuple[Convert, str]]
# How each field of a network's configuration is read, as anybody may have written it into a file.
_NETWORK_FIELDS: Forms = {
    **dict.fromkeys(
        ("in_chans", "out_chans", "hidden_size", "expert_mult", "num_slots_per_expert_first"),
        (_CHANNELS, "a positive integer, at most 65536"),
    ),
    **dict.fromkeys(
        ("depths", "experts_list", "experts_list_second"), (entries(_PARTS, 4), f"{_STAGES}, at most 1000")
    ),
    "feat_size": (entries(_CHANNELS, 4), f"{_STAGES}, at most 65536"),
    **dict.fromkeys(("group_list", "num_slices"), (entries(count_up_to(math.inf), 4), _STAGES)),
    "strides": (entries(_STRIDE, 4), f"4 triples of 1 or 2, {_AXES}"),
    "kernel_sizes": (entries(_KERNEL, 5), f"5 triples of 1 or 3, {_AXES}"),
    "use_checkpoint": (among((False, True)), "true or false"),
    **{name: (among(get_args(kind)), f"one of {', '.join(get_args(kind))}") for name, kind in TWINS.items()},
}
_UNET_FIELDS: Forms = _NETWORK_FIELDS | {
    **dict.fromkeys(("depths", "decoder_depths"), (entries(_PARTS), "positive integers, one a stage, at most 1000")),
    "feat_size": (entries(_CHANNELS), "positive integers, one a stage, at most 65536"),
    "strides": (entries(_STRIDE), f"triples of 1 or 2, {_AXES}"),
    "kernel_sizes": (entries(_KERNEL), f"triples of 1 or 3, {_AXES}"),
}


@dataclass(frozen=True)
class NetworkConfig:
    """What the shapes of all our networks have, in the names of the constructor of MambaHoME.

    One entry a stage in `depths` and `feat_size`; an entry an axis of the volume in `strides` of each stage that
    coarsens the grid, 1 or 2, and in `kernel_sizes` of the convolutions on each grid, the full one first, 1 or 3.
    """

    forms: ClassVar[Forms] = _NETWORK_FIELDS

    in_chans: int = 1
    out_chans: int = 13
    depths: tuple[int, ...] = (2, 2, 2, 2)
    feat_size: tuple[int, ...] = (48, 96, 192, 384)
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 4
    kernel_sizes: tuple[Triple, ...] = ((3, 3, 3),) * 5
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, field.name, converted(field.name, value, *self.forms[field.name]))

    @classmethod
    def of_keywords(cls, in_chans: int, out_chans: int, shape: Mapping[str, Any]) -> Self:
        """Make it of what a network's constructor is given. Raises ConfigError: no such field, no such value."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [*shape.keys() - {*names}]:
            raise ConfigError(f"{min(unknown)}: there is no such keyword; expected {', '.join(names)}")
        return cls(in_chans, out_chans, **shape)

    @property
    def twin(self) -> str:
        """What differs from the published network, such as "mixer conv, experts ffn"; empty where nothing does."""
        own = {name: getattr(self, name, None) for name in TWINS}
        return ", ".join(f"{name} {value}" for name, value in own.items() if value != getattr(type(self), name, None))

    def replace(self, **changes) -> Self:
        """With other values of some fields. Raises ConfigError for a field that this network does not have."""
        for name in sorted(changes.keys() - {field.name for field in dataclasses.fields(self)}):
            raise ConfigError(f"this network has no {name}. Leave --{name} out, or choose another --model")
        return dataclasses.replace(self, **changes)

    def for_patch(self, patch: Triple) -> Self:
        """The same network, able to take patches of this size."""
        return self

    def with_grids(self, strides: Sequence[Triple], kernel_sizes: Sequence[Triple]) -> Self:
        """The same network on other grids."""
        return self.replace(strides=tuple(strides), kernel_sizes=tuple(kernel_sizes))

    def widened(self, first: int) -> Self:
        """The same network with so many channels in its first stage, and the others in their proportions to it."""
        return self.replace(feat_size=tuple(round(width * first / self.feat_size[0]) for width in self.feat_size))

    @property
    def multiples(self) -> Triple:
        """What a patch or window is a multiple of, an entry an axis."""
        return multiples_of(self.strides)

    def check_size(self, size: Triple) -> None:
        """Raise ConfigError, naming the axis and the remedy, where the network cannot take volumes of this size."""
        for name, voxels, multiple in zip(("depth", "height", "width"), size, self.multiples, strict=True):
            if voxels < multiple or voxels % multiple:
                below, above = voxels // multiple * multiple, -(-voxels // multiple) * multiple
                near = f"{below} or {above}" if below else f"{above}"
                raise ConfigError(
                    f"{name} is {voxels}, which {multiple} does not divide (size {spaced(size)}). Pad or crop {name} "
                    f"to {near}, or use sliding_window, which takes volumes of any size"
                )
        if size == self.multiples:
            raise ConfigError(
                f"depth, height and width are {spaced(size)}, which leaves one voxel at the deepest stage, where "
                "instance norm would give zeros. Make at least one of them twice as large"
            )

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json, with the name of the network as "network" where it is not MambaHoME."""
        name = next(name for name, kind in NETWORKS.items() if type(self) is kind)
        return ({} if type(self) is ModelConfig else {"network": name}) | dataclasses.asdict(self)


@dataclass(frozen=True)
class FourStageConfig(NetworkConfig):
    """An encoder of four stages; hidden_size: channels on the deepest grid of the decoder."""

    hidden_size: int = 768

    def widened(self, first: int) -> Self:
        hidden = round(self.hidden_size * first / self.feat_size[0])
        return super().widened(first).replace(hidden_size=hidden)


@dataclass(frozen=True)
class ModelConfig(FourStageConfig):
    """Shape of MambaHoME, in the names of the published constructor (MambaHoME.py); defaults as published.

    One entry a stage in `experts_list`, `group_list` (tokens a group), both of level 1, and `experts_list_second`.
    Twins, not published: `mixer`, Mamba's layer, a convolution in the place of its scan, or none; `experts`, HoME, its
    level 1 alone, or one expert for every token.
    """

    expert_mult: int = 2
    num_slots_per_expert_first: int = 4
    experts_list: tuple[int, ...] = (4, 8, 12, 16)
    experts_list_second: tuple[int, ...] = (8, 16, 24, 32)
    group_list: tuple[int, ...] = (2048, 1024, 512, 256)
    mixer: Mixer = "scan"
    experts: ExpertLayer = "home"


@dataclass(frozen=True)
class SegMambaConfig(FourStageConfig):
    """Shape of SegMamba (Xing et al. 2024, segmamba.py); defaults as published.

    num_slices: runs of tokens, for each stage, that the third direction of its Mamba layers goes across.
    """

    num_slices: tuple[int, ...] = (64, 32, 16, 8)

    def for_patch(self, patch: Triple) -> Self:
        """With as many slices as each stage's grid is deep, where the present ones do not divide its tokens."""
        if self._misfit(patch) is None:
            return self
        return self.replace(num_slices=tuple(depth for depth, _, _ in self._grids(patch)))

    def check_size(self, size: Triple) -> None:
        """As other networks do, and ConfigError where the slices of a stage do not divide its tokens."""
        super().check_size(size)
        if (stage := self._misfit(size)) is None:
            return
        grid, wider = self._grids(size)[stage], triple(2 * multiple for multiple in self.multiples)
        action = f"Take multiples of {said_multiples(wider)}" if self._misfit(wider) is None else "Take another size"
        raise ConfigError(
            f"depth, height and width are {spaced(size)}, which makes {math.prod(grid)} tokens of stage {stage + 1}; "
            f"its {self.num_slices[stage]} slices do not divide them. {action}, or a network with num_slices such as "
            f"{spaced(self.for_patch(size).num_slices)}"
        )

    def _misfit(self, size: Triple) -> int | None:
        """Find the first stage whose slices do not divide its tokens, from 0 on; None where all do."""
        tokens = map(math.prod, self._grids(size))
        stages = enumerate(zip(tokens, self.num_slices, strict=True))
        return next((stage for stage, (count, slices) in stages if count % slices), None)

    def _grids(self, size: Triple) -> list[Triple]:
        """Of the four stages, for volumes of a size."""
        steps = itertools.accumulate(self.strides, lambda one, other: triple(map(operator.mul, one, other)))
        return [triple(map(operator.floordiv, size, step)) for step in steps]


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Shape of a U-Net of nnU-Net (Isensee et al. 2021), with as many stages as `feat_size` has entries.

    The first stage works on the full grid, so `strides` has an entry less. depths: convolutions, or residual blocks, of
    each stage; decoder_depths: convolutions of each step of the decoder, the coarsest first.
    """

    forms: ClassVar[Forms] = _UNET_FIELDS

    depths: tuple[int, ...] = (2,) * 6
    feat_size: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 5
    kernel_sizes: tuple[Triple, ...] = ((3, 3, 3),) * 6
    decoder_depths: tuple[int, ...] = (2,) * 5

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.feat_size)
        expected = {"depths": stages, "kernel_sizes": stages, "strides": stages - 1, "decoder_depths": stages - 1}
        if not 2 <= stages <= _MOST_STAGES:
            raise ConfigError(f"feat_size has {stages} entries; expected one a stage, 2 to {_MOST_STAGES}")
        for name, count in expected.items():
            if (entries_of := len(getattr(self, name))) != count:
                raise ConfigError(f"{name} has {entries_of} entries; expected {count} for {stages} stages")

    def with_grids(self, strides: Sequence[Triple], kernel_sizes: Sequence[Triple]) -> Self:
        """On other grids, with as many stages: the last one comes again, or the last ones go."""
        stages = len(kernel_sizes)

        def fitted(values: tuple[int, ...], count: int) -> tuple[int, ...]:
            return values[:count] + values[-1:] * (count - len(values))

        return self.replace(
            strides=tuple(strides),
            kernel_sizes=tuple(kernel_sizes),
            depths=fitted(self.depths, stages),
            feat_size=fitted(self.feat_size, stages),
            decoder_depths=fitted(self.decoder_depths, stages - 1),
        )


@dataclass(frozen=True)
class PlainUNetConfig(UNetConfig):
    """Shape of PlainConvUNet: stages of convolutions; defaults as planned for 128 x 128 x 128 voxels of one size."""


@dataclass(frozen=True)
class ResEncUNetConfig(UNetConfig):
    """Shape of ResidualEncoderUNet: stages of residual blocks; defaults as of PlainUNet."""

    depths: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    decoder_depths: tuple[int, ...] = (1,) * 5


NETWORKS: dict[str, type[NetworkConfig]] = {
    "MambaHoME": ModelConfig,
    "SegMamba": SegMambaConfig,
    "PlainUNet": PlainUNetConfig,
    "ResEncUNet": ResEncUNetConfig,
}


def network_from_json(values: Mapping[str, Any]) -> NetworkConfig:
    """Read what `to_json` gives. Raises TypeError for unknown fields, ConfigError for values that cannot be."""
    fields = dict(values)
    name = converted("network", fields.pop("network", "MambaHoME"), among(NETWORKS), f"one of {', '.join(NETWORKS)}")
    return NETWORKS[name](**fields)


def spaced(values: Iterable[int]) -> str:
    """ "64 64 32" of sizes along the axes."""
    return " ".join(map(str, values))


def said_multiples(multiples: Triple) -> str:
    """ "16", or "16 16 2" where the axes differ."""
    return str(multiples[0]) if len(set(multiples)) == 1 else spaced(multiples)


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
    trained_on: Contents | None = dataclasses.field(default=None, compare=False)
    """`voxel_digest`s of each scan that was trained on, pre-training included; () for scans of which nothing is known,
    None where nothing was noted."""
    held_out: Contents | None = dataclasses.field(default=None, compare=False)
    """The same of each scan that was validated on."""
    val_dice: float | None = dataclasses.field(default=None, compare=False)
    """Best mean Dice of the training's validations, None where it is not known."""
    resampling: Resampling = "linear"
    """How images came to `spacing`."""
    nnunet: "NnunetPreparation | None" = None
    """How nnU-Net prepared the scans, where it did and orientation, modality and resampling are not all of it."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataProperties":
        """From the entry "data" of a checkpoint's config.json; entries that are not there keep their defaults.

        Raises ConfigError: an entry of another form.
        """
        modalities = get_args(Modality)
        forms: dict[str, tuple[Convert, str]] = {
            "spacing": (optional(entries(float, 3)), "three numbers in mm, or null"),
            "orientation": (text, "three letters such as RAS"),
            "modality": (among(modalities), f"one of {', '.join(modalities)}"),
            "labels": (lambda v: tuple((int(value), text(name)) for value, name in v.items()), '{"1": name, ...}'),
            "channels": (entries(text), "a list of names"),
            "patch_size": (optional(entries(operator.index, 3)), "three integers, or null"),
            "mirror": (entries(among(get_args(AnatomicalAxis))), "axes of LR, AP, IS"),
            "mirror_pairs": (
                optional(lambda v: tuple((axis, entries(_PAIR)(pairs)) for axis, pairs in v.items())),
                '{"LR": [[2, 3], ...]}, or null',
            ),
            "ct_scale": (ct_from_json, "low, high, mean and std, or null"),
            "ranges": (
                lambda v: tuple(ScanRanges.from_json(among(modalities)(name), entry) for name, entry in v.items()),
                "the ranges of each modality",
            ),
            "values": (
                lambda v: _stored(v, values.get("labels") or ()),
                'a stored value of its own, 1 to 65535, for each label: {"1": 255, ...}',
            ),
            "val_dice": (optional(float), "a number, or null"),
            "resampling": (among(get_args(Resampling)), f"one of {', '.join(get_args(Resampling))}"),
            "nnunet": (optional(_nnunet_preparation), "axes, normalisation, ... of nnU-Net, or null"),
            **{name: (optional(entries(entries(text))), "digests of each scan, or null") for name in _CASES},
        }
        fields = {name: converted(name, values[name], *form) for name, form in forms.items() if name in values}
        if "ct_scale" in fields:
            fields["ct_normalisation"] = fields.pop("ct_scale")
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json: labels as {"1": name}; what has a value of its own only where it differs."""
        content = dataclasses.asdict(self) | {
            "labels": {str(value): name for value, name in self.labels},
            "ct_scale": ct_to_json(self.ct_normalisation),
        }
        del content["ranges"], content["values"], content["mirror_pairs"], content["ct_normalisation"]
        for name in ("val_dice", "nnunet", *_CASES):
            if content[name] is None:
                del content[name]
        if self.mirror_pairs is not None:
            content["mirror_pairs"] = dict(self.mirror_pairs)
        if self.resampling == "linear":
            del content["resampling"]
        if self.values:
            content["values"] = {str(value): stored for value, stored in self.values}
        return content | ({"ranges": {item.modality: item.to_json() for item in self.ranges}} if self.ranges else {})


def _nnunet_preparation(values: Mapping[str, Any]) -> "NnunetPreparation":
    from mambahome_jax.imaging.nnunet import NnunetPreparation  # not for --help, as it imports NumPy

    return NnunetPreparation.from_json(values)


_PAIR = entries(operator.index, 2)
_CASES = ("trained_on", "held_out")


def _stored(values: Any, labels: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """Raises ValueError: no value of its own for one of the labels, whose voxels would become background."""
    stored = tuple((int(number), among(range(1, 1 << 16))(value)) for number, value in values.items())
    distinct = len({value for _, value in stored}) == len(stored)
    if not distinct or (stored and not {int(label) for label in labels} <= {*dict(stored)}):
        raise ValueError("values of which structures cannot be told apart")
    return stored


@dataclass(frozen=True)
class ModelSize:
    """What `--model` picks: a network, rate and Adam epsilon of the published recipe, and rate of the strong one."""

    model: NetworkConfig
    lr: float
    eps: float
    strong_lr: float
    patch_size: tuple[int, int, int]


MODEL_SIZES: dict[str, ModelSize] = {
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
    **{
        name: ModelSize(network, lr=1e-4, eps=1e-4, strong_lr=3e-4, patch_size=(128, 128, 128))
        for name, network in {
            "SegMamba": SegMambaConfig(),
            "PlainUNet": PlainUNetConfig(),
            # They differ in the patch and batch that are planned for them.
            **dict.fromkeys(("ResEncUNet", "ResEncUNet_M", "ResEncUNet_L", "ResEncUNet_XL"), ResEncUNetConfig()),
        }.items()
    },
}


def multiples_of(strides: Sequence[Triple]) -> Triple:
    """What a patch is a multiple of, an entry an axis, so that each stride divides the grid that it coarsens."""
    return triple(math.prod(sizes) for sizes in zip(*strides, strict=True))


def nearest_multiples(size: Sequence[int], multiples: Triple) -> Triple:
    """The multiples nearest to a size, one at least."""
    return triple(max(round(n / m), 1) * m for n, m in zip(size, multiples, strict=True))


def beyond_one_voxel(patch: Triple, multiples: Triple) -> Triple:
    """A patch that leaves one voxel at the deepest stage, so nothing for instance norm to normalise, doubled."""
    return (2 * patch[0], *patch[1:]) if patch == multiples else patch


def triple(values: Iterable[int]) -> Triple:
    """Three values as a tuple. Raises ValueError for more or fewer."""
    a, b, c = values
    return a, b, c
