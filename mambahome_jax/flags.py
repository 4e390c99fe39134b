"""The flags of every command with their defaults: the command line is made from these dataclasses (see cli.py).

The first fields of a class are the flags that matter first, which -h shows. A ClassVar is the heading of the group of
flags that follow it (see usage.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, Suppress, UseAppendAction, arg

from mambahome_jax.config import (
    CtIntensity,
    ExpertLayer,
    Mixer,
    Modality,
    ModelConfig,
    ModelName,
    Platform,
    Precision,
    Resampling,
    Strategy,
    Surface,
)
from mambahome_jax.recipes import with_ingredient_flags

SpacingScale = Annotated[
    float | None,
    arg(
        help="Factor on the lengths of every header, such as 1000 if a header says mm and means metres. With 1, scans "
        "of less than 5 mm or more than 5 m are accepted."
    ),
]
Workers = Annotated[int | None, arg(help="Processes that work side by side (default: one per core).")]
Series = UseAppendAction[
    Annotated[
        tuple[str, ...],
        arg(help="SeriesInstanceUID to use of a folder with several DICOM series; give it once for each series."),
    ]
]
Numbers = Annotated[
    Precision | None, arg(help="Matrix products and convolutions (default: bf16 on a GPU, fp32 on a CPU).")
]

TrackerName = Literal["wandb", "mlflow"]


@dataclass(frozen=True)
class CheckConfig:
    """Look through a dataset before any work: list what is wrong with it and suggest settings."""

    folder: Positional[Annotated[Path | tuple[Path, ...], arg(metavar="FOLDER [FOLDER ...]")]]
    """A dataset as preprocess takes it: its folder, or a CSV file of paths; several are checked as the one dataset that
    preprocess would make of them. Or a scan, or a folder of scans without labels, as infer takes it."""
    modality: Modality | None = None
    """What the scans are, if the dataset does not say."""
    dataset: UseAppendAction[tuple[str, ...]] = ()
    """Layout of the dataset (default: recognised); give it once for all, or once for each FOLDER."""
    fast: bool = False
    """Read headers only: geometry and duplicates, but no voxels."""
    json: Path | None = None
    """File to write all findings and the summary to."""
    show: int = 20
    """Findings of one kind to print; 0 prints all."""
    series: Series = ()
    spacing_scale: SpacingScale = None
    num_workers: Workers = None


@dataclass(frozen=True)
class PreprocessConfig:
    """Read a folder of scans, reorient and resample them, and write NIfTI files and the patch store."""

    input_path: Path | tuple[Path, ...]
    """Folder of the dataset as downloaded, or a CSV file of paths; several are joined by their structures' names."""
    output_path: Path
    """Folder to write; cases in it that are up to date are kept."""
    dataset: tuple[str, ...] = ()
    """Layout of the dataset (default: recognised): one name, or one for each folder of --input_path."""
    modality: Modality | None = None
    """What the scans are, if the dataset does not say; decides how intensities are normalised."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size in mm to resample to, one value per axis of the reoriented volume; 0 or less keeps an axis (default:
    of the plan, which follows the scans; the paper: 0.8 0.8 3.0)."""
    resampling: Resampling | None = None
    """How images come to that spacing: linear; or cubic splines, with the nearest slice along a far coarser axis
    (default: of the plan, which says linear)."""
    plan: Path | None = None
    """A plan.json to obey, such as one that you edited (default: that of --output_path, where there is one)."""
    num_workers: Workers = None
    overwrite: bool = False
    """Process every case again."""

    _CASES: ClassVar = "Cases and structures"

    only: Modality | None = None
    """Keep only cases of this modality, such as the CT part of AMOS."""
    series: Series = ()
    labels: tuple[str, ...] = ()
    """Names of the structures to keep, in this order; the others become background (default: all)."""
    label_map: Path | None = None
    """TOML file that makes new structures of the dataset's, with lines such as: pancreas = [4, 5]"""

    _GRID: ClassVar = "Grid and intensities"

    orientation: str = "RAS"
    """Direction of the array axes after reading, as three of the letters R L A P S I."""
    spacing_scale: SpacingScale = None
    ct_intensity: CtIntensity = "window"
    """CT: -175 to 250 HU scaled to [0, 1]; or clipped to the 0.5 and 99.5 percentiles of the labelled voxels, then mean
    0 and deviation 1. Training and inference do the same."""


@dataclass(frozen=True)
class PlanConfig:
    """Show the settings that follow from a dataset, each with its reason, and what changes with another machine."""

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """A dataset as preprocess takes it, or a folder that preprocess wrote."""
    memory: float | None = None
    """Plan for a GPU of so many GiB; 0: for a CPU (default: this machine)."""
    model: Annotated[ModelName | None, arg(metavar="NAME")] = None
    """Plan for this network, one of train's."""
    max_minutes: float | None = None
    """Plan for a training of so many minutes."""
    dataset: UseAppendAction[tuple[str, ...]] = ()
    """Layout of the dataset (default: recognised)."""
    output: Path | None = None
    """File to write the plan to, for `preprocess --plan` or as plan.json of a preprocessed folder."""


@dataclass(frozen=True)
@with_ingredient_flags
class TrainConfig:
    """Train on a preprocessed folder, or straight on <case>/*ct*.nii.gz with <case>/*labels*.nii.gz."""

    data_train: Path
    """Output folder of preprocess.py, or a folder in the published layout."""
    output_dir: Path | None = None
    """Folder of the run (default: runs/<checkpoint_name>)."""
    data_val: Path | None = None
    """Another such folder for validation (default: hold out cases marked "val", else every fifth patient)."""
    model: Annotated[ModelName, arg(metavar="NAME")] = "MambaHoME"
    """The network, and its size: MambaHoME, MambaHoME_small, MambaHoME_tiny, SegMamba; or as nnU-Net plans it:
    PlainUNet, ResEncUNet_M, ResEncUNet_L (also ResEncUNet), ResEncUNet_XL."""
    recipe: Literal["published", "strong", "nnunet"] = "published"
    """Values of the flags under Optimizer, Recipe and Augmentation: as in the published code, stronger, or as nnU-Net
    trains. A preprocessed folder's plan.json decides, also on model, patch, batch and length, what no flag does;
    --recipe published leaves the plan aside."""
    epochs: int = 800
    """Passes over the training cases."""
    steps: int | None = None
    """Number of steps, instead of --epochs."""
    max_minutes: float | None = None
    """Wall-clock minutes, compilation and last validation included, instead of --epochs."""
    batch_size: int = 2
    """Patches in a step on each device."""
    resume: bool = False
    """Continue the run in --output_dir from its last checkpoint."""

    _DATA: ClassVar = "Data"

    hold_out: int = 5
    """Hold out every n-th patient of a folder without marks, without a flag as the plan says; 0: none, the last weights
    are "best"."""
    classes: int | None = None
    """Number of classes, background included (default: as many as the dataset has)."""
    modality: Modality | None = None
    """ct: window -175 to 250 HU; mr: z-score of each volume; us: scaled to [0, 1] (default: as the dataset says)."""
    num_workers: int | None = None
    """Processes that read patches (default: 0 on a CPU, which means threads; 4 on a GPU)."""
    seed: int = 0
    """Seed of initial values, patches and augmentation."""

    _NETWORK: ClassVar = "Network"

    strides: Literal["published", "auto"] = "published"
    """Axes that each stage halves: all; or by voxel size, so that thick slices are halved later (U-Nets: always)."""
    feature_size: int | None = None
    """Channels of the first stage; the other stages keep their proportions to it (default: the size's own)."""
    mixer: Mixer = ModelConfig.mixer
    """A twin of MambaHoME: Mamba's layer; a depthwise convolution for its scan; none (without a flag as planned)."""
    experts: ExpertLayer = ModelConfig.experts
    """A twin of MambaHoME: both levels of HoME; the first alone; or one feed-forward network for every token."""
    patch_size: tuple[int, int, int] | None = None
    """Patch in voxels, multiples of 16 (default: 96 96 96, 48 48 48 for MambaHoME_tiny; less for small scans)."""
    precision: Numbers = None
    use_checkpoint: bool = False
    """Recompute each block in the backward pass: less memory, more time."""

    _WEIGHTS: ClassVar = "Weights to start from"

    use_pretrained: Annotated[str, arg(metavar="PATH|False")] = ""
    """Weights to start from: a checkpoint folder, .pth, .npz or .safetensors. Layers for other structures or another
    number of channels start anew."""
    freeze_encoder: bool = False
    """Keep the encoder of --use_pretrained as it is, without its backward pass."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder, as a share of the rate of the rest."""

    _SCHEDULE: ClassVar = "Schedule, validation and checkpoints"

    minutes_from: Literal["start", "first_step"] = "start"
    """What begins --max_minutes: the program; or the first step of each network, without the scores at the end."""
    skip_val: int = 1
    """Epochs between validations."""
    val_every: int | None = None
    """Steps between validations, instead of --skip_val."""
    max_val_cases: int | None = None
    """Largest number of cases to validate on."""
    overlap: float = 0.5
    """Overlap of the windows in validation."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, besides those after each validation."""
    keep_last: int = 1
    """Checkpoints to keep besides the best: the newest is checkpoints/last, earlier ones are step_<number>."""
    checkpoint_name: str = ""
    """Name of the run (default: that of --model)."""
    load_checkpoint: bool = False
    """Continue the run in --output_dir, as --resume does."""

    _SEVERAL: ClassVar = "Several networks, devices and processes"

    members: int = 1
    """Networks to train one after the other, for an ensemble, in member_0, member_1, ...; their seeds count on from
    --seed. They share --max_minutes; --steps, --epochs and a planned length hold for each."""
    folds: int | None = None
    """Cross-validation: so many networks, in fold_0, fold_1, ..., each trained without a part of the patients, on which
    it is scored; all scores are in cross_validation/. Time and steps as of --members."""
    fold_seed: int | None = None
    """Seed of the division into folds (default: --seed)."""
    fold: int | None = None
    """Train this fold of --folds alone, counted from 0, as on another machine with the same --output_dir."""
    parallel: bool = True
    """Use several devices; False uses one."""
    num_devices: int | None = None
    """Devices to use in each process (default: all)."""
    strategy: Strategy = "ddp"
    """ddp: parameters on every device; fsdp: parameters and optimizer state split over the devices."""
    tracker: UseAppendAction[Annotated[tuple[TrackerName, ...], arg(metavar="wandb|mlflow")]] = ()
    """Log there too; give it once for each."""
    coordinator_address: str | None = None
    """Several processes: host:port of the first (default: asked of SLURM or Open MPI); see docs/how-to/clusters.md."""
    num_processes: int | None = None
    """Several processes: how many there are in all."""
    process_id: int | None = None
    """Several processes: number of this one, from 0."""
    pin_memory: bool = True
    """Accepted for command lines of the published code; has no meaning in JAX."""

    given: Suppress[tuple[str, ...]] = ()
    """Names of the flags that were given, whatever their values."""

    @property
    def networks(self) -> int:
        """How many networks the command trains."""
        return 1 if self.fold is not None else self.folds or self.members


@dataclass(frozen=True)
class DuelConfig:
    """Train several networks under the same conditions, score them on the same cases, and say which differences stand.
    A duel that was stopped goes on with the same command line; more contestants and seeds may join it."""

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """A folder that preprocess wrote."""
    against: Annotated[tuple[str, ...], arg(metavar="NETWORK|FLAG=VALUE[,...]")]
    """The other contestants: networks as --model names them, or flags of train that change the first contestant, such
    as mixer=conv or mixer=none,experts=ffn."""
    model: Annotated[ModelName | None, arg(metavar="NAME")] = None
    """The first contestant (default: the network of the plan)."""
    output_dir: Path = Path("duel")
    """Folder for all runs, duel.json and report.html."""
    folds: int = 1
    """Folds of the cross-validation; 1: the first of five alone."""
    max_minutes: float | None = None
    """Minutes of each network, from its first step on; compiling before and the scores after come on top (default: the
    length of the plan)."""
    steps: int | None = None
    """Steps of each network, instead of minutes."""
    seeds: int = 1
    """Networks of each contestant and fold, with seeds from 0 on."""
    equal: Literal["images", "memory"] = "images"
    """What the batches have in common: the number of patches, or that each fills the memory as its own plan says."""
    at_once: int = 1
    """Trainings at the same time on each GPU, each with its share of the memory; they share minutes and speed too."""


@dataclass(frozen=True)
class InferConfig:
    """Segment scans with a trained model; each result lies on its scan's own grid."""

    data_path: Path
    """A scan (.nii.gz, .nii, .mha, .mhd, .nrrd), a folder of DICOM slices, or a folder of such scans, also in
    subfolders such as <patient>/<study>/<series>."""
    model_path: Path | tuple[Path, ...]
    """A run, a checkpoint folder (RUN/checkpoints/best), published weights (.pth, .npz, .safetensors), a model folder
    of nnU-Net v2, or what export wrote (.mh). Several, or a run of --folds or --members, are an ensemble: the mean of
    their softmax probabilities."""
    output_dir: Path = Path("inference")
    """Folder for the label maps, previews, volumes.csv and run.json."""
    split: Literal["auto", "all", "train", "val", "test"] = "auto"
    """Scans to segment: all but those that the checkpoint's own record says it was trained on; all; those that it was
    trained on, was validated on, or has no part in (where the record names a scan in none, as the dataset marks it).
    Of an ensemble, the networks that were not trained on a scan segment it."""
    tta: bool = False
    """Test-time augmentation: mean over mirrored windows, along the axes that training mirrored. Each axis doubles the
    work; an axis along which a structure has no counterpart is left out."""
    labels: tuple[str, ...] = ()
    """Names of the structures to keep; the others become background (default: all)."""
    keep_largest: tuple[str, ...] = ()
    """Structures of which only the largest connected part is kept, or: all; none (default: as a cross-validation at
    --model_path found it better, else none)."""
    output_format: Literal["nii.gz", "nii", "mha", "nrrd", "dcm"] = "nii.gz"
    """Format of the label maps; dcm is DICOM SEG, for folders of DICOM slices."""
    skip_existing: bool = False
    """Keep a result that is whole, and that the same weights made of the same scan."""

    _SCANS: ClassVar = "Reading scans"

    modality: Modality | None = None
    """How intensities are normalised (default: as in training)."""
    series: Series = ()
    spacing_scale: SpacingScale = None
    num_workers: int = 1
    """Threads that read scans ahead and write results."""

    _NETWORK: ClassVar = "Network and windows"

    roi_size: tuple[int, int, int] | None = None
    """Window in voxels, each axis a multiple of 16 (default: the training patch; 192 192 48 for published weights)."""
    overlap: float = 0.5
    """Overlap of the windows."""
    sw_batch_size: int = 4
    """Windows in one call of the network."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size in mm at which the network works (default: as it was trained)."""
    orientation: str | None = None
    """Orientation in which the network works (default: as it was trained)."""
    chain: Literal["trained", "published"] | None = None
    """Order of resampling and normalising, and blending of windows: as in training, or as in the published inference
    script (default: the latter for published weights)."""
    precision: Numbers = None
    gpu: bool = False
    """Fail without a GPU (default: use the best device)."""
    num_devices: int | None = None
    """Devices over which the windows of a scan are spread (default: all GPUs of this machine, or one CPU)."""

    _RESULTS: ClassVar = "Other results"

    previews: bool = True
    """Write previews/<case>.png."""
    save_probabilities: bool = False
    """Write <case>.npz: float16 probabilities of all classes, on the network's grid."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare label maps with references: Dice, HD95, ASSD, NSD and volumes of each case and structure."""

    predictions: Path
    """Folder with the label maps to judge (.nii.gz, .nii, .mha, .mhd, .nrrd)."""
    references: Path
    """Folder with the reference label maps of the same names, in any of these formats."""
    output_dir: Path
    """Folder for metrics.csv and summary.json."""
    compare: Path | None = None
    """--output_dir of an earlier evaluation of the same cases; comparison.json then has the differences and their
    significance."""
    labels: Path | None = None
    """dataset.json or run.json with the names of the structures (default: searched beside both folders)."""
    tolerance_mm: float = 1.0
    """Distance in mm up to which surfaces count as equal in NSD."""
    spacing_scale: SpacingScale = None
    surface: Surface = "voxels"
    """What HD95, ASSD and NSD count: voxels of the surface (as MONAI), or its area (as surface-distance)."""
    num_workers: Workers = None


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about an evaluation: scores, distributions, the worst cases in pictures."""

    evaluation: Path
    """--output_dir of `mambahome evaluate`."""
    output: Path | None = None
    """File to write (default: report.html in the folder of the evaluation)."""
    predictions: Path | None = None
    """Folder with the label maps that were scored, for pictures; its run.json says how they were made."""
    references: Path | None = None
    """Folder with the reference label maps, for pictures."""
    images: Path | None = None
    """Folder with the scans, to show under the outlines."""
    worst: int = 10
    """Cases to show in pictures, the worst by mean Dice first."""
    window: tuple[float, float] | None = None
    """Intensities shown as black and white (default: -160 240 for CT, else by each scan's percentiles)."""


@dataclass(frozen=True)
class ConvertConfig:
    """Turn weights from one form into another, by suffix: .pth, .npz, .safetensors, or none for a folder in the layout
    of a model hub."""

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """Weights to read."""
    destination: Positional[Annotated[Path, arg(metavar="DESTINATION")]]
    """File or folder to write; a folder holds model.safetensors, config.json and README.md, a model card."""
    overwrite: bool = False
    """Replace what is at DESTINATION."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as one file for deployment: programs for each platform, weights, and how scans are prepared.

    infer --model_path takes it without flax and without the networks' code.
    """

    model: Positional[Annotated[Path, arg(metavar="MODEL")]]
    """What infer takes as --model_path: a run, also one of several networks, a checkpoint folder, weights, or a model
    folder of nnU-Net v2."""
    destination: Positional[Annotated[Path, arg(metavar="FILE.mh")]]
    """File to write."""
    platforms: tuple[Platform, ...] = ("cpu", "cuda")
    """Platforms to write programs for; none of them has to be here."""
    roi_size: tuple[int, int, int] | None = None
    """Window in voxels, which is fixed then (default: as infer takes it of MODEL)."""
    precision: Annotated[
        Precision | None, arg(help="Matrix products and convolutions (default: bf16 for cuda, fp32 for others).")
    ] = None
    modality: Modality | None = None
    """How intensities are normalised (default: as in training)."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size in mm at which the network works (default: as it was trained)."""
    overwrite: bool = False
    """Replace FILE.mh."""


@dataclass(frozen=True)
class CleanConfig:
    """List what can go of finished runs and killed commands, or without FOLDER of compiled programs; nothing is removed
    unasked."""

    folder: Positional[Annotated[Path | None, arg(metavar="FOLDER")]] = None
    """A run, output of another command, or a folder of these (default: the compiled programs in the user's cache)."""
    yes: bool = False
    """Remove it, without a question."""
    older_than: float | None = None
    """Only what was written more than so many days ago."""


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
