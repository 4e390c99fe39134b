"""Settings of `infer` and `convert`: part of the configuration (config.py), in a file of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from mambahome_jax.values import Modality, Precision


@dataclass(frozen=True)
class InferConfig:
    """Segment scans with a trained model; each result lies on its scan's own grid."""

    data_path: Path
    """A scan (.nii.gz, .nii, .mha, .mhd, .nrrd), a folder of DICOM slices, or a folder of such scans, also in folders
    of their own as <patient>/<study>/<series>."""
    model_path: Path | tuple[Path, ...]
    """A checkpoint folder (RUN/checkpoints/best), or published weights (.pth, .npz, .safetensors). Several are an
    ensemble: the mean of their softmax probabilities."""
    output_dir: Path = Path("inference")
    """Folder for the label maps, previews, volumes.csv and run.json."""
    roi_size: tuple[int, int, int] | None = None
    """Window in voxels, each axis a multiple of 16 (default: the training patch; 192 192 48 for published weights)."""
    sw_batch_size: int = 4
    """Windows in one call of the network."""
    overlap: float = 0.5
    """Overlap of the windows."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size in mm at which the network works (default: as it was trained)."""
    orientation: str | None = None
    """Orientation in which the network works (default: as it was trained)."""
    modality: Modality | None = None
    """How intensities are normalised (default: as in training)."""
    spacing_scale: float | None = None
    """What to multiply the lengths of every header by, such as 1000 where one says mm and means metres; 1 takes a scan
    of less than 5 mm or more than 5 m as it is."""
    chain: Literal["trained", "published"] | None = None
    """Order of resampling and normalising, blending of windows, and the way back: as train.py prepares scans, or as the
    published inference script has them (default: the latter for published weights)."""
    precision: Precision | None = None
    """Matrix products and convolutions (default: bf16 on a GPU, fp32 on a CPU)."""
    series: UseAppendAction[tuple[str, ...]] = ()
    """SeriesInstanceUID of the DICOM series to segment, given once for each (default: all that are found)."""
    output_format: Literal["nii.gz", "nii", "mha", "nrrd", "dcm"] = "nii.gz"
    """Format of the label maps, whatever that of the scans; dcm is DICOM SEG, for folders of DICOM slices."""
    num_workers: int = 1
    """Threads that read scans ahead and write results."""
    num_devices: int | None = None
    """Devices over which the windows of a scan are spread (default: all GPUs of this machine, or one CPU)."""
    tta: bool = False
    """Mean over each window and its mirrors along the axes that training mirrored (each doubles the work), left and
    right labels swapped; an axis along which a structure has no counterpart is left out."""
    labels: tuple[str, ...] = ()
    """Names of the structures to keep; the others become background (default: all)."""
    keep_largest: tuple[str, ...] = ()
    """Names of the structures of which only the largest connected part is kept, or: all."""
    save_probabilities: bool = False
    """Write <case>.npz beside the results: float16 probabilities of all classes, on the network's grid."""
    previews: bool = True
    """Write previews/<case>.png beside the results."""
    skip_existing: bool = False
    """Leave a case whose result is there, whole, and of the same weights and scan; read it for volumes.csv."""
    overwrite: bool = True
    """Segment a case again when its result is there; False keeps whatever has the result's name."""
    gpu: bool = False
    """Insist on a GPU; without this flag the best device present is used."""


@dataclass(frozen=True)
class ConvertConfig:
    """Turn weights from one form into another, by suffix: .pth, .npz, .safetensors, or none for a checkpoint folder."""

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """Weights to read."""
    destination: Positional[Annotated[Path, arg(metavar="DESTINATION")]]
    """File or folder to write."""
    overwrite: bool = False
    """Replace what is at DESTINATION."""
