"""Training runs in their folders: one network, or several one after the other (folds.py), with lock and run.json."""

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
from rich.console import Console

from mambahome_jax.datasets import prepared as prepared_layout
from mambahome_jax.datasets.prepared import Prepared, read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.splits import in_fold, with_split_file
from mambahome_jax.datasets.structures import consecutive
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError, TrainingError
from mambahome_jax.flags import PreprocessConfig, TrainConfig
from mambahome_jax.preprocessing.dataset import prepare_dataset
from mambahome_jax.preprocessing.plan import Setting, follow_plan, is_given, plan_lines
from mambahome_jax.preprocessing.plan_folder import planned_settings
from mambahome_jax.recipes import given_ingredients
from mambahome_jax.support.console import logged, say, tracked
from mambahome_jax.support.devices import begin_devices, choose_devices
from mambahome_jax.support.files import jsonable
from mambahome_jax.support.keywords import from_keywords, shows_keywords, typed_value
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import local_path, require_letters
from mambahome_jax.training.callbacks import Callback, make_trackers
from mambahome_jax.training.checkpoints import checkpoint_settings, holds_run, require_same_run
from mambahome_jax.training.distributed import gather, is_first, require_same
from mambahome_jax.training.folds import (
    Network,
    cross_validate,
    divide_cases,
    fold_lines,
    missing_folds,
    networks_of,
    show_scores,
)
from mambahome_jax.training.held_out import forget_scores
from mambahome_jax.training.memory import (
    SIZES,
    DeviceMemoryError,
    device_memory_errors,
    memory_entry,
    recorded_sizes,
    sizes_text,
    smaller_sizes,
)
from mambahome_jax.training.pretrained import Transfer
from mambahome_jax.training.progress import end_lines, ensemble_line, start_lines, train_line
from mambahome_jax.training.run_report import (
    earlier_report,
    held_out_entry,
    is_finished,
    new_report,
    save_report,
    scores_entry,
)
from mambahome_jax.training.schedule import Clock, Schedule, report_seconds
from mambahome_jax.training.setup import Setup, make_setup, recorded_mirrors
from mambahome_jax.training.train import Programs, TrainingRun, train_network
from mambahome_jax.weights.checkpoint import read_checkpoint_config
from mambahome_jax.weights.model_path import CROSS_VALIDATION, FOLD, networks_of_run

if TYPE_CHECKING:
    from mambahome_jax.keywords import TrainFlags

SIGNALLED = 128


@dataclass(frozen=True)
class TrainResult:
    """A training that ended: "finished", "stopped by a signal", or why else.

    best: checkpoint to segment with; dice: its validation's mean. structures: Dice of the last validation. failures:
    case -> reason. networks: those of --members or --folds, whose largest exit code is that of all. Of a
    cross-validation dice, structures and failures are those of its scores.
    """

    folder: Path
    status: str
    exit_code: int
    step: int = 0
    best: Path | None = None
    dice: float | None = None
    structures: Mapping[str, float | None] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    networks: tuple["TrainResult", ...] = ()

    @classmethod
    def from_report(cls, folder: Path, report: Mapping[str, Any]) -> "TrainResult":
        """From run.json of one network."""
        best, failed = report["best"], [*report["data"]["skipped"], *report["failures"]]
        return cls(
            folder,
            *(report["status"], report["exit_code"], report["step"]),
            best=folder / "checkpoints" / "best" if best else None,
            dice=best["val_dice"] if best else None,
            structures=report["last_validation"] or {},
            failures={item["id"]: item["reason"] for item in failed},
        )


@shows_keywords(TrainConfig)
def train(*, progress: bool = False, callbacks: Sequence[Callback] = (), **flags: "Unpack[TrainFlags]") -> TrainResult:
    """Train as `mambahome train` does, silently; keywords are its flags.

    Args:
        progress: show lines and a bar.
        callbacks: told of start, steps, validations and end of each network, see `Callback`.

    Raises:
        ConfigError, DatasetError, CheckpointError, OutputError: before anything is trained.
        TrainingError: loss, gradient or update was no longer finite; the checkpoints before it are kept.
    """
    callbacks = typed_value("callbacks", callbacks, Sequence[Callback])
    result = run_training(from_keywords(TrainConfig, flags), Console(quiet=not progress), callbacks=callbacks)
    for network in result.networks or (result,):
        if network.exit_code == 1 and network.status != "finished":
            raise TrainingError(network.status)
    return result


def run_training(
    flags: TrainConfig,
    console: Console,
    started: float | None = None,
    at_once: int = 1,
    callbacks: Sequence[Callback] = (),
    advise: bool = True,
) -> TrainResult:
    """Train as `flags` say and tell `console` of it. started: time.monotonic() at the start of the program.

    at_once: see `networks_of`. callbacks: told of the training besides those of --tracker. advise: say what to type
    next, which is for another command to say where that trains. Raises MambaHomeError before anything is trained.
    """
    begin_devices()  # where the command has not: in the processes of folds, and in Python
    plan = planned_settings(flags)
    given, flags = flags, follow_plan(flags, plan.settings, plan.machine)
    first = plan_lines(given, flags, plan, "cpu" if jax.default_backend() == "cpu" else "gpu")
    seconds = math.inf if flags.max_minutes is None else flags.max_minutes * 60
    folder = run_folder(flags)
    clock = Clock(started or time.monotonic(), seconds, from_first_step=flags.minutes_from == "first_step")
    settings = {name: setting for name, setting in plan.settings.items() if name not in given_ingredients(given)}
    fixed = frozenset(name for name in (*SIZES, "mixer") if is_given(given, name))
    callbacks = (*callbacks, *make_trackers(flags.tracker, functools.partial(say, console)))
    command = Training(flags, folder, console, clock, settings, first, fixed, at_once=at_once, advise=advise)
    return replace(command, callbacks=callbacks).run()


def run_folder(flags: TrainConfig) -> Path:
    """The folder of a run, by flags that the plan has filled."""
    return local_path(flags.output_dir or Path("runs") / (flags.checkpoint_name or flags.model))


@dataclass
class Training:
    """A training command under way: what its networks share, the time that is left to them, and what to say first.

    fixed: flags of sizes, and the mixer, that were given. sizes: flags with which a step fits after others did not.
    at_once, advise: see `run_training`.
    """

    flags: TrainConfig
    folder: Path
    console: Console
    clock: Clock
    settings: Mapping[str, Setting]
    first: list[str] = field(default_factory=list)
    fixed: frozenset[str] = frozenset()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    programs: Programs = field(default_factory=dict)
    at_once: int = 1
    callbacks: Sequence[Callback] = ()
    advise: bool = True

    @functools.cached_property
    def data(self) -> "Data":
        """The data of all networks, opened when the first one asks for them."""
        # What is stored for a fold alone is its own: others may be storing theirs.
        alone = self.folder if self.flags.fold is None else self.folder / f"{FOLD}_{self.flags.fold}"
        return open_data(self.flags, alone, self.console)

    @functools.cached_property
    def held_out(self) -> tuple[tuple[str, ...], ...]:
        """The cases that each of --folds holds out."""
        parts = divide_cases(self.data.prepared, self.flags)
        for line in fold_lines(self.data.prepared, parts, self.flags):
            self.say(line)
        return parts

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    def run(self) -> TrainResult:
        """Train the network, or all of them."""
        if networks := networks_of(self.flags, self.folder, self.at_once):
            with _locked(self.folder) if self.flags.fold is None else contextlib.nullcontext():
                return self._train_several(networks)
        timed = self.flags.max_minutes is not None
        return self._train_one(self.folder, self.flags, self.clock, skip_finished=timed)

    def _train_one(self, folder: Path, flags: TrainConfig, clock: Clock, skip_finished: bool) -> TrainResult:
        """Train one network; with skip_finished not one that ended: what its budget kept free would be time again."""
        with _locked(folder), contextlib.ExitStack() as stack:
            resume = self._may_start(folder, flags)
            if is_first():
                stack.enter_context(logged(self.console, folder / "log.txt"))
            while self.first:
                self.say(self.first.pop(0))
            earlier, recorded = (earlier_report(folder), recorded_mirrors(folder)) if resume else ({}, ())
            devices = choose_devices(flags.parallel, flags.num_devices)
            prepared, prepared_val, _ = self.data
            if flags.fold is not None:
                prepared = in_fold(prepared, self.held_out[flags.fold])

            def make(sizes: Mapping[str, Any]) -> Setup:
                sized = replace(flags, **{**self.sizes, **sizes})
                return make_setup(sized, prepared, prepared_val, len(devices), recorded, self.settings)

            setup = make({})
            if resume:
                setup = make(recorded_sizes(folder, setup, self.fixed))
            require_same("The configuration", checkpoint_settings(setup))
            checkpoint = require_same_run(folder, setup, earlier) if resume else None
            # One that was killed had no time to report; what came after its checkpoint is trained again.
            spent = max(earlier.get("seconds", 0.0), (checkpoint or {}).get("seconds", 0.0))
            checkpoint = checkpoint and checkpoint | {"seconds": spent}
            if skip_finished and is_finished(earlier, setup.flags):
                self.say(f"{folder}: finished already")
                return TrainResult.from_report(folder, earlier)
            started = time.perf_counter()
            run, report = self._train_fitting(folder, setup, make, devices, clock, checkpoint, earlier)
            code = int(bool(self.data.skipped or run.failures))
            if run.error is not None:
                self.say(f"Error: {run.error}")
                code = 1
            elif run.signal is not None:
                code = SIGNALLED + run.signal
            report |= {
                "status": run.status,
                "exit_code": code,
                "seconds": round(spent + time.perf_counter() - started, 3),
                "step": run.step,
                # A finished run that is resumed trains nothing more.
                "loss": earlier.get("loss") if run.loss is None else run.loss,
                "timeline": (earlier.get("timeline") if run.loss is None else None) or run.timeline.to_json(),
                "best": run.best,
                "last_validation": run.validation.structures if run.validation else earlier.get("last_validation"),
                "held_out": held_out_entry(run.held_out),
                "failures": [{"id": case, "reason": reason} for case, reason in run.failures.items()],
            }
            save_report(folder, report)
            for line in end_lines(folder, report, self.flags, self.advise):
                self.say(line)
            return TrainResult.from_report(folder, jsonable(report))

    def _train_fitting(
        self,
        folder: Path,
        setup: Setup,
        make: Callable[[Mapping[str, Any]], Setup],
        devices: Sequence[jax.Device],
        clock: Clock,
        checkpoint: Mapping[str, Any] | None,
        earlier: Mapping[str, Any],
    ) -> tuple[TrainingRun, dict[str, Any]]:
        """Train a network, with fewer patches or smaller ones where the devices lack the memory; with its report.

        make: (changed sizes) -> Setup. checkpoint: config.json of the one to go on from, with its sizes.
        """
        while True:
            report = new_report(folder, setup, self.data.skipped)
            report |= {name: earlier[name] for name in ("pretrained", "compile_seconds") if name in earlier}

            def begin(
                schedule: Schedule, parameters: int, transferred: Transfer | None, setup: Setup = setup, report=report
            ) -> None:
                if transferred is not None:
                    self.say(f"{setup.flags.use_pretrained}: {transferred}")
                    report["pretrained"] = {"path": setup.flags.use_pretrained, **asdict(transferred)}
                report |= {"status": "running", "parameters": parameters}
                save_report(folder, report)
                for line in start_lines(setup, schedule, parameters, devices, checkpoint):
                    self.say(line)

            try:
                try:
                    with device_memory_errors():
                        shared = (self.programs, self.console, begin, self.callbacks)
                        run = train_network(setup, folder, checkpoint, devices, clock, *shared)
                    local = [device for device in devices if device.process_index == jax.process_index()]
                    memory = memory_entry(setup, run.memory, local) if run.memory else earlier.get("memory")
                    return run, {"compile_seconds": run.compile_seconds} | report | {"memory": memory}
                except DeviceMemoryError as error:
                    # Its traceback would keep the arrays of the step on the device.
                    shortage = DeviceMemoryError(str(error), error.memory)
                gc.collect()
                smaller = smaller_sizes(setup, shortage, self.fixed, resumed=checkpoint is not None)
            except MambaHomeError as error:
                # A run that cannot be continued with these flags keeps its report.
                if report["status"] == "running" or not earlier:
                    with contextlib.suppress(OutputError):
                        save_report(folder, report | {"status": str(error), "exit_code": 2})
                raise
            self.sizes = {**self.sizes, **smaller}
            setup = make({})
            self.say(f"{shortage}. Trying a step of {sizes_text(setup)}")

    def _may_start(self, folder: Path, flags: TrainConfig) -> bool:
        """Whether to resume. Raises where a new run would destroy an earlier one, or the folder cannot be written."""
        require_letters(folder)
        exists = holds_run(folder)
        # Before the first process can write one, so that all of them see the same.
        require_same(f"Whether {folder} holds a checkpoint", exists)
        open_output(folder)
        open_output(folder / "checkpoints")
        resume = flags.resume or flags.load_checkpoint
        if exists and not resume:
            raise ConfigError(f"{folder} holds a run already. Continue it with --resume, or name another --output_dir")
        if resume and not exists:
            self.say(f"No checkpoint in {folder} yet: starting from the beginning")
        return exists

    def _train_several(self, networks: Sequence[Network]) -> TrainResult:
        """Train one network after the other, each a run; those that ended before stay, and a signal ends all."""
        flags, folder = self.flags, self.folder
        names = [network.folder.name for network in networks]
        report = {"command": "train", "configuration": asdict(replace(flags, fold=None)), "networks": names}
        # Who trains a single fold is one of several who would write it.
        save = save_report if flags.fold is None else lambda *_: None
        save(folder, report | {"status": "running"})
        if flags.folds is not None:
            if is_first() and not all(holds_run(network.folder) for network in networks):
                forget_scores(folder / CROSS_VALIDATION)
            # The report of all folds takes its time too.
            report_time = 0.0 if self.clock.from_first_step else report_seconds(self.clock.seconds)
            self.clock = self.clock._replace(seconds=self.clock.seconds - report_time)
        results: list[TrainResult] = []
        pooled: Mapping[str, Any] | None = None
        try:
            for number, network in enumerate(networks):
                self.say(network.title)
                share = self.clock._replace(parts=len(networks) - number)
                results.append(self._train_one(network.folder, network.flags, share, skip_finished=True))
                if results[-1].exit_code > SIGNALLED:
                    break
                self.clock = _after(share, network)
            else:
                pooled = self._pool(networks[0].flags.max_minutes) if flags.folds is not None else None
                if self.advise and (flags.folds is None or pooled is not None):
                    self.say(ensemble_line(folder, len(networks_of_run(folder)), flags.folds or flags.members))
        except MambaHomeError as error:
            save(folder, report | {"status": str(error), "exit_code": 2})
            raise
        code = max(network.exit_code for network in results)
        status = "stopped by a signal" if code > SIGNALLED else "finished"
        if pooled is None:
            save(folder, report | {"status": status, "exit_code": code})
            return TrainResult(folder, status, code, networks=tuple(results))
        failures = {entry["case"]: entry["reason"] for entry in pooled["failures"]}
        entry, code = scores_entry(pooled), max(code, int(bool(failures)))
        report |= {"networks": [*pooled["folds"]], "cross_validation": entry}
        save_report(folder, report | {"status": status, "exit_code": code})
        named = {"dice": entry["dice"], "structures": entry["structures"]}
        return TrainResult(folder, status, code, **named, failures=failures, networks=tuple(results))

    def _pool(self, max_minutes: float | None) -> Mapping[str, Any] | None:
        """Count the scores of all folds together, where all of them have ended; else say which have not.

        max_minutes: of a fold.
        """
        missing = missing_folds(self.folder, self.held_out)
        if missing:
            lacks = ", ".join(f"fold {number} ({why})" for number, why in missing.items())
            line = train_line(self.flags, fold=next(iter(missing)), resume=True, max_minutes=max_minutes)
            if self.advise:
                self.say(f"No {CROSS_VALIDATION} yet, without {lacks}: {line}")
            return None
        summary = None
        if is_first():
            summary = cross_validate(self.folder, self.data.prepared, self.held_out)
            show_scores(self.folder, summary, self.console)
        return gather(summary)[0]


def _locked(folder: Path) -> contextlib.AbstractContextManager:
    # The other processes of the same run write to it too.
    return locked(folder, "train") if is_first() else contextlib.nullcontext()


def _after(clock: Clock, network: Network) -> Clock:
    """The time that a network leaves: without what it took in this process, or in all by its checkpoint.

    Without its share where that began with its first step: the others have the same.
    """
    if clock.from_first_step:
        return clock._replace(started=time.monotonic(), seconds=clock.seconds * (1 - 1 / clock.parts))
    now, spent, last = time.monotonic(), 0.0, network.folder / "checkpoints" / "last"
    if holds_run(network.folder):
        spent = network.scale * read_checkpoint_config(last).get("seconds_spent", 0.0)
    return Clock(now, max(clock.seconds - max(now - clock.started, spent), 0.0))


class Data(NamedTuple):
    """Folders that a training reads, and (id, reason) of the cases that cannot be used."""

    prepared: Prepared
    prepared_val: Prepared | None
    skipped: tuple[tuple[str, str], ...]


def open_data(flags: TrainConfig, folder: Path, console: Console) -> Data:
    """A preprocessed folder as it is; any other layout brought into a patch store in `folder`, at its own spacing."""
    prepared, skipped = _open_folder(flags.data_train, folder / "data", flags, console)
    if flags.data_val is None:
        return Data(prepared, None, skipped)
    prepared_val, more = _open_folder(flags.data_val, folder / "data_val", flags, console)
    return Data(prepared, prepared_val, skipped + more)


def _open_folder(
    data: Path, work: Path, flags: TrainConfig, console: Console
) -> tuple[Prepared, tuple[tuple[str, str], ...]]:
    if data.is_dir() and prepared_layout.detect(data):
        prepared, notes = with_split_file(read_prepared(data))
        for note in notes:
            say(console, f"Note: {note}")
        return prepared, ()
    if jax.process_count() > 1:
        raise ConfigError(f"{data} is not preprocessed. With several processes run preprocess.py first")
    dataset = consecutive(load_dataset(data))
    say(console, f"{data} is not preprocessed: storing its scans in {work}, at their own spacing")
    preprocess = PreprocessConfig(data, work, modality=flags.modality)
    tell, track = functools.partial(say, console), tracked(console, "Preprocessing")
    result = prepare_dataset(dataset, preprocess, store_only=True, say=tell, track=track)
    if not result.entries:
        action = "Run preprocess.py on it with the flags that the reasons above name, and train on what it writes."
        raise DatasetError("none of its cases can be used", file=data, expected="scans with labels", action=action)
    return result.prepared, result.failed
