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

from mambahome_jax.commands.find_scans import Scan, find_scans, join_channels
from mambahome_jax.commands.infer_faults import changed_flags, check_settings, reason_of
from mambahome_jax.commands.infer_volumes import volumes_by_structure, volumes_table, write_volumes
from mambahome_jax.commands.outputs import open_output
from mambahome_jax.commands.run_report import device, plain, versions
from mambahome_jax.config import InferConfig
from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.label_map import read_image
from mambahome_jax.datasets.prepared import write_json
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.imaging import itk
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume
from mambahome_jax.inference.ensemble import check_members
from mambahome_jax.inference.postprocess import postprocess, volumes_ml
from mambahome_jax.inference.prepare import NetworkInput, SegmentSettings, prepare
from mambahome_jax.inference.preview import write_preview
from mambahome_jax.inference.probabilities import whole_probabilities, write_probabilities
from mambahome_jax.inference.segment import (
    channels_of,
    chosen_values,
    label,
    label_names_of,
    settings_for,
    with_mirrors,
)
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


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same for every scan.

    models: one, or several as an ensemble. names: label value -> structure, all that the models know.
    only, largest: as `postprocess` takes them.
    """

    config: InferConfig
    models: list[Any]
    settings: SegmentSettings
    names: Mapping[int, str]
    only: tuple[int, ...] | None
    largest: tuple[int, ...] | None

    @property
    def kept_names(self) -> dict[int, str]:
        """Names of the structures that results may hold."""
        return {value: name for value, name in self.names.items() if self.only is None or value in self.only}


def run(config: InferConfig) -> int:
    """Segment config.data_path into config.output_dir; returns the exit code.

    Raises what makes the whole run pointless: DatasetError (no scans), ConfigError, CheckpointError, OutputError.
    """
    console = Console()
    started = time.perf_counter()
    if config.output_format in ("mha", "nrrd") and not itk.installed():
        raise ConfigError(f"--output_format {config.output_format} needs SimpleITK. Run: {itk.INSTALL}")
    if config.gpu and jax.default_backend() != "gpu":
        action = "Install the extra [cuda] and check nvidia-smi, or leave --gpu out."
        raise ConfigError(f"--gpu was given, but JAX sees only {jax.devices()[0].platform} devices. {action}")
    folder, scans, failures = find_scans(config.data_path)
    if folder != config.data_path:
        _say(console, f"Using the scans in {folder}")
    taken = {folder.parent} if folder.is_file() else {folder, config.data_path}
    if config.output_dir.resolve() in {path.resolve() for path in taken}:
        raise ConfigError(f"{config.output_dir}: --output_dir holds the scans themselves. Name another folder")
    open_output(config.output_dir, ["run.json", "volumes.csv"])
    models = _load(config)
    settings = settings_for(
        models,
        spacing=config.spacing,
        orientation=config.orientation,
        modality=config.modality,
        roi_size=config.roi_size,
        overlap=config.overlap,
        sw_batch_size=config.sw_batch_size,
        chain=config.chain,
    )
    check_settings(settings)
    if config.tta:
        settings, remarks = with_mirrors(models, settings)
        for remark in remarks:
            _say(console, f"Note: {remark}")
    configuration = plain(dataclasses.asdict(config))
    changed = changed_flags(config.output_dir / "run.json", configuration) if config.skip_existing else []
    if changed:
        _say(console, f"Note: results that are kept were made by another {', '.join(changed)}")
    only, largest = chosen_values(models, config.labels, config.keep_largest)
    plan = Plan(config, models, settings, label_names_of(models), only, largest)
    scans, incomplete = join_channels(config.data_path, scans, channels_of(models) or 1)
    outcome = Outcome(failures=[*failures, *incomplete])
    unusable = len(outcome.failures)
    for failure in outcome.failures:
        _say(console, f"Failed {failure['id']}: {failure['reason']}")
    mixed = config.modality is None and any(scan.modality not in (None, settings.modality) for scan in scans)
    if mixed:
        _say(console, "Scans of several modalities: each is normalised by its own, as the dataset says")
    else:
        scans = [dataclasses.replace(scan, modality=None) for scan in scans]
    _work(plan, scans, outcome, console)
    order = {scan.case: number for number, scan in enumerate(scans)}
    outcome.cases.sort(key=lambda entry: order[entry["id"]])
    report = {
        "command": "infer",
        "configuration": configuration,
        "settings": plain(dataclasses.asdict(settings)),
        "labels": {str(value): name for value, name in plan.kept_names.items()},
        "versions": versions((*PACKAGES, "SimpleITK") if itk.installed() else PACKAGES),
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
    try:
        write_volumes(config.output_dir / "volumes.csv", outcome.cases)
    except OutputError as error:
        code = max(code, 1)
        _say(console, f"There is no table of volumes: {error}")
    if volumes_by_structure(outcome.cases):
        console.print(volumes_table(outcome.cases))
    _say(console, f"{len(outcome.cases)} of {len(scans) + unusable} scans segmented, in {config.output_dir}")
    if outcome.failures:
        _say(console, f"{len(outcome.failures)} failed; the reasons are {where}")
    return code


def _load(config: InferConfig) -> list[Any]:
    """The networks of --model_path. Raises CheckpointError, and ConfigError where they are no ensemble."""
    paths = config.model_path if isinstance(config.model_path, tuple) else (config.model_path,)
    models = [load_model(path, precision=config.precision) for path in paths]
    check_members(models, [str(path) for path in paths])
    for model in models:
        # Bound to its device as in validation, so that the program which that compiled is found in the cache.
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    return models


def _work(plan: Plan, scans: list[Scan], outcome: Outcome, console: Console) -> None:
    """Segment the scans one after the other, while threads read the next ones and write the last one's result."""
    config = plan.config
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
                {"id": scan.case, "input": _input(scan), "output": _result(config, scan).name, "kept": True}
            )
    if len(todo) < len(scans):
        _say(console, f"{len(scans) - len(todo)} results are there already and kept")

    with Progress(*columns, console=console, disable=not todo) as progress, ThreadPoolExecutor(1) as writer:
        cases = progress.add_task("scans", total=len(todo))
        windows = progress.add_task("windows", total=None)
        written: deque[tuple[Scan, Future]] = deque()
        full = False

        def fail(scan: Scan, error: BaseException) -> None:
            reason = reason_of(error)
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

        for scan, reading in _read_ahead(plan, todo):
            begun = time.perf_counter()
            if full:
                fail(scan, OutputError("not begun, as the output folder cannot be written"))
                continue
            try:
                read = reading.result()
                if isinstance(read, dict):
                    outcome.cases.append(read)
                    progress.advance(cases)
                    continue
                volume, prepared = read
                found: list[np.ndarray] = []
                result = label(
                    plan.models,
                    prepared,
                    plan.settings,
                    lambda done, total: progress.update(windows, completed=done, total=total),
                    found.append if config.save_probabilities else None,
                )
            except CASE_ERRORS as error:
                fail(scan, error)
                continue
            shares = [(values, prepared.affine) for values in found]
            written.append((scan, writer.submit(_write, plan, scan, volume, result, shares, begun)))
            # One result may wait for the disk; more would pile up in memory.
            if len(written) > 1:
                full = not finish(*written.popleft())
        while written:
            finish(*written.popleft())
    kept = sum("volume_ml" in case for case in outcome.cases if case.get("kept"))
    if kept:
        _say(console, f"{kept} results are there already and whole, and kept")


def _read_ahead(plan: Plan, scans: list[Scan]) -> Iterator[tuple[Scan, Future]]:
    """Each scan with what its reading gives, at most `num_workers` beyond the one in use."""
    threads = max(plan.config.num_workers, 1)
    with ThreadPoolExecutor(threads) as readers:
        waiting: deque[tuple[Scan, Future]] = deque()
        try:
            for scan in scans:
                waiting.append((scan, readers.submit(_read, plan, scan)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, reading in waiting:
                reading.cancel()


def _read(plan: Plan, scan: Scan) -> tuple[Volume, NetworkInput] | dict[str, Any]:
    """A scan and what the network gets of it; the entry of run.json where its result is whole and may stay."""
    kept = _whole_result(plan, scan) if plan.config.skip_existing else None
    if kept is not None:
        return kept
    if scan.channels:
        volume = read_image(
            Case(scan.case, scan.path, images=scan.channels), channels_of(plan.models) or len(scan.channels)
        )
    else:
        volume = read_volume(scan.path)
    try:
        return volume, prepare(volume, _settings_of(scan, plan.settings), channels_of(plan.models))
    except DatasetError as error:
        raise DatasetError(error.found, file=scan.path, expected=error.expected, action=error.action) from error


def _whole_result(plan: Plan, scan: Scan) -> dict[str, Any] | None:
    """The entry of run.json for a result that an earlier run wrote; None where it is missing or damaged."""
    path = _result(plan.config, scan)
    if not path.is_file() or (plan.config.save_probabilities and not whole_probabilities(_shares(plan.config, scan))):
        return None
    try:
        volume_ml = volumes_ml(read_labels(path), plan.names)
    except DatasetError:
        return None
    return {"id": scan.case, "input": str(scan.path), "output": path.name, "kept": True, "volume_ml": volume_ml}


def _settings_of(scan: Scan, settings: SegmentSettings) -> SegmentSettings:
    return settings if scan.modality is None else dataclasses.replace(settings, modality=scan.modality)


def _write(
    plan: Plan, scan: Scan, volume: Volume, result: Volume, shares: list[tuple[np.ndarray, np.ndarray]], begun: float
) -> dict[str, Any]:
    """Write a label map, its preview and what there is of probabilities; returns the entry of run.json.

    shares: probabilities (D, H, W, classes) and their affine (4, 4), or nothing. A preview that fails is a remark.
    """
    config, settings, names = plan.config, plan.settings, plan.kept_names
    path = _result(config, scan)
    result = postprocess(result, plan.only, plan.largest)
    for values, affine in shares:
        write_probabilities(_shares(config, scan), values, affine, plan.names)
    write_volume(path, result, names=names)
    preview, remarks = config.output_dir / "previews" / f"{scan.case}.png", {}
    try:
        if config.previews:
            write_preview(preview, volume, result, names, scan.modality or settings.modality, scan.case)
    except OutputError as error:
        remarks = {"remarks": [f"without preview: {error}"]}
    return {
        "id": scan.case,
        "input": _input(scan),
        "modality": scan.modality or settings.modality,
        "output": path.name,
        "preview": str(preview.relative_to(config.output_dir)) if config.previews and not remarks else None,
        "shape": list(result.shape),
        "seconds": round(time.perf_counter() - begun, 3),
        "volume_ml": volumes_ml(result, names),
    } | remarks


def _result(config: InferConfig, scan: Scan) -> Path:
    return config.output_dir / f"{scan.case}.{config.output_format}"


def _input(scan: Scan) -> str | list[str]:
    return [str(path) for path in scan.channels] if scan.channels else str(scan.path)


def _shares(config: InferConfig, scan: Scan) -> Path:
    return config.output_dir / f"{scan.case}.npz"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
