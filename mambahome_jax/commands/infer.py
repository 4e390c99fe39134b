"""infer: scans in, label maps on the same grids out, with previews and a report of the run."""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mambahome_jax.commands.find_scans import Scan, find_scans
from mambahome_jax.commands.outputs import open_output
from mambahome_jax.commands.run_report import device, plain, versions
from mambahome_jax.config import InferConfig
from mambahome_jax.datasets.prepared import write_json
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from mambahome_jax.inference.preview import label_counts, write_preview
from mambahome_jax.inference.segment import (
    NetworkInput,
    SegmentSettings,
    channels_of,
    label,
    label_names_of,
    prepare,
    settings_for,
)
from mambahome_jax.inference.sliding_window import window_starts
from mambahome_jax.model.network import MULTIPLE
from mambahome_jax.model.weights import load_model

PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")
# What a damaged scan, a full disk or a device that is too small can raise; anything else is a fault of ours.
CASE_ERRORS = (MambaHomeError, OSError, MemoryError, jax.errors.JaxRuntimeError)


@dataclass
class Outcome:
    """What came of the scans: entries of run.json."""

    cases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some cases failed, 2 nothing was done."""
        return 0 if not self.failures else 1 if self.cases else 2


def run(config: InferConfig) -> int:
    """Segment config.data_path into config.output_dir; returns the exit code.

    Raises what makes the whole run pointless: DatasetError (no scans), ConfigError, CheckpointError, OutputError.
    """
    console = Console()
    started = time.perf_counter()
    if config.gpu and jax.default_backend() != "gpu":
        action = "Install the extra [cuda] and check nvidia-smi, or leave --gpu out."
        raise ConfigError(f"--gpu was given, but JAX sees only {jax.devices()[0].platform} devices. {action}")
    folder, scans, failures = find_scans(config.data_path)
    outcome = Outcome(failures=failures)
    if folder != config.data_path:
        _say(console, f"Using the {len(scans)} scans in {folder}")
    taken = {folder.parent} if folder.is_file() else {folder, config.data_path}
    if config.output_dir.resolve() in {path.resolve() for path in taken}:
        raise ConfigError(f"{config.output_dir}: --output_dir holds the scans themselves. Name another folder")
    open_output(config.output_dir, ["run.json"])
    model = load_model(config.model_path, precision=config.precision)
    # Bound to its device as in validation, so that the program which that compiled is found in the cache.
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    settings = settings_for(
        model,
        spacing=config.spacing,
        orientation=config.orientation,
        modality=config.modality,
        roi_size=config.roi_size,
        overlap=config.overlap,
        sw_batch_size=config.sw_batch_size,
        chain=config.chain,
    )
    _check(settings)
    names = label_names_of(model)
    collisions = len(outcome.failures)
    for failure in outcome.failures:
        _say(console, f"Failed {failure['id']}: {failure['reason']}")
    mixed = config.modality is None and any(scan.modality not in (None, settings.modality) for scan in scans)
    if mixed:
        _say(console, "Scans of several modalities: each is normalised by its own, as the dataset says")
    else:
        scans = [dataclasses.replace(scan, modality=None) for scan in scans]
    _work(config, model, settings, names, scans, outcome, console)
    report = {
        "command": "infer",
        "configuration": plain(dataclasses.asdict(config)),
        "settings": plain(dataclasses.asdict(settings)),
        "labels": {str(value): name for value, name in names.items()},
        "versions": versions(PACKAGES),
        "device": device(),
        "seconds": round(time.perf_counter() - started, 3),
        "cases": outcome.cases,
        "failures": outcome.failures,
    }
    where = f"above and in {config.output_dir / 'run.json'}"
    code = outcome.exit_code
    try:
        write_json(config.output_dir / "run.json", report)
    except OutputError as error:
        where, code = "above", max(code, 1)
        _say(console, f"There is no report of this run: {error}")
    _say(console, f"{len(outcome.cases)} of {len(scans) + collisions} scans segmented, in {config.output_dir}")
    if outcome.failures:
        _say(console, f"{len(outcome.failures)} failed; the reasons are {where}")
    return code


def _work(
    config: InferConfig,
    model: Any,
    settings: SegmentSettings,
    names: Mapping[int, str],
    scans: list[Scan],
    outcome: Outcome,
    console: Console,
) -> None:
    """Segment the scans one after the other, while threads read the next ones and write the last one's result."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    todo = [scan for scan in scans if config.overwrite or not _result(config, scan).exists()]
    for scan in scans:
        if scan not in todo:
            outcome.cases.append(
                {"id": scan.case, "input": str(scan.path), "output": _result(config, scan).name, "kept": True}
            )
    if len(todo) < len(scans):
        _say(console, f"{len(scans) - len(todo)} results are there already and kept")

    with Progress(*columns, console=console, disable=not todo) as progress, ThreadPoolExecutor(1) as writer:
        cases = progress.add_task("scans", total=len(todo))
        windows = progress.add_task("windows", total=None)
        written: deque[tuple[Scan, Future]] = deque()
        full = False

        def fail(scan: Scan, error: BaseException) -> None:
            reason = _reason(error)
            outcome.failures.append({"id": scan.case, "reason": reason})
            _say(console, f"Failed {scan.case}: {reason}")
            progress.advance(cases)

        def finish(scan: Scan, writing: Future) -> bool:
            """Whether the result could be written."""
            try:
                outcome.cases.append(writing.result())
            except CASE_ERRORS as error:
                fail(scan, error)
                return not isinstance(error, OutputError)
            for remark in outcome.cases[-1].get("remarks", ()):
                _say(console, f"Note: {scan.case}: {remark}")
            progress.advance(cases)
            return True

        for scan, reading in _read_ahead(config, settings, channels_of(model), todo):
            begun = time.perf_counter()
            if full:
                fail(scan, OutputError("not begun, as the output folder cannot be written"))
                continue
            try:
                volume, prepared = reading.result()
                result = label(
                    model, prepared, settings, lambda done, total: progress.update(windows, completed=done, total=total)
                )
            except CASE_ERRORS as error:
                fail(scan, error)
                continue
            written.append((scan, writer.submit(_write, config, scan, volume, result, names, settings, begun)))
            # One result may wait for the disk; more would pile up in memory.
            if len(written) > 1:
                full = not finish(*written.popleft())
        while written:
            finish(*written.popleft())


def _read_ahead(
    config: InferConfig, settings: SegmentSettings, channels: int | None, scans: list[Scan]
) -> Iterator[tuple[Scan, Future]]:
    """Each scan with what its reading gives, at most `num_workers` beyond the one in use."""
    threads = max(config.num_workers, 1)
    with ThreadPoolExecutor(threads) as readers:
        waiting: deque[tuple[Scan, Future]] = deque()
        try:
            for scan in scans:
                waiting.append((scan, readers.submit(_read, scan, settings, channels)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, reading in waiting:
                reading.cancel()


def _read(scan: Scan, settings: SegmentSettings, channels: int | None) -> tuple[Volume, NetworkInput]:
    volume = read_volume(scan.path)
    try:
        return volume, prepare(volume, _settings_of(scan, settings), channels)
    except DatasetError as error:
        raise DatasetError(error.found, file=scan.path, expected=error.expected, action=error.action) from error


def _settings_of(scan: Scan, settings: SegmentSettings) -> SegmentSettings:
    return settings if scan.modality is None else dataclasses.replace(settings, modality=scan.modality)


def _write(
    config: InferConfig,
    scan: Scan,
    volume: Volume,
    result: Volume,
    names: Mapping[int, str],
    settings: SegmentSettings,
    begun: float,
) -> dict[str, Any]:
    """Write a label map and its preview; returns the entry of run.json. A preview that fails is a remark."""
    path = _result(config, scan)
    write_volume(path, result, names=names)
    preview, remarks = config.output_dir / "previews" / f"{scan.case}.png", {}
    try:
        if config.previews:
            write_preview(preview, volume, result, names, scan.modality or settings.modality, scan.case)
    except OutputError as error:
        remarks = {"remarks": [f"without preview: {error}"]}
    counts = label_counts(result.array)
    voxel_ml = float(abs(np.linalg.det(result.affine[:3, :3]))) / 1000
    return {
        "id": scan.case,
        "input": str(scan.path),
        "modality": scan.modality or settings.modality,
        "output": path.name,
        "preview": str(preview.relative_to(config.output_dir)) if config.previews and not remarks else None,
        "shape": list(result.shape),
        "seconds": round(time.perf_counter() - begun, 3),
        "volume_ml": {
            names.get(value, f"label_{value}"): round(counts.get(value, 0) * voxel_ml, 4)
            for value in sorted({*names, *counts})
        },
    } | remarks


def _result(config: InferConfig, scan: Scan) -> Path:
    return config.output_dir / f"{scan.case}.nii.gz"


def _check(settings: SegmentSettings) -> None:
    """Settings that no scan could be segmented with. Raises ConfigError before the first is read."""
    wrong = [size for size in settings.roi_size if size > 0 and size % MULTIPLE]
    if wrong:
        near = [size if size <= 0 else max(round(size / MULTIPLE), 1) * MULTIPLE for size in settings.roi_size]
        roi = " ".join(str(size) for size in settings.roi_size)
        raise ConfigError(f"--roi_size {roi}; expected multiples of {MULTIPLE}, such as {' '.join(map(str, near))}")
    if all(size == MULTIPLE for size in settings.roi_size):
        raise ConfigError(
            f"--roi_size is {MULTIPLE} along every axis; expected {2 * MULTIPLE} or more along at least one"
        )
    window_starts((1, 1, 1), (1, 1, 1), settings.overlap)
    if settings.sw_batch_size < 1:
        raise ConfigError(f"--sw_batch_size {settings.sw_batch_size}; expected 1 or more")
    corner = Volume(np.zeros((1, 1, 1, 1), np.float32), np.eye(4))
    prepare(corner, settings)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs, or segment at a coarser --spacing"
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of device memory. Try a smaller --sw_batch_size or --roi_size"
    return str(error) if isinstance(error, MambaHomeError) else f"{type(error).__name__}: {error}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
