"""Settings of `evaluate` and `report`: part of the configuration (config.py), in a file of its own."""

from dataclasses import dataclass
from pathlib import Path

from mambahome_jax.values import Surface


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare label maps with references: Dice, HD95, ASSD, NSD, volume difference a case and structure."""

    predictions: Path
    """Folder with the label maps to judge (.nii.gz, .nii, .mha, .mhd, .nrrd)."""
    references: Path
    """Folder with the reference label maps of the same names, in any of these formats."""
    output_dir: Path
    """Folder for metrics.csv and summary.json."""
    compare: Path | None = None
    """--output_dir of an earlier evaluation of the same cases: differences to it and their significance are written to
    comparison.json."""
    labels: Path | None = None
    """dataset.json or run.json with the names of the structures (default: looked for beside both folders)."""
    tolerance_mm: float = 1.0
    """Distance in mm up to which surfaces count as equal in NSD."""
    spacing_scale: float | None = None
    """What to multiply the lengths of every header by, such as 1000 where one says mm and means metres; 1 takes label
    maps of less than 5 mm or more than 5 m as they are."""
    surface: Surface = "voxels"
    """What HD95, ASSD and NSD count: voxels of the surface, as MONAI does, or its area, as surface-distance does."""
    num_workers: int | None = None
    """Processes that work side by side (default: one a core)."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about an evaluation: scores, distributions, the worst cases in pictures."""

    evaluation: Path
    """--output_dir of `mambahome evaluate`."""
    output: Path | None = None
    """File to write (default: report.html in the folder of the evaluation)."""
    predictions: Path | None = None
    """Folder with the label maps that were judged, for pictures; its run.json says how they were made."""
    references: Path | None = None
    """Folder with the reference label maps, for pictures."""
    images: Path | None = None
    """Folder with the scans, to lie under the outlines in the pictures."""
    worst: int = 10
    """Cases to show in pictures, the worst by mean Dice first."""
    window: tuple[float, float] | None = None
    """Intensities shown as black and white (default: -160 240 for CT, else by each scan's percentiles)."""
