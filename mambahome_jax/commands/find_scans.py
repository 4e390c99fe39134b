"""Which files `infer` is to segment, and what the dataset around them says of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Case, nifti_stem
from mambahome_jax.datasets.files import SUFFIXES
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError

# Folders that hold the scans when the folder itself holds none: of the Decathlon, of preprocess.py.
SCAN_FOLDERS = ("imagesTs", "images")
DATASET_FOLDERS = (*SCAN_FOLDERS, "imagesTr", "imagesVa")


@dataclass(frozen=True)
class Scan:
    """A file to segment and the name of its result. modality: None where it is that of the model."""

    case: str
    path: Path
    modality: Modality | None = None


def find_scans(data_path: Path) -> tuple[Path, list[Scan], list[dict[str, str]]]:
    """The file or folder with the scans, the scans by name, and failures: those whose results would collide.

    A folder without scans in it or in one of SCAN_FOLDERS is read as a dataset, so that scans in a folder a case are
    found too.
    Raises DatasetError: nothing there, or no visible .nii or .nii.gz.
    """
    if data_path.is_file():
        if not data_path.name.endswith(SUFFIXES):
            raise DatasetError("not a NIfTI file by its name", file=data_path, expected=".nii or .nii.gz")
        return data_path, [Scan(nifti_stem(data_path), data_path)], []
    if not data_path.is_dir():
        raise DatasetError("no such file or folder", file=data_path, action="Check --data_path.")
    for folder in (data_path, *(data_path / name for name in SCAN_FOLDERS)):
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.endswith(SUFFIXES) and path.name[0] not in "._" and path.is_file():
                files.setdefault(nifti_stem(path), []).append(path)
        if files:
            modalities = _modalities(folder)
            scans = [Scan(case, paths[0], modalities.get(paths[0])) for case, paths in files.items() if len(paths) == 1]
            failures = []
            for case, paths in files.items():
                if len(paths) > 1:
                    both = " and ".join(path.name for path in paths)
                    reason = f"{both} would both be written to {case}.nii.gz. Rename one of them"
                    failures.append({"id": case, "reason": reason})
            return folder, scans, failures
    cases = [case for case in _cases(data_path) if not case.images]
    if cases:
        own = _by_path(cases)
        return data_path, [Scan(case.id, case.image, own.get(case.image)) for case in cases], []
    expected = f"scans there, or in its {' or '.join(SCAN_FOLDERS)}"
    raise DatasetError("no .nii or .nii.gz file", file=data_path, expected=expected, action="Check --data_path.")


def _modalities(folder: Path) -> Mapping[Path, Modality]:
    """Modality of each scan in a folder of a dataset whose scans are of several."""
    return _by_path(_cases(folder.parent)) if folder.name in DATASET_FOLDERS else {}


def _by_path(cases: list[Case]) -> dict[Path, Modality]:
    """Modality by file; empty where all are of one, which the model knows better: it may be trained on another."""
    found = {case.image: case.modality for case in cases if case.modality is not None}
    return found if len(set(found.values())) > 1 else {}


def _cases(folder: Path) -> list[Case]:
    try:
        return list(load_dataset(folder).cases)
    except DatasetError:
        # Scans to segment need not lie in a dataset.
        return []
