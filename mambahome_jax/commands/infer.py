"""infer: scans in, label maps on the same grids out, with previews and a report of the run."""

import dataclasses
import importlib.util
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from mambahome_jax.datasets.find_scans import Scan, find_scans, join_channels
from mambahome_jax.errors import ConfigError, MambaHomeError, OutputError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.inference.batch import (
    Plan,
    Reading,
    existing_result,
    held_bytes,
    read_ahead,
    write_case,
)
from mambahome_jax.inference.ensemble import check_members
from mambahome_jax.inference.faults import (
    check_format,
    check_settings,
    only_writable,
    reason_of,
)
from mambahome_jax.inference.results import Earlier, forget_notes, note_result, origin_of, read_earlier
from mambahome_jax.inference.segment import (
    channels_of,
    chosen_values,
    label,
    label_names_of,
    multiples_of,
    settings_for,
    stored_values_of,
    with_mirrors,
)
from mambahome_jax.inference.volumes import volumes_by_structure, volumes_table, write_volumes
from mambahome_jax.support.console import command_line, progress_bar, say
from mambahome_jax.support.devices import choose_devices, device_line, versions
from mambahome_jax.support.files import jsonable, write_json
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import real_path
from mambahome_jax.weights.digest import digest_of
from mambahome_jax.weights.weights import load_model

PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")
FORMATS = ("SimpleITK", "highdicom", "pydicom")  # where they are installed
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
    check_format(config.output_format)
    require_scale(config.spacing_scale)
    if config.gpu and jax.default_backend() != "gpu":
        action = "Install the extra [cuda] and check nvidia-smi, or leave --gpu out."
        raise ConfigError(f"--gpu was given, but JAX sees only {jax.devices()[0].platform} devices. {action}")
    found = find_scans(config.data_path, config.series, leave=(config.output_dir,))
    folder = found.folder
    scans, unfit = only_writable(config.output_format, found.scans)
    if folder != config.data_path:
        say(console, f"Using the scans in {folder}")
    taken = {folder.parent} if folder.is_file() else {folder, config.data_path}
    if real_path(config.output_dir) in {real_path(path) for path in taken}:
        raise ConfigError(f"{config.output_dir}: --output_dir holds the scans themselves. Name another folder")
    with locked(config.output_dir, "infer"):
        for note in found.notes:
            say(console, f"Note: {note}")
        return _segment_all(config, scans, [*found.failures, *unfit], started, console)


def _segment_all(
    config: InferConfig, scans: list[Scan], failures: list[dict[str, str]], started: float, console: Console
) -> int:
    open_output(config.output_dir, ["run.json", "volumes.csv"])
    devices = choose_devices(num_devices=config.num_devices)
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
    check_settings(settings, multiples_of(models))
    if config.num_workers < 0:
        raise ConfigError(f"--num_workers {config.num_workers}; expected 0 or more")
    if config.tta:
        settings, remarks = with_mirrors(models, settings)
        for remark in remarks:
            say(console, f"Note: {remark}")
    configuration = jsonable(dataclasses.asdict(config))
    only, largest = chosen_values(models, config.labels, config.keep_largest)
    weights = tuple(digest_of(model) for model in models)
    scans, incomplete = join_channels(config.data_path, scans, channels_of(models) or 1)
    earlier = _earlier_results(config, scans, weights)
    again = [case for case, origin in earlier.origins.items() if origin in ("weights", "scan")]
    plan = Plan(
        *(config, models, settings, label_names_of(models), only, largest, devices if len(devices) > 1 else None),
        weights=weights,
        again=frozenset(again),
    )
    outcome = Outcome(failures=[*failures, *incomplete])
    unusable = len(outcome.failures)
    for failure in outcome.failures:
        say(console, f"Failed {failure['id']}: {failure['reason']}")
    mixed = config.modality is None and any(
        scan.modality not in (None, settings.normalisation.modality) for scan in scans
    )
    if mixed:
        say(console, "Scans of several modalities: each is normalised by its own, as the dataset says")
    else:
        scans = [dataclasses.replace(scan, modality=None) for scan in scans]
    for line in earlier.say_again(again):
        say(console, line)
    _work(plan, scans, outcome, console)
    for line in earlier.account_for([case for case in outcome.cases if case.get("kept")], configuration):
        say(console, line)
    stored = stored_values_of(models)
    order = {scan.case: number for number, scan in enumerate(scans)}
    outcome.cases.sort(key=lambda entry: order[entry["id"]])
    report = {
        "command": "infer",
        "configuration": configuration,
        "settings": jsonable(settings.to_json()),
        "labels": {str(value): name for value, name in plan.kept_names.items()},
        **({"values": {str(number): value for number, value in stored.items()}} if stored else {}),
        "versions": versions((*PACKAGES, *(name for name in FORMATS if importlib.util.find_spec(name)))),
        "device": device_line(),
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
        say(console, f"There is no report of this run: {error}")
    forget_notes(config.output_dir)
    try:
        write_volumes(config.output_dir / "volumes.csv", outcome.cases)
    except OutputError as error:
        code = max(code, 1)
        say(console, f"There is no table of volumes: {error}")
    if volumes_by_structure(outcome.cases):
        console.print(volumes_table(outcome.cases))
    say(console, f"{len(outcome.cases)} of {len(scans) + unusable} scans segmented, in {config.output_dir}")
    if outcome.failures:
        say(console, f"{len(outcome.failures)} failed; the reasons are {where}")
    if outcome.cases:
        words = ("--predictions", config.output_dir, "--references", "LABELS", "--output_dir", "EVAL")
        say(console, f"Next, where there are label maps to compare with: {command_line('evaluate', *words)}")
    return code


def _earlier_results(config: InferConfig, scans: list[Scan], weights: tuple[str, ...]) -> Earlier:
    """What the output folder says of its results, with the origin of those that the flags would keep."""
    earlier = read_earlier(config.output_dir)
    if config.skip_existing:
        for scan in scans:
            result = existing_result(config, scan)
            if result.exists():
                entry = earlier.cases.get(scan.case, earlier.cases.get(scan.other_name))
                earlier.origins[scan.case] = origin_of(entry, weights, scan, result)
    return earlier


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
    configuration = jsonable(dataclasses.asdict(config))
    with progress_bar(console, disable=not scans) as progress, ThreadPoolExecutor(1) as writer:
        cases = progress.add_task("scans", total=len(scans))
        windows = progress.add_task("windows", total=None)
        written: deque[tuple[Scan, Future]] = deque()
        full = False

        def fail(scan: Scan, error: BaseException) -> None:
            reason = reason_of(error)
            outcome.failures.append({"id": scan.case, "reason": reason})
            say(console, f"Failed {scan.case}: {reason}")
            progress.advance(cases)

        def finish(scan: Scan, writing: Future) -> bool:
            """Whether the result could be written."""
            try:
                outcome.cases.append(writing.result())
                note_result(config.output_dir, outcome.cases[-1], configuration)
            except CASE_ERRORS as error:
                fail(scan, error)
                return not isinstance(error, OutputError)
            for remark in outcome.cases[-1].get("remarks", ()):
                say(console, f"Note: {scan.case}: {remark}")
            progress.advance(cases)
            return True

        def begin(scan: Scan, reading: Reading) -> None:
            """Segment a scan and have its result written; what it took is let go before the next one is read."""
            begun = time.perf_counter()
            read = reading.take()
            if isinstance(read, dict):
                outcome.cases.append(read)
                progress.advance(cases)
                return
            volume, prepared = read
            found: list[np.ndarray] = []
            result = label(
                plan.models,
                prepared,
                plan.settings,
                lambda done, total: progress.update(windows, completed=done, total=total),
                found.append if config.save_probabilities else None,
                devices=plan.devices,
            )
            shares = [(values, prepared.affine) for values in found]
            written.append((scan, writer.submit(write_case, plan, scan, volume, result, shares, begun)))

        held = held_bytes()
        for scan, reading in read_ahead(plan, scans, held):
            if full:
                fail(scan, OutputError("not begun, as the output folder cannot be written"))
                continue
            try:
                begin(scan, reading)
            except CASE_ERRORS as error:
                fail(scan, error)
            # One result may wait for the disk where scans are read ahead too; more would pile up in memory.
            while len(written) > (1 if reading.nbytes <= held else 0) and not full:
                full = not finish(*written.popleft())
        while written:
            finish(*written.popleft())
    kept = sum("volume_ml" in case for case in outcome.cases if case.get("kept"))
    if kept:
        say(console, f"{kept} results are there already and whole, and kept")
