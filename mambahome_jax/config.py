"""Every default of the project, in one place. The command line is made from these dataclasses (see cli.py).

Nothing here imports jax, so that `--help` and dataset checks start at once.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, UseAppendAction, arg

from mambahome_jax.errors import ConfigError
from mambahome_jax.evaluation_config import EvaluateConfig as EvaluateConfig
from mambahome_jax.evaluation_config import ReportConfig as ReportConfig
from mambahome_jax.inference_config import ConvertConfig as ConvertConfig
from mambahome_jax.inference_config import InferConfig as InferConfig
from mambahome_jax.recipes import RecipeFlags
from mambahome_jax.values import SAMPLE_PERCENTILES as SAMPLE_PERCENTILES
from mambahome_jax.values import AnatomicalAxis as AnatomicalAxis
from mambahome_jax.values import CtIntensity as CtIntensity
from mambahome_jax.values import CtScale as CtScale
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
    ct_scale: CtScale | None = None
    """How CT is normalised, where that is not by the published window."""
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
            "ct_scale": (lambda v: None if v is None else CtScale.from_json(v), "low, high, mean and std, or null"),
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
        return cls(**{name: converted(name, values[name], *form) for name, form in forms.items() if name in values})

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json: labels as {"1": name}; pairs, values, ranges and score where there are any."""
        content = dataclasses.asdict(self) | {"labels": {str(value): name for value, name in self.labels}}
        del content["ranges"], content["values"], content["mirror_pairs"]
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


@dataclass(frozen=True)
class PreprocessConfig:
    """Read a folder of scans, reorient and resample them, and write NIfTI files and the patch store."""

    input_path: Path | tuple[Path, ...]
    """Folder of the dataset as downloaded, or a CSV file of paths; several are joined by their structures' names."""
    output_path: Path
    """Folder to write; what is there and up to date is kept."""
    spacing: tuple[float, float, float] = (0.8, 0.8, 3.0)
    """Voxel size in mm to resample to, one value an axis of the reoriented volume; 0 or below keeps an axis."""
    orientation: str = "RAS"
    """Direction of the array axes after reading, as three of the letters R L A P S I."""
    spacing_scale: float | None = None
    """What to multiply the lengths of every header by, such as 1000 where one says mm and means metres; 1 takes a scan
    of less than 5 mm or more than 5 m as it is."""
    modality: Modality | None = None
    """What the scans are, where the dataset does not say; decides how intensities are normalised."""
    ct_intensity: CtIntensity = "window"
    """CT: window -175 to 250 HU to [0, 1]; or clipped to the 0.5 and 99.5 percentiles of the labelled voxels of all
    cases but test ones, then brought to their mean 0 and deviation 1. Training and inference then do the same."""
    dataset: tuple[str, ...] = ()
    """Layout of the dataset (default: recognised): one name, or one for each folder of --input_path."""
    labels: tuple[str, ...] = ()
    """Names of the structures to keep, in this order; the others become background (default: all)."""
    label_map: Path | None = None
    """TOML file of structures to make of the dataset's, with lines such as: pancreas = [4, 5]"""
    series: UseAppendAction[tuple[str, ...]] = ()
    """SeriesInstanceUID to take of a folder that holds several DICOM series, given once for each."""
    only: Modality | None = None
    """Keep only the cases that the dataset says are of this modality, as for the CT or the MR part of AMOS."""
    num_workers: int | None = None
    """Processes that work side by side (default: one a core)."""
    overwrite: bool = False
    """Do every case again."""


@dataclass(frozen=True)
class CheckConfig:
    """Look through a dataset before any work: list what is wrong with it and suggest settings."""

    folder: Positional[Annotated[Path | tuple[Path, ...], arg(metavar="FOLDER [FOLDER ...]")]]
    """Folder of the dataset as downloaded, or a CSV file of paths, as preprocess takes it; several are looked at as
    the one dataset that preprocess makes of them. Or a scan, or a folder of scans without labels, as infer takes it."""
    dataset: UseAppendAction[tuple[str, ...]] = ()
    """Layout of the dataset (default: recognised); given several times, one for each FOLDER."""
    series: UseAppendAction[tuple[str, ...]] = ()
    """SeriesInstanceUID to take of a folder that holds several DICOM series, given once for each."""
    fast: bool = False
    """Read headers only: geometry and duplicates, but no voxels."""
    json: Path | None = None
    """File to write all findings and the summary to."""
    show: int = 20
    """Findings of one kind to print; 0 prints all."""
    modality: Modality | None = None
    """What the scans are, where the dataset does not say."""
    spacing_scale: float | None = None
    """What to multiply the lengths of every header by, such as 1000 where one says mm and means metres; 1 takes a scan
    of less than 5 mm or more than 5 m as it is."""
    num_workers: int | None = None
    """Processes that work side by side (default: one a core)."""


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


@dataclass(frozen=True)
class TrainConfig(RecipeFlags):
    """Train on a preprocessed folder, or straight on <case>/*ct*.nii.gz with <case>/*labels*.nii.gz."""

    data_train: Path
    """Output folder of preprocess.py, or a folder in the published layout."""
    data_val: Path | None = None
    """Another such folder for validation; without it the cases marked "val", else every fifth case, are held out."""
    hold_out: int = 5
    """Hold out every n-th patient of a folder without marks to validate on; 0: none, the last weights are "best"."""
    config: Path | None = None
    """run.json of an earlier run, to run it again with its flags; those that are given win."""
    output_dir: Path | None = None
    """Where the run is written (default: runs/<checkpoint_name>; with --config a folder beside the earlier run)."""
    checkpoint_name: str = ""
    """Name of the run (default: that of --model)."""
    model: Literal["MambaHoME", "MambaHoME_small", "MambaHoME_tiny"] = "MambaHoME"
    """Size of the network."""
    strides: Literal["published", "auto"] = "published"
    """Which axes each stage halves: all; or, by the size of a voxel, thick slices later than the plane within them."""
    feature_size: int | None = None
    """Channels of the first stage; the other stages keep their proportions to it (default: the size's own)."""
    classes: int | None = None
    """Number of classes, background included (default: as many as the dataset has)."""
    patch_size: tuple[int, int, int] | None = None
    """Patch in voxels, multiples of 16 (default: 96 96 96, 48 48 48 for MambaHoME_tiny; less for small scans)."""
    batch_size: int = 2
    """Patches in a step on each device."""
    epochs: int = 800
    """Passes over the training cases."""
    steps: int | None = None
    """Number of steps in all, instead of --epochs."""
    max_minutes: float | None = None
    """Wall-clock minutes from start to end, compilation and last validation included, instead of --epochs."""
    members: int = 1
    """Networks to train one after the other for infer.py to use together, in member_0, member_1, ... with seeds that
    count on from --seed. --max_minutes is of all together; --steps and --epochs are of each."""
    scheduler: Literal["CALR"] = "CALR"
    """Cosine annealing of the learning rate to 0, a step every --skip_val epochs (every epoch with --steps)."""
    schedule_step: Literal["epoch", "published"] = "epoch"
    """When the schedule steps: after the last update of an epoch, or one update later, as the published loop does."""
    skip_val: int = 1
    """Epochs between validations."""
    val_every: int | None = None
    """Steps between validations, instead of --skip_val."""
    use_checkpoint: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    use_pretrained: Annotated[str, arg(metavar="PATH|False")] = ""
    """Weights to start from: a checkpoint folder, .pth, .npz or .safetensors. The output layer of other structures and
    the first convolutions of another number of channels start anew."""
    load_checkpoint: bool = False
    """Continue the run in --output_dir, as --resume does."""
    resume: bool = False
    """Continue the run in --output_dir from its last checkpoint."""
    modality: Modality | None = None
    """ct: window -175 to 250 HU; mr: z-score of each volume; us: scaled to [0, 1] (default: as the dataset says)."""
    freeze_encoder: bool = False
    """Keep the encoder of --use_pretrained as it is; its backward pass is left out."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder as a share of that of the rest."""
    precision: Precision | None = None
    """Matrix products and convolutions (default: bf16 on a GPU, fp32 on a CPU)."""
    num_workers: int | None = None
    """Processes that read patches (default: 0 on a CPU, which means threads; 4 on a GPU)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints beside those after each validation."""
    keep_last: int = 1
    """Checkpoints to keep beside the best: the newest is checkpoints/last, earlier ones are step_<number>."""
    overlap: float = 0.5
    """Overlap of the windows in validation."""
    max_val_cases: int | None = None
    """Validate on at most so many cases."""
    seed: int = 0
    """Seed of initial values, patches and augmentation."""
    parallel: bool = True
    """Use several devices; False uses one."""
    num_devices: int | None = None
    """Devices to use in each process (default: all)."""
    strategy: Strategy = "ddp"
    """ddp: parameters on every device; fsdp: parameters and optimizer state split over the devices."""
    coordinator_address: str | None = None
    """Several processes: host:port of the first (default: asked of SLURM or Open MPI); see docs/clusters.md."""
    num_processes: int | None = None
    """Several processes: how many there are in all."""
    process_id: int | None = None
    """Several processes: number of this one, from 0."""
    pin_memory: bool = True
    """Accepted for command lines of the published code; has no meaning in JAX."""


@dataclass(frozen=True)
class DemoConfig:
    """Make synthetic abdominal CT scans, then preprocess, train, infer and evaluate as a user would."""

    output_dir: Path = Path("demo")
    """Folder for everything that the demo writes."""
    train_cases: int = 16
    """Scans to train on."""
    test_cases: int = 4
    """Unseen scans to segment and score."""
    steps: int = 160
    """Training steps."""
    seed: int = 0
    """Seed of the phantoms and of training."""
