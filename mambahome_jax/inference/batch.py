"""One scan of infer's: read ahead of its turn, and its result written."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.datasets.label_map import read_image
from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging import dicomseg
from mambahome_jax.imaging.formats import NIFTI_SUFFIXES, suffix_of
from mambahome_jax.imaging.geometry import coarse_remark, reorient, same_grid
from mambahome_jax.imaging.normalisation import normalisation_for
from mambahome_jax.imaging.pictures import write_preview
from mambahome_jax.imaging.volume import Volume, read_geometry, read_grid, read_labels, read_volume, write_volume
from mambahome_jax.inference.ensemble import metadata_of
from mambahome_jax.inference.faults import DICOM_SEG
from mambahome_jax.inference.postprocess import postprocess, volumes_ml
from mambahome_jax.inference.prepare import NetworkInput, SegmentSettings, network_grid, prepare
from mambahome_jax.inference.probabilities import whole_probabilities, write_probabilities
from mambahome_jax.inference.results import files_of, made_from
from mambahome_jax.inference.segment import case_remark, channels_of, class_names_of
from mambahome_jax.support.files import record_of
from mambahome_jax.support.paths import as_on_disk
from mambahome_jax.support.processes import available_memory

# What the scans that are read ahead may take together, in bytes of float32: 512 x 512 x 512 voxels anywhere, and a part
# of the memory where it is plentiful, up to four of 512 x 512 x 1000. A larger one is read when the last one is done.
HELD_BYTES = 512 << 20
MOST_HELD_BYTES, HELD_PART = 4 << 30, 32


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same for every scan.

    models: one, or several as an ensemble. names: value in results -> structure, all that the models know.
    only, largest: as `postprocess` takes them. devices: over which the windows of a scan are spread,
    None where there is one. weights: a digest of each model. again: scans whose results are made again, whatever lies
    there. sources: what the files of each scan that was read were then, see `record_of`.
    """

    config: InferConfig
    models: list[Any]
    settings: SegmentSettings
    names: Mapping[int, str]
    only: tuple[int, ...] | None
    largest: tuple[int, ...] | None
    devices: Sequence[jax.Device] | None
    weights: tuple[str, ...] = ()
    again: frozenset[str] = frozenset()
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def kept_names(self) -> dict[int, str]:
        """Names of the structures that results may hold."""
        return {value: name for value, name in self.names.items() if self.only is None or value in self.only}


def held_bytes() -> int:
    """What scans that are read ahead may take together on this machine as it is now, in bytes of float32."""
    return min(max(HELD_BYTES, (available_memory() or 0) // HELD_PART), MOST_HELD_BYTES)


class Reading:
    """A scan that is being read, and what it will take in memory.

    nbytes: as float32, of the scan alone; an estimate where its header does not tell.
    """

    def __init__(self, future: Future, nbytes: int) -> None:
        self._future: Future | None = future
        self.nbytes = nbytes

    def take(self) -> tuple[Volume, NetworkInput] | dict[str, Any]:
        """What `_read` gives, once: it is not kept here. Raises what reading raised."""
        future, self._future = self._future, None
        assert future is not None
        return future.result()

    def cancel(self) -> None:
        """Do not read it, if that has not begun."""
        if self._future is not None:
            self._future.cancel()


def read_ahead(plan: Plan, scans: Sequence[Scan], held: int) -> Iterator[tuple[Scan, Reading]]:
    """Each scan with its reading: at most `num_workers` beyond the one in use, and no more than `held` bytes of them.

    A scan that takes more by itself is read when the one before it is done with.
    """
    threads = max(plan.config.num_workers, 1)
    with ThreadPoolExecutor(threads) as readers:
        waiting: deque[tuple[Scan, Reading]] = deque()
        try:
            for scan in scans:
                nbytes = _nbytes(scan)
                while waiting and sum(reading.nbytes for _, reading in waiting) + nbytes > held:
                    yield waiting.popleft()
                waiting.append((scan, Reading(readers.submit(_read, plan, scan), nbytes)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, reading in waiting:
                reading.cancel()


def _nbytes(scan: Scan) -> int:
    files = scan.channels or (scan.path,)
    try:
        if suffix_of(scan.path.name, NIFTI_SUFFIXES) and scan.path.is_file():
            return 4 * len(files) * math.prod(read_geometry(scan.path, spacing_scale=1)[0])
        listed = [file for path in files for file in (path.iterdir() if path.is_dir() else [path])]
        # Compressed CT takes about two bytes a voxel or less.
        return 4 * sum(file.stat().st_size for file in listed)
    except (DatasetError, OSError):
        return 0


def _read(plan: Plan, scan: Scan) -> tuple[Volume, NetworkInput] | dict[str, Any]:
    """A scan and what the network gets of it; the entry of run.json where its result is whole and may stay."""
    kept = _whole_result(plan, scan) if plan.config.skip_existing and scan.case not in plan.again else None
    if kept is not None:
        return kept
    plan.sources[scan.case] = record_of(files_of(scan))
    if scan.channels:
        case = Case(scan.case, scan.path, images=scan.channels, spacing_scale=plan.config.spacing_scale)
        volume = read_image(case, channels_of(plan.models) or len(scan.channels), as_stored=True)
    else:
        scale = plan.config.spacing_scale
        volume = read_volume(scan.path, as_stored=True, series=scan.series, spacing_scale=scale)
    with DatasetError.with_file(scan.path):
        return volume, prepare(volume, _settings_of(scan, plan), channels_of(plan.models))


def _whole_result(plan: Plan, scan: Scan) -> dict[str, Any] | None:
    """The entry of run.json for a result that an earlier run wrote; None where it is missing, damaged, or of a scan on
    another grid."""
    path = existing_result(plan.config, scan)
    if not path.is_file() or (plan.config.save_probabilities and not whole_probabilities(_shares(plan.config, scan))):
        return None
    try:
        seg = plan.config.output_format == DICOM_SEG
        # Of a DICOM SEG this looks itself whether it is of these slices.
        scale = plan.config.spacing_scale
        if seg:
            labels = grid = dicomseg.read(path, scan.path, plan.kept_names, scan.series)
        else:
            labels = read_labels(path, spacing_scale=scale)
            grid = read_grid(scan.path, series=scan.series, spacing_scale=scale)
    except DatasetError:
        return None
    if not same_grid(grid, labels):
        return None
    return {
        "id": scan.case,
        "input": input_of(plan.config, scan),
        "output": path.name,
        "kept": True,
        "volume_ml": volumes_ml(labels, plan.names),
    }


def _settings_of(scan: Scan, plan: Plan) -> SegmentSettings:
    if scan.modality is None:
        return plan.settings
    data = metadata_of(plan.models) or DataProperties()
    return dataclasses.replace(plan.settings, normalisation=normalisation_for(scan.modality, data.ct_normalisation))


def write_case(
    plan: Plan, scan: Scan, volume: Volume, result: Volume, shares: list[tuple[np.ndarray, np.ndarray]], begun: float
) -> dict[str, Any]:
    """Write a label map, its preview and what there is of probabilities; returns the entry of run.json.

    shares: probabilities (D, H, W, classes) and their affine (4, 4), or nothing. A preview that fails is a remark.
    """
    config, settings, names = plan.config, plan.settings, plan.kept_names
    path = result_of(config, scan)
    result = postprocess(result, plan.only, plan.largest)
    for values, affine in shares:
        write_probabilities(_shares(config, scan), values, affine, class_names_of(plan.models))
    modality, structures_ml = scan.modality or settings.normalisation.modality, volumes_ml(result, names)
    remark = case_remark(plan.models, volume, modality, structures_ml)
    oriented = reorient(volume, settings.orientation)
    coarse = coarse_remark(oriented.shape, network_grid(oriented, settings)[1])
    remarks = [line for line in (remark, coarse) if line is not None]
    preview: Path | None = config.output_dir / "previews" / f"{scan.case}.png" if config.previews else None
    try:
        if preview is not None:
            write_preview(preview, volume, result, names, modality, scan.case)
    except OutputError as error:
        remarks.append(f"without preview: {error}")
        preview = None
    # Last: a case with a label map is done, and one that was killed before it is not kept as whole without the rest.
    if config.output_format == DICOM_SEG:
        dicomseg.write(path, result, scan.path, names, scan.series)
    else:
        note = write_volume(path, result, names=names, warn=False)
        remarks += [] if note is None else [f"{path.name}: {note} (--output_format nrrd)"]
    return {
        "id": scan.case,
        "input": input_of(config, scan),
        "modality": modality,
        "output": path.name,
        "preview": None if preview is None else str(preview.relative_to(config.output_dir)),
        "shape": list(result.shape),
        "seconds": round(time.perf_counter() - begun, 3),
        "volume_ml": structures_ml,
        "made_from": made_from(plan.weights, plan.sources.pop(scan.case, None), path),
    } | ({"remarks": remarks} if remarks else {})


def result_of(config: InferConfig, scan: Scan) -> Path:
    """Where the label map of a scan goes."""
    return config.output_dir / f"{scan.case}.{config.output_format}"


def existing_result(config: InferConfig, scan: Scan) -> Path:
    """Where the label map of a scan is: `result_of`, or under the other name that earlier versions gave it."""
    path = result_of(config, scan)
    other = path.with_name(f"{scan.other_name}.{config.output_format}")
    return other if scan.other_name and not path.exists() and other.exists() else as_on_disk(path)


def input_of(config: InferConfig, scan: Scan) -> str | list[str]:
    """The file of a scan, or those of its channels, as seen from --data_path, which run.json has as it was given."""
    home = config.data_path if config.data_path.is_dir() else config.data_path.parent
    names = [str(path.relative_to(home)) if path.is_relative_to(home) else path.name for path in scan.channels]
    whole = str(scan.path.relative_to(home)) if scan.path.is_relative_to(home) else scan.path.name
    return names if scan.channels else whole


def _shares(config: InferConfig, scan: Scan) -> Path:
    return config.output_dir / f"{scan.case}.npz"
