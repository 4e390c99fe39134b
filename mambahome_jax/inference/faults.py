"""What infer refuses before the first scan, and what it says of a case that failed."""

import re

import numpy as np

from mambahome_jax.config import Triple, said_multiples
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.errors import ConfigError, MambaHomeError
from mambahome_jax.imaging import dicomseg, itk
from mambahome_jax.imaging.normalisation import CtScale
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.prepare import SegmentSettings, prepare
from mambahome_jax.inference.sliding_window import window_starts

DICOM_SEG = "dcm"  # --output_format


def check_format(ending: str) -> None:
    """Raises ConfigError where what writes results of this --output_format is not installed."""
    if ending in ("mha", "nrrd") and not itk.installed():
        raise ConfigError(f"--output_format {ending} needs SimpleITK. Run: {itk.INSTALL}")
    if ending == DICOM_SEG and not dicomseg.installed():
        raise ConfigError(f"--output_format {ending} needs highdicom and SimpleITK. Run: {dicomseg.INSTALL}")


def only_writable(ending: str, scans: list[Scan]) -> tuple[list[Scan], list[dict[str, str]]]:
    """Scans whose results can have this --output_format, and failures: those that are no DICOM slices, for a DICOM SEG.

    Raises ConfigError: none of them can.
    """
    if ending != DICOM_SEG:
        return scans, []
    usable = [scan for scan in scans if scan.path.is_dir() and not scan.channels]
    needs = f"--output_format {ending} is DICOM SEG, which refers to DICOM slices"
    if scans and not usable:
        raise ConfigError(f"{scans[0].path}: {needs}; this scan is of another format. Name another --output_format")
    others = [scan for scan in scans if scan not in usable]
    return usable, [{"id": scan.case, "reason": f"{scan.path}: {needs}; this scan has none"} for scan in others]


def check_settings(settings: SegmentSettings, multiples: Triple) -> None:
    """Settings that no scan could be segmented with, by a network whose windows are such multiples. Raises ConfigError
    before the first is read."""
    roi, said = " ".join(map(str, settings.roi_size)), said_multiples(multiples)
    near = [n if n <= 0 else max(round(n / m), 1) * m for n, m in zip(settings.roi_size, multiples, strict=True)]
    if tuple(near) != tuple(settings.roi_size):
        raise ConfigError(f"--roi_size {roi}; expected multiples of {said}, such as {' '.join(map(str, near))}")
    if tuple(settings.roi_size) == multiples:
        raise ConfigError(
            f"--roi_size {roi} is {said} along every axis; expected twice that or more along at least one"
        )
    if settings.spacing is not None and not all(0 <= step < np.inf for step in settings.spacing):
        spacing = " ".join(str(step) for step in settings.spacing)
        raise ConfigError(f"--spacing {spacing}; expected mm above 0, or 0 for an axis that keeps its own")
    window_starts((1, 1, 1), (1, 1, 1), settings.overlap)
    if settings.sw_batch_size < 1:
        raise ConfigError(f"--sw_batch_size {settings.sw_batch_size}; expected 1 or more")
    channels = len(settings.normalisation.mean) if isinstance(settings.normalisation, CtScale) else 1
    corner = Volume(np.zeros((1, 1, 1, channels), np.float32), np.eye(4))
    prepare(corner, settings)


def reason_of(error: BaseException) -> str:
    """Why a case failed, in one line with what to do."""
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs, or segment at a coarser --spacing"
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of device memory. Try a smaller --sw_batch_size or --roi_size"
    text = str(error) if isinstance(error, MambaHomeError) else f"{type(error).__name__}: {error}"
    return re.sub(r"([:;,])?\s*\n\s*", lambda found: f"{found[1] or ';'} ", text.strip())
