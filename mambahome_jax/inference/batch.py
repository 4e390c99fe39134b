"""infer without a console: find scans, read ahead, segment, write results, and report on the run."""

import importlib.util
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Unpack

import jax
import numpy as np
from rich.console import Console

from mambahome_jax.config import nearest_multiples, said_multiples, triple
from mambahome_jax.datasets.base import Case, Split
from mambahome_jax.datasets.files import listed
from mambahome_jax.datasets.find_scans import Scan, find_scans, join_channels
from mambahome_jax.datasets.label_map import read_image
from mambahome_jax.datasets.structures import structure_key
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging import dicomseg, itk
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.imaging.normalisation import CtScale, normalisation_for
from mambahome_jax.imaging.volume import Volume, read_volume
from mambahome_jax.inference.ensemble import Ensemble, bind, members_of
from mambahome_jax.inference.read_ahead import held_bytes, read_ahead
from mambahome_jax.inference.result_files import DICOM_SEG, REPORT, VOLUMES, Entry, ResultFiles, Segmented
from mambahome_jax.inference.segment import NetworkInput, Segmenter, SegmentOptions, label, to_network_grid
from mambahome_jax.inference.tiled import Progress, window_starts
from mambahome_jax.support.console import Say, Track, counted, say, scan_bars, silent, untracked
from mambahome_jax.support.devices import choose_devices, device_line, is_out_of_memory, versions
from mambahome_jax.support.files import csv_name, jsonable, write_csv, write_json
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import real_path
from mambahome_jax.support.processes import isolated_reads
from mambahome_jax.weights.exported import ExportedModel, ExportedNetwork
from mambahome_jax.weights.model_path import learned_largest, load_model, networks_at

if TYPE_CHECKING:
    from mambahome_jax.keywords import InferFlags

PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")
FORMATS = ("SimpleITK", "highdicom", "pydicom")  # where they are installed
# What a damaged scan, a full disk or a device that is too small can raise; anything else is a fault of ours.
CASE_ERRORS = (MambaHomeError, OSError, MemoryError, jax.errors.JaxRuntimeError)

T = TypeVar("T")


@dataclass(frozen=True)
class Inferred:
    """What came of a run. cases, failures, left_out: entries of run.json; report, volumes: its files, or None."""

    output_dir: Path
    cases: tuple[Entry, ...]
    failures: tuple[dict[str, str], ...]
    report: Path | None
    volumes: Path | None
    left_out: tuple[Entry, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some cases failed or a report is missing, 2 nothing was done."""
        if self.failures or not self.cases:
            return 1 if self.cases else 2
        return 0 if self.report and self.volumes else 1

    @property
    def results(self) -> dict[str, Path]:
        """Case -> its label map."""
        return {case["id"]: self.output_dir / case["output"] for case in self.cases}

    @property
    def volumes_ml(self) -> dict[str, list[float]]:
        """Structure -> its millilitres in each case that has any of it."""
        found: dict[str, list[float]] = {}
        for case in self.cases:
            for name, ml in case.get("volume_ml", {}).items():
                found.setdefault(name, []).extend([ml] if ml > 0 else [])
        return found


@shows_keywords(InferConfig)
def infer(*, progress: bool = False, **flags: "Unpack[InferFlags]") -> Inferred:
    """Segment scans as `mambahome infer` does, silently; keywords are its flags, such as data_path and model_path.

    Scans that fail are listed in the result; the others go on.

    Raises:
        ConfigError, DatasetError, CheckpointError, OutputError: nothing could be begun.
    """
    config = from_keywords(InferConfig, flags)
    console = Console(quiet=not progress)
    return Inference(config, partial(say, console), *scan_bars(console)).run()


@dataclass(frozen=True, eq=False)
class Inference:
    """A run of infer: its flags, and who is told of it.

    say: gets each line about what happens. track: passes the scans on as they end, see `support.console.tracked`.
    windows: called with (windows done, windows in all) of the scan at work.
    """

    config: InferConfig
    say: Say = silent
    track: Track = untracked
    windows: Progress | None = None

    @isolated_reads()
    def run(self) -> Inferred:
        """Find the scans, load the networks, segment and report.

        Raises ConfigError, DatasetError, CheckpointError, OutputError: nothing could be begun.
        """
        started, config = time.perf_counter(), self.config
        _require_possible(config)
        found = find_scans(config.data_path, config.series, leave=(config.output_dir,))
        scans, unfit = _only_writable(config.output_format, found.scans)
        if found.folder != config.data_path:
            self.say(f"Using the scans in {found.folder}")
        homes = {found.folder.parent} if found.folder.is_file() else {found.folder, config.data_path}
        if real_path(config.output_dir) in {real_path(path) for path in homes}:
            raise ConfigError(f"{config.output_dir}: --output_dir holds the scans themselves. Name another folder")
        with locked(config.output_dir, "infer"):
            self._note(found.notes)
            open_output(config.output_dir, [REPORT, VOLUMES])
            run, scans, incomplete = self._load(scans)
            failures = [*found.failures, *unfit, *incomplete]
            for failure in failures:
                self.say(f"Failed {failure['id']}: {failure['reason']}")
            scans = self._with_modalities(run.segmenter, scans)
            networks = run.segmenter.networks
            known = any(networks.records) or any(scan.split for scan in scans)
            if config.split not in ("auto", "all") and not known:
                reason = "neither the weights nor the dataset say which scans were trained on"
                raise ConfigError(f"--split {config.split}: {reason}. Leave it out")
            cases, left_out, failed = self._segment_all(run, scans)
            for line in provenance_lines(networks, cases, left_out, config.split):
                self.say(line)
            return self._report(run, cases, left_out, [*failures, *failed], time.perf_counter() - started)

    def _note(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.say(f"Note: {note}")

    def _load(self, scans: list[Scan]) -> "tuple[InferRun, list[Scan], list[dict[str, str]]]":
        """Load the networks; also gives the scans as these take them, and failures."""
        devices = choose_devices(num_devices=self.config.num_devices)
        paths, notes = networks_at(_model_paths(self.config))
        config, learned = _with_learned(self.config)
        segmenter, names = _load(config, paths)
        self._note((*notes, *learned, *segmenter.remarks, *segmenter.notes))
        scans, incomplete = join_channels(config.data_path, scans, segmenter.networks.channels or 1)
        results = ResultFiles.of(config, tuple(map(_digest, segmenter.networks.members)), scans)
        return InferRun(config, segmenter, results, devices if len(devices) > 1 else None, names), scans, incomplete

    def _with_modalities(self, segmenter: Segmenter, scans: list[Scan]) -> list[Scan]:
        """The scans with their modalities where these matter."""
        trained, by_plans = segmenter.settings.normalisation.modality, segmenter.settings.nnunet is not None
        if self.config.modality is None and not by_plans and any(s.modality not in (None, trained) for s in scans):
            self.say("Scans of several modalities: each is normalised by its own, as the dataset says")
            return scans
        return [replace(scan, modality=None) for scan in scans]

    def _segment_all(self, run: "InferRun", scans: list[Scan]) -> tuple[list[Entry], list[Entry], list[dict[str, str]]]:
        """Segment scans; returns entries of those that are done, of those left out, in their order, and of failures."""
        for line in run.results.lines_again():
            self.say(line)
        configuration = jsonable(vars(run.config))
        cases: list[Entry] = []
        left_out: list[Entry] = []
        failures: list[dict[str, str]] = []
        for scan, outcome in self.track(self._outcomes(run, scans), len(scans)):
            if isinstance(outcome, str):
                failures.append({"id": scan.case, "reason": outcome})
                self.say(f"Failed {scan.case}: {outcome}")
                continue
            if outcome.pop("left_out", False):
                left_out.append(outcome)
                continue
            cases.append(outcome)
            if not outcome.get("kept"):
                run.results.note_made(outcome, configuration)
                for remark in outcome.get("remarks", ()):
                    self.say(f"Note: {scan.case}: {remark}")
        kept = [case for case in cases if case.get("kept")]
        if kept:
            self.say(f"{len(kept)} results are there already and whole, and kept")
        for line in run.results.account_for(kept):
            self.say(line)
        order = {scan.case: number for number, scan in enumerate(scans)}
        cases, left_out = (sorted(entries, key=lambda entry: order[entry["id"]]) for entries in (cases, left_out))
        return cases, left_out, failures

    def _outcomes(self, run: "InferRun", scans: list[Scan]) -> Iterator[tuple[Scan, Entry | str]]:
        """Segment one scan after the other, while threads read the next ones and write the last one's result.

        Yields each scan's entry, or why it failed: no exception, whose traceback would keep the scan in memory.
        """
        written: deque[tuple[Scan, Future[Entry]]] = deque()
        held, full = held_bytes(), False

        def begin(scan: Scan, reading: "Future[ScanInput | Entry]") -> Entry | str | None:
            try:
                read = reading.result()
                if isinstance(read, dict):
                    return read
                done = run.segment(scan, read, self.windows)
            except CASE_ERRORS as error:
                return failure_reason(error)
            written.append((scan, writer.submit(run.results.save_result, done, run.segmenter)))
            return None

        def finish() -> tuple[Scan, Entry | str]:
            nonlocal full
            scan, writing = written.popleft()
            try:
                return scan, writing.result()
            except CASE_ERRORS as error:
                full = isinstance(error, OutputError)
                return scan, failure_reason(error)

        with ThreadPoolExecutor(1) as writer:
            for scan, nbytes, reading in read_ahead(run.read, scans, max(run.config.num_workers, 1), held):
                outcome = "not begun, as the output folder cannot be written" if full else begin(scan, reading)
                del reading  # and with it the scan, before the next one is read
                if outcome is not None:
                    yield scan, outcome
                # One result may wait for the disk where scans are read ahead too; more would pile up in memory.
                while len(written) > (1 if nbytes <= held else 0) and not full:
                    yield finish()
            while written:
                yield finish()

    def _report(
        self, run: "InferRun", cases: list[Entry], left_out: list[Entry], failures: list[dict[str, str]], seconds: float
    ) -> Inferred:
        """Write run.json and volumes.csv; one that cannot be written is said, and missing in what is returned."""
        stored, regions = run.segmenter.networks.data.values, run.segmenter.regions
        content = {
            "command": "infer",
            "configuration": vars(run.config),
            "settings": run.segmenter.settings.to_json(),
            "labels": {str(value): name for value, name in run.segmenter.names.items()},
            **({"values": {str(number): value for number, value in stored}} if stored else {}),
            **({"regions": {str(value): held for value, held in regions.items()}} if regions else {}),
            "versions": versions((*PACKAGES, *(name for name in FORMATS if importlib.util.find_spec(name)))),
            "device": device_line(),
            "seconds": round(seconds, 3),
            "cases": cases,
            **({"left_out": left_out} if left_out else {}),
            "failures": failures,
        }
        rows = [(csv_name(c["id"]), csv_name(name), ml) for c in cases for name, ml in c.get("volume_ml", {}).items()]

        def written(write: Callable[..., None], name: str, what: str, *content: Any) -> Path | None:
            path = run.config.output_dir / name
            try:
                write(path, *content)
            except OutputError as error:
                self.say(f"There is no {what}: {error}")
                return None
            return path

        report = written(write_json, REPORT, "report of this run", content)
        run.results.forget_notes()
        volumes = written(write_csv, VOLUMES, "table of volumes", ("case", "structure", "volume_ml"), rows)
        return Inferred(run.config.output_dir, tuple(cases), tuple(failures), report, volumes, tuple(left_out))


@dataclass(frozen=True, eq=False)
class InferRun:
    """What is the same for every scan. devices: over which the windows are spread, None where there is one. names: of
    the networks."""

    config: InferConfig
    segmenter: Segmenter
    results: ResultFiles
    devices: Sequence[jax.Device] | None = None
    names: Sequence[str] = ()

    def read(self, scan: Scan) -> "ScanInput | Entry":
        """Read a scan, bring it to the network's grid and find its part in the training; or give its entry of run.json,
        where its result is whole and stays, or --split leaves it out."""
        kept = self.results.kept(scan, self.segmenter)
        networks = self.segmenter.networks
        split: Split | None = None if kept is None else self.results.known_split(scan)
        volume, used = None, tuple(range(len(networks.members)))
        if kept is None or (any(networks.records) and split is None):
            if kept is None:
                self.results.note_source(scan)
            volume = self._volume(scan)
            if any(networks.records):
                split, used = networks.part_of(volume.array)
        found: Entry = {} if split is None else {"split": split}
        if len(used) < len(networks.members):
            found["networks"] = [self.names[number] for number in used]
        self.results.splits[scan.case] = found
        if not _takes(self.config.split, scan, split):
            name = self.results.existing(scan).name
            return {"id": scan.case, "input": self.results.source(scan), "output": name, "left_out": True} | found
        if kept is not None or volume is None:
            return (kept or {}) | found
        settings = self.segmenter.settings
        if scan.modality is not None:
            data = self.segmenter.networks.data
            settings = replace(settings, normalisation=normalisation_for(scan.modality, data.ct_normalisation))
        with DatasetError.with_file(scan.path):
            image = to_network_grid(volume, settings, self.segmenter.networks.channels)
        return ScanInput(volume, image, networks.only(used))

    def _volume(self, scan: Scan) -> Volume:
        channels, scale = self.segmenter.networks.channels, self.config.spacing_scale
        if scan.channels:
            case = Case(scan.case, scan.path, images=scan.channels, spacing_scale=scale)
            return read_image(case, channels or len(scan.channels), as_stored=True)
        return read_volume(scan.path, as_stored=True, series=scan.series, spacing_scale=scale)

    def segment(self, scan: Scan, read: "ScanInput", windows: Progress | None) -> Segmented:
        """Predict the labels of a scan, and probabilities where they are asked for."""
        begun, (volume, image, networks) = time.perf_counter(), read
        probabilities: list[np.ndarray] = []
        take = probabilities.append if self.config.save_probabilities else None
        remarks = [] if image.remark is None else [image.remark]
        labels = label(networks, image, windows, take, devices=self.devices, say=remarks.append)
        return Segmented(
            scan, volume, labels, tuple(remarks), (probabilities[0], image.affine) if take else None, begun
        )


class ScanInput(NamedTuple):
    """A scan as it was read, as the networks take it, and those that segment it."""

    volume: Volume
    image: NetworkInput
    networks: Ensemble


def _require_possible(config: InferConfig) -> None:
    """Refuse flags that nothing can come of, before scans or weights are looked for. Raises ConfigError."""
    ending = config.output_format
    if ending in ("mha", "nrrd") and not itk.installed():
        raise ConfigError(f"--output_format {ending} needs SimpleITK. Run: {itk.INSTALL}")
    if ending == DICOM_SEG and not dicomseg.installed():
        raise ConfigError(f"--output_format {ending} needs highdicom and SimpleITK. Run: {dicomseg.INSTALL}")
    require_scale(config.spacing_scale)
    if config.gpu and jax.default_backend() != "gpu":
        action = "Install the extra [cuda] and check nvidia-smi, or leave --gpu out."
        raise ConfigError(f"--gpu was given, but JAX sees only {jax.devices()[0].platform} devices. {action}")


def _takes(choice: str, scan: Scan, split: Split | None) -> bool:
    """Whether --split takes a scan; split: its part by the record of the networks."""
    if choice in ("auto", "all"):
        return choice == "all" or split != "train"
    return choice == (split if split in ("train", "val") else scan.split or split)


def provenance_lines(networks: Ensemble, cases: Sequence[Entry], left_out: Sequence[Entry], choice: str) -> list[str]:
    """Say how many scans were trained on, by their voxels, and what was done about them."""
    if not any(networks.records):
        lines = ["The weights do not say which scans they were trained on"]
    else:
        names = [entry["id"] for entry in (*cases, *left_out) if entry.get("split") == "train"]
        scans, seen = counted(len(cases) + len(left_out), "scan"), counted(len(names), "", "were")
        lines = [f"Of {scans}, {seen} trained on, by the checkpoint's record"]
        lines[0] += f": {listed(names)}" if names else ""
        partly = [entry["id"] for entry in cases if "networks" in entry]
        if partly:
            lines.append(
                f"Of the others, {counted(len(partly), '', 'were')} trained on by some of the {len(networks.members)} "
                f"networks; those that did not see a scan segmented it alone, as {REPORT} lists: {listed(partly)}"
            )
        if not all(record is not None and record.complete for record in networks.records):
            lines.append("The record does not name all scans that were trained on")
        if any(entry.get("split") == "train" for entry in cases):
            lines.append("Scores on scans that were trained on tell nothing of unseen ones")
    if left_out:
        end = "; --split all segments every scan"
        lines.append(f"{counted(len(left_out), 'scan', 'are')} left out by --split {choice}{end}")
    return lines


def _only_writable(ending: str, scans: list[Scan]) -> tuple[list[Scan], list[dict[str, str]]]:
    """Divide scans into those whose results can have this --output_format, and failures. Raises ConfigError: none."""
    if ending != DICOM_SEG:
        return scans, []
    usable = [scan for scan in scans if scan.path.is_dir() and not scan.channels]
    needs = f"--output_format {ending} is DICOM SEG, which refers to DICOM slices"
    if scans and not usable:
        raise ConfigError(f"{scans[0].path}: {needs}; this scan is of another format. Name another --output_format")
    others = [scan for scan in scans if scan not in usable]
    return usable, [{"id": scan.case, "reason": f"{scan.path}: {needs}; this scan has none"} for scan in others]


def _with_learned(config: InferConfig) -> tuple[InferConfig, list[str]]:
    """The flags with --keep_largest as a cross-validation learned it, where that is not given; and a line about it."""
    (path, *others), labels = _model_paths(config), {structure_key(name) for name in config.labels}
    names = () if config.keep_largest or others else learned_largest(path)
    names = tuple(name for name in names if not labels or structure_key(name) in labels)
    if not names:
        return config, []
    line = f"the largest part of {', '.join(names)} is kept, as it raised the Dice in the cross-validation"
    return replace(config, keep_largest=names), [f"{line}; --keep_largest none keeps all parts"]


def _model_paths(config: InferConfig) -> tuple[Path, ...]:
    return config.model_path if isinstance(config.model_path, tuple) else (config.model_path,)


def _load(config: InferConfig, paths: Sequence[Path]) -> tuple[Segmenter, list[str]]:
    """The networks with all that the flags choose, and the name of each. Raises CheckpointError, ConfigError."""
    models = [load_model(path, precision=config.precision) for path in paths]
    names = []
    for path, model in zip(paths, models, strict=True):
        members = members_of(model)
        names += [str(path)] if len(members) == 1 else [f"{path}: network {n}" for n in range(1, len(members) + 1)]
    networks = Ensemble.of(models, names, list(map(_home, paths)))
    for model in models:
        if not isinstance(model, ExportedModel):
            bind(model)
    options = SegmentOptions(**{field.name: getattr(config, field.name) for field in fields(SegmentOptions)})
    segmenter = Segmenter.of(networks, options)
    settings, multiples = segmenter.settings, networks.multiples
    roi, said = " ".join(map(str, settings.roi_size)), said_multiples(multiples)
    nearest = nearest_multiples(settings.roi_size, multiples)
    near = [n if n <= 0 else whole for n, whole in zip(settings.roi_size, nearest, strict=True)]
    if tuple(near) != tuple(settings.roi_size):
        raise ConfigError(f"--roi_size {roi}; expected multiples of {said}, such as {' '.join(map(str, near))}")
    if all(n > 0 for n in settings.roi_size):
        try:
            networks.check_window(triple(settings.roi_size))
        except ConfigError as error:
            raise ConfigError(f"--roi_size {roi}: {error}") from error
    if settings.spacing is not None and not all(0 <= step < np.inf for step in settings.spacing):
        spacing = " ".join(str(step) for step in settings.spacing)
        raise ConfigError(f"--spacing {spacing}; expected mm above 0, or 0 for an axis that keeps its own")
    window_starts((1, 1, 1), (1, 1, 1), settings.overlap)
    for name, least in (("sw_batch_size", 1), ("num_workers", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"--{name} {getattr(config, name)}; expected {least} or more")
    channels = len(settings.normalisation.mean) if isinstance(settings.normalisation, CtScale) else 1
    channels = channels if settings.nnunet is None else networks.channels or 1
    to_network_grid(Volume(np.zeros((1, 1, 1, channels), np.float32), np.eye(4)), settings)
    return segmenter, names


def _home(path: Path) -> Path:
    """The model that a network is a fold of; the path itself where it is none."""
    within = (path, *path.parents[:3])  # RUN/fold_0/checkpoints/best; folders farther up are the user's
    return next((above.parent for above in within if re.fullmatch(r"fold_(\d+|all)", above.name)), path)


def _digest(network: Any) -> str:
    """Which weights a result was made of: the same of a network and of what was exported of it."""
    if isinstance(network, ExportedNetwork):
        return network.digest
    from mambahome_jax.weights.weights import digest_of  # not for exported ones, as it imports flax

    return digest_of(network)


def failure_reason(error: BaseException) -> str:
    """Why a case failed, in one line with what to do."""
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs, or segment at a coarser --spacing"
    if is_out_of_memory(error):
        return "out of device memory, even for one window. Try a smaller --roi_size"
    text = str(error) if isinstance(error, MambaHomeError) else f"{type(error).__name__}: {error}"
    return re.sub(r"([:;,])?\s*\n\s*", lambda match: f"{match[1] or ';'} ", text.strip())
