"""Keywords of functions for type checkers, by `python -m tests.typing.test_keywords`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict

from .config import (
    CtIntensity,
    ExpertLayer,
    Mixer,
    Modality,
    ModelName,
    Platform,
    Precision,
    Resampling,
    Strategy,
    Surface,
)

StrPath = str | Path

class CheckFlags(TypedDict, total=False):
    folder: Required[StrPath | Sequence[StrPath]]
    modality: Modality | None
    dataset: Sequence[str]
    fast: bool
    json: StrPath | None
    show: int
    series: Sequence[str]
    spacing_scale: float | None
    num_workers: int | None

class PlanFlags(TypedDict, total=False):
    folder: Required[StrPath]
    memory: float | None
    model: ModelName | None
    max_minutes: float | None
    dataset: Sequence[str]
    output: StrPath | None

class PreprocessFlags(TypedDict, total=False):
    input_path: Required[StrPath | Sequence[StrPath]]
    output_path: Required[StrPath]
    dataset: Sequence[str]
    modality: Modality | None
    spacing: Sequence[float] | None
    resampling: Resampling | None
    plan: StrPath | None
    num_workers: int | None
    overwrite: bool
    only: Modality | None
    series: Sequence[str]
    labels: Sequence[str]
    label_map: StrPath | None
    orientation: str
    spacing_scale: float | None
    ct_intensity: CtIntensity

class TrainFlags(TypedDict, total=False):
    data_train: Required[StrPath]
    output_dir: StrPath | None
    data_val: StrPath | None
    model: ModelName
    recipe: Literal["published", "strong", "nnunet"]
    epochs: int
    steps: int | None
    max_minutes: float | None
    batch_size: int
    resume: bool
    hold_out: int
    classes: int | None
    modality: Modality | None
    num_workers: int | None
    seed: int
    strides: Literal["published", "auto"]
    feature_size: int | None
    mixer: Mixer
    experts: ExpertLayer
    patch_size: Sequence[int] | None
    precision: Precision | None
    use_checkpoint: bool
    use_pretrained: StrPath
    freeze_encoder: bool
    encoder_lr_scale: float
    minutes_from: Literal["start", "first_step"]
    skip_val: int
    val_every: int | None
    max_val_cases: int | None
    overlap: float
    checkpoint_every: int | None
    keep_last: int
    checkpoint_name: str
    load_checkpoint: bool
    members: int
    folds: int | None
    fold_seed: int | None
    fold: int | None
    parallel: bool
    num_devices: int | None
    strategy: Strategy
    tracker: Sequence[Literal["wandb", "mlflow"]]
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    pin_memory: bool
    optimizer: Literal["AdamW", "Adam", "SGD"] | None
    lr: float | None
    weight_decay: float | None
    eps: float | None
    scheduler: Literal["CALR", "polynomial"] | None
    warmup_steps: int | None
    clip_norm: float | None
    ema_decay: float | None
    dropout: float | None
    deep_supervision: bool | None
    batch_dice: bool | None
    positive_fraction: float | None
    class_balanced: bool | None
    augment: bool | None
    mirror: Sequence[Literal["none", "LR", "AP", "IS"]] | None
    zoom_probability: float | None
    rotate90_probability: float | None
    affine_probability: float | None
    affine_rotation: float | None
    plane_rotation: float | None
    affine_scale: Sequence[float] | None
    elastic_probability: float | None
    elastic_std: float | None
    gamma_probability: float | None
    contrast_probability: float | None
    brightness_probability: float | None

class InferFlags(TypedDict, total=False):
    data_path: Required[StrPath]
    model_path: Required[StrPath | Sequence[StrPath]]
    output_dir: StrPath
    split: Literal["auto", "all", "train", "val", "test"]
    tta: bool
    labels: Sequence[str]
    keep_largest: Sequence[str]
    output_format: Literal["nii.gz", "nii", "mha", "nrrd", "dcm"]
    skip_existing: bool
    modality: Modality | None
    series: Sequence[str]
    spacing_scale: float | None
    num_workers: int
    roi_size: Sequence[int] | None
    overlap: float
    sw_batch_size: int
    spacing: Sequence[float] | None
    orientation: str | None
    chain: Literal["trained", "published"] | None
    precision: Precision | None
    gpu: bool
    num_devices: int | None
    previews: bool
    save_probabilities: bool

class EvaluateFlags(TypedDict, total=False):
    predictions: Required[StrPath]
    references: Required[StrPath]
    output_dir: Required[StrPath]
    compare: StrPath | None
    labels: StrPath | None
    tolerance_mm: float
    spacing_scale: float | None
    surface: Surface
    num_workers: int | None

class ReportFlags(TypedDict, total=False):
    evaluation: Required[StrPath]
    output: StrPath | None
    predictions: StrPath | None
    references: StrPath | None
    images: StrPath | None
    worst: int
    window: Sequence[float] | None

class DuelFlags(TypedDict, total=False):
    folder: Required[StrPath]
    against: Required[Sequence[str]]
    model: ModelName | None
    output_dir: StrPath
    folds: int
    max_minutes: float | None
    steps: int | None
    seeds: int
    equal: Literal["images", "memory"]
    at_once: int

class ExportFlags(TypedDict, total=False):
    model: Required[StrPath]
    destination: Required[StrPath]
    platforms: Sequence[Platform]
    roi_size: Sequence[int] | None
    precision: Precision | None
    modality: Modality | None
    spacing: Sequence[float] | None
    overwrite: bool

class CleanFlags(TypedDict, total=False):
    folder: StrPath | None
    yes: bool
    older_than: float | None

class SegmentKeywords(TypedDict, total=False):
    spacing: Sequence[float] | None
    orientation: str | None
    modality: Modality | None
    roi_size: Sequence[int] | None
    overlap: float | Sequence[float]
    sw_batch_size: int
    chain: Literal["trained", "published"] | None
    tta: bool
    labels: Sequence[str]
    keep_largest: str | Sequence[str]

class SegMambaShape(TypedDict, total=False):
    depths: Sequence[int]
    feat_size: Sequence[int]
    strides: Sequence[Sequence[int]]
    kernel_sizes: Sequence[Sequence[int]]
    use_checkpoint: bool
    hidden_size: int
    num_slices: Sequence[int]

class UNetShape(TypedDict, total=False):
    depths: Sequence[int]
    feat_size: Sequence[int]
    strides: Sequence[Sequence[int]]
    kernel_sizes: Sequence[Sequence[int]]
    use_checkpoint: bool
    decoder_depths: Sequence[int]
