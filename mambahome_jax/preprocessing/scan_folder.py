"""A folder of scans without labels, as a dataset that check can look at."""

from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets import Dataset
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import channels_of, listing
from mambahome_jax.datasets.find_scans import Scan, find_scans, join_channels
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_elements import identify
from mambahome_jax.imaging.dicom_series import files_below, files_in
from mambahome_jax.imaging.formats import suffix_of
from mambahome_jax.imaging.volume import read_geometry
from mambahome_jax.preprocessing.findings import SCANS
from mambahome_jax.support.paths import own_name

# Storage classes of images by their first number after this (DICOM PS3.6, annex A), and what they are.
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_MODALITIES: dict[str, Modality] = {"2": "ct", "3": "us", "4": "mr", "6": "us"}


def holds_scans_alone(path: Path) -> bool:
    """Whether a path that is no dataset may be a scan or a folder of scans: there is no label map and no dataset.json.

    Else what is wrong with the dataset is what a user wants to read.
    """
    if path.is_file():
        return bool(suffix_of(path.name))
    folders, files = listing(path)
    return (
        not any(name.lower().startswith(("label", "segmentation")) for name in folders) and "dataset.json" not in files
    )


def read_scans(path: Path) -> Dataset:
    """The scans that `infer` would find, each a case without a label; those that it would refuse are skipped.

    Files <case>_0000, <case>_0001, ... are the channels of a case where all are called so.
    The number of channels is that of the first scan that can be read. Raises DatasetError: no scan.
    """
    found = find_scans(path)
    files = channels_of([scan.case for scan in found.scans])
    scans, incomplete = join_channels(path, found.scans, max(map(len, files.values()), default=1))
    channels = _channels(scans)
    return Dataset(
        name=own_name(path),
        channels=("image",) if channels == 1 else tuple(f"channel {number}" for number in range(channels)),
        labels={},
        cases=tuple(
            Case(
                *(scan.case, scan.path, None, None, scan.modality or _dicom_modality(scan.path)),
                images=scan.channels,
                series=scan.series,
            )
            for scan in scans
        ),
        skipped=tuple((failure["id"], failure["reason"]) for failure in [*found.failures, *incomplete]),
        notes=found.notes,
        layout=SCANS,
    )


def _dicom_modality(path: Path) -> Modality | None:
    """What DICOM slices say that they are; None of other scans and other classes of images."""
    try:
        files = [path] if path.is_file() else files_in(path) or files_below(path)
        identity = identify(files[0]) if files else None
    except (DatasetError, OSError):
        # Reported when its turn comes.
        return None
    kind = identity.sop_class.removeprefix(_STORAGE).partition(".")[0] if identity is not None else ""
    return _MODALITIES.get(kind)


def _channels(scans: list[Scan]) -> int:
    for scan in scans:
        try:
            shape, _ = read_geometry(scan.path, spacing_scale=1, series=scan.series)
        except DatasetError:
            # Reported when its turn comes.
            continue
        return len(scan.channels) or (shape[3] if len(shape) == 4 else 1)
    return 1
