"""What follows a training beside the files of its folder: callbacks of the caller's, Weights & Biases and MLflow."""

import abc
import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrackerName
from mambahome_jax.support.files import jsonable, read_json, write_json
from mambahome_jax.training.progress import FileLog, MetricsLog
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.validation import Validation

PROJECT = "mambahome"
RUNS = "trackers.json"  # in the folder of a run: the name that each tracker gave it, so that a resume goes on there


class Callback:
    """Is told of the training of a network, by the first process; override what is of interest.

    metrics.csv, the curves and TensorBoard are written before.

    Of several networks (--folds, --members) each has a start and an end. What a method raises ends the training.
    """

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """A training begins after `step` steps, more than 0 where it is resumed. settings: the flags and the network,
        as values of JSON."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended: its row of metrics.csv, without the validation; None for what is not known."""

    def validation(self, step: int, validation: Validation) -> None:
        """A validation after `step` steps: mean Dice, Dice of each structure, and a picture."""

    def end(self, status: str) -> None:
        """The training has ended: "finished", "stopped by a signal", or why else."""


class Followed(MetricsLog):
    """The files of a run that goes on after `step` steps, and the callbacks that are told the same.

    say: as of `FileLog`. status: what the end is called, asked for then.
    """

    def __init__(
        self,
        folder: Path,
        setup: Setup,
        step: int,
        say: Callable[[str], None],
        callbacks: Sequence[Callback],
        status: Callable[[], str],
    ):
        structures = tuple(setup.structures.values()) if setup.val_cases else ()
        self.files, self.callbacks, self.status = FileLog(folder, step, say, structures), callbacks, status
        settings = jsonable({**asdict(setup.flags), "network": setup.model.to_json()})
        for callback in callbacks:
            callback.run(folder, settings, step)

    def step(self, row: Mapping[str, Any], validation: Validation | None = None) -> None:
        self.files.step(row, validation)
        for callback in self.callbacks:
            callback.step(row)
        self._validated(row["step"], validation)

    def complete(self, step: int, validation: Validation) -> None:
        self.files.complete(step, validation)
        self._validated(step, validation)

    def _validated(self, step: int, validation: Validation | None) -> None:
        if validation is not None:
            for callback in self.callbacks:
                callback.validation(step, validation)

    def flush(self) -> None:
        self.files.flush()

    def draw(self) -> None:
        self.files.draw()

    def __exit__(self, *raised: object) -> None:
        status = self.status() if raised[:1] in ((), (None,)) else f"{type(raised[1]).__name__}: {raised[1]}"
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.end, status)
            self.files.__exit__()


class Tracker(Callback, abc.ABC):
    """Hands a training on to a package, which may fail: that is said once, and the training goes on without it."""

    def __init__(self, name: TrackerName, say: Callable[[str], None]):
        self.name, self.say = name, say
        self.package: Any = importlib.import_module(name)
        self._on = False

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._on = True
        known = read_json(folder / RUNS) if (folder / RUNS).exists() else {}
        given = self._do(lambda: self.begin(folder, settings, known.get(self.name) if step else None))
        if given and given != known.get(self.name):
            write_json(folder / RUNS, known | {self.name: given})

    def step(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        self._do(lambda: self.log(row["step"], values))

    def validation(self, step: int, validation: Validation) -> None:
        scores = {f"dice_{name}": value for name, value in validation.structures.items()}
        scores = {name: value for name, value in {"val_dice": validation.dice, **scores}.items() if value == value}
        self._do(lambda: self.log(step, scores))
        if validation.picture is not None:
            self._do(lambda: self.picture(step, validation.picture))

    def end(self, status: str) -> None:
        self._do(lambda: self.finish(status))
        self._on = False

    def _do(self, call: Callable[[], Any]) -> Any:
        if not self._on:
            return None
        try:
            return call()
        except Exception as error:  # noqa: BLE001 (of a package or its server; days of training are not to end by it)
            self._on = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.say(f"--tracker {self.name} failed, and the training goes on without it: {reason}")
            return None

    @abc.abstractmethod
    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        """Begin a run, or go on with the one that is known by this name; return its name."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""

    @abc.abstractmethod
    def picture(self, step: int, picture: Any) -> None:
        """Log an RGB picture (rows, columns, 3) uint8."""

    @abc.abstractmethod
    def finish(self, status: str) -> None:
        """End the run."""


class Wandb(Tracker):
    """Weights & Biases; WANDB_MODE=offline writes to the folder of the run, WANDB_PROJECT names a project."""

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        options = {} if known is None else {"id": known, "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = self.package.init(
            project=project, dir=str(folder), name=folder.name, config=dict(settings), **options
        )
        return self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, picture: Any) -> None:
        self._run.log({"validation": self.package.Image(picture)}, step=step)

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Mlflow(Tracker):
    """MLflow; MLFLOW_TRACKING_URI names a server or a place on the disk, MLFLOW_EXPERIMENT_NAME an experiment."""

    def begin(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> str:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and known is None:
            self.package.set_experiment(PROJECT)
        run = self.package.start_run(run_id=known, run_name=None if known else folder.name)
        if known is None:
            self.package.log_params({name: str(value)[:500] for name, value in settings.items()})
        return run.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Its names have few letters. A server answers when it can; a step does not wait for it.
        metrics = {re.sub(r"[^\w\-. /]", "_", name): float(value) for name, value in values.items()}
        self.package.log_metrics(metrics, step=step, synchronous=False)

    def picture(self, step: int, picture: Any) -> None:
        self.package.log_image(picture, key="validation", step=step)

    def finish(self, status: str) -> None:
        self.package.set_tag("status", status)
        self.package.end_run("FINISHED" if status == "finished" else "FAILED")


_TRACKERS: Mapping[TrackerName, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def make_trackers(names: Sequence[TrackerName], say: Callable[[str], None]) -> list[Tracker]:
    """The trackers that --tracker names. Raises ConfigError: a package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            action = f"Install it: pip install 'mambahome-jax[{name}]'"
            raise ConfigError(f"--tracker {name}: the package {name} is not installed. {action}")
    return [_TRACKERS[name](name, say) for name in dict.fromkeys(names)]
