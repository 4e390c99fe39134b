"""What follows a training: metrics.csv, TensorBoard, curves, Weights & Biases, MLflow, callbacks of the caller's."""

import abc
import contextlib
import csv
import importlib
import importlib.util
import io
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

from mambahome_jax.errors import ConfigError, OutputError
from mambahome_jax.flags import TrackerName
from mambahome_jax.support.files import atomic_write, read_json, write_json
from mambahome_jax.training.curves import NAME as CURVES
from mambahome_jax.training.curves import Drawn, write_curves
from mambahome_jax.training.validation import Validation

PROJECT = "mambahome"
RUNS = "trackers.json"  # in the folder of a run: the name that each tracker gave it, so that a resume goes on there
METRICS = "metrics.csv"
COLUMNS = (
    *("step", "epoch", "loss", "lr", "val_dice"),
    *("grad_norm", "update_norm", "images_per_second", "data_wait", "seconds"),
)
FLUSH_SECONDS, DRAWING_SECONDS = 10.0, 60.0


class Callback:
    """Is told of the training of a network, by the first process; override what is of interest.

    metrics.csv and TensorBoard are written before; the curves at the end, and once a minute.

    Of several networks (--folds, --members) each has a start and an end. What a method raises ends the training.
    """

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """A training begins after `step` steps, more than 0 where it is resumed. settings: the flags and the network,
        as values of JSON."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended: its row of metrics.csv, before a validation; None for what is not known."""

    def validation(self, step: int, validation: Validation) -> None:
        """A validation after `step` steps: mean Dice, Dice of each structure, and a picture."""

    def end(self, status: str) -> None:
        """The training has ended: "finished", "stopped by a signal", or why else."""


@contextlib.contextmanager
def following(
    callbacks: Sequence[Callback], folder: Path, settings: Mapping[str, Any], step: int, status: Callable[[], str]
) -> Iterator[None]:
    """Tell the callbacks of the start of a run, and those that were told so of its end, which `status` then names."""
    begun: list[Callback] = []
    ended = ""
    with contextlib.ExitStack() as stack:
        try:
            for callback in callbacks:
                callback.run(folder, settings, step)
                begun.append(callback)
            yield
            ended = status()
        except BaseException as error:
            ended = f"{type(error).__name__}: {error}"
            raise
        finally:
            for callback in reversed(begun):  # all of them, also where the end of one raises
                stack.callback(callback.end, ended)


def run_files(structures: Sequence[str] = (), say: Callable[[str], None] = print) -> list[Callback]:
    """What keeps a training in files of its folder. structures: those validated. say: told of a file that is gone."""
    return [MetricsFile(structures, say), TensorBoard(), Curves(structures)]


class MetricsFile(Callback):
    """RUN/metrics.csv, a row for each step. Raises OutputError.

    On a resume the rows beyond are dropped: the steps are done again. Of a validation the row of its step is told once
    more; columns of structures are called dice_<structure>.
    """

    def __init__(self, structures: Sequence[str] = (), say: Callable[[str], None] = print):
        place = COLUMNS.index("val_dice") + 1
        self.columns = (*COLUMNS[:place], *(f"dice_{name}" for name in structures), *COLUMNS[place:])
        self._say = say

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._path = folder / METRICS
        with _writing(self._path):
            self._open(step)

    def _open(self, step: int) -> None:
        rows = rows_up_to(self._path, step) if step else []
        lines = [_line(self.columns, row) for row in ({name: name for name in self.columns}, *rows)]
        with atomic_write(self._path, "output folder", parents=False) as partial:  # a kill leaves either
            partial.write_bytes(b"".join(lines))
        self._file = self._path.open("r+b")
        self._row: Mapping[str, Any] = rows[-1] if rows else {}
        self._begin = sum(map(len, lines[:-1]))  # of the last row

    def step(self, row: Mapping[str, Any]) -> None:
        self._write(row, again=False)

    def validation(self, step: int, validation: Validation) -> None:
        again = str(self._row.get("step")) == str(step)
        self._write({**(self._row if again else {"step": step}), **_scores(validation)}, again)

    def _write(self, row: Mapping[str, Any], again: bool) -> None:
        """Write a row, or the last one again; whole or not at all, also where the process is killed."""
        with _writing(self._path):
            if not self._path.exists():
                self._file.close()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._open(0)
                again = False
                self._say(f"{self._path} is gone, and the values so far with it; a new one goes on from here")
            self._begin = self._file.seek(self._begin) if again else self._file.seek(0, os.SEEK_END)
            self._file.write(_line(self.columns, row))
            self._file.truncate()
            self._file.flush()
            self._row = row

    def end(self, status: str) -> None:
        with _writing(self._path):
            self._file.close()


class TensorBoard(Callback):
    """RUN/tensorboard. Raises OutputError.

    The SummaryWriter of tensorboardX hands everything to a thread. A full disk ends that with a traceback, and the
    training waits for ever to hand over the next value.
    """

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._folder = folder / "tensorboard"
        with _writing(self._folder):
            self._open()
            if step:  # from here on values of earlier files do not count
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events, self._due = EventsWriter(str(self._folder / "events")), 0.0

    def step(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name not in ("step", "epoch") and value is not None}
        self._write(row["step"], [scalar(name, value) for name, value in values.items()])

    def validation(self, step: int, validation: Validation) -> None:
        summaries = [scalar(name, value) for name, value in _scores(validation, "val_dice/").items()]
        if validation.picture is not None:
            summaries.append(image("validation", validation.picture, dataformats="HWC"))
        self._due = 0.0
        self._write(step, summaries)

    def _write(self, step: int, summaries: Sequence[Any]) -> None:
        with _writing(self._folder):
            if not self._folder.exists():
                self._events.close()
                self._open()
            for summary in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() >= self._due:  # waits for the disk
                self._events.flush()
                self._due = time.monotonic() + FLUSH_SECONDS

    def end(self, status: str) -> None:
        with _writing(self._folder):
            self._events.close()


class Curves(Callback):
    """RUN/progress.png, drawn once a minute and at the end. Raises OutputError."""

    def __init__(self, structures: Sequence[str] = ()):
        self._structures = structures

    def run(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._path, self._due = folder / CURVES, time.monotonic() + DRAWING_SECONDS
        self.drawn = Drawn(rows_up_to(folder / METRICS, step) if step else ())

    def step(self, row: Mapping[str, Any]) -> None:
        self.drawn.add(row)
        if time.monotonic() >= self._due:
            self._draw()
            self._due = time.monotonic() + DRAWING_SECONDS

    def validation(self, step: int, validation: Validation) -> None:
        self.drawn.add({"step": step, **_scores(validation)})

    def end(self, status: str) -> None:
        self._draw()

    def _draw(self) -> None:
        if self._path.parent.exists():
            write_curves(self._path, self.drawn, self._structures)


def rows_up_to(path: Path, step: float = math.inf) -> list[dict[str, str]]:
    """The whole rows of metrics.csv, up to a step; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A full disk may leave half a row at the end, to which the next one is glued.
        rows = [row for row in csv.DictReader(file) if {*COLUMNS} <= {*row} and None not in (*row, *row.values())]
    return [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step]


def _line(columns: Sequence[str], row: Mapping[str, Any]) -> bytes:
    """A row as CSV. Of an earlier version it may lack columns, and have some of structures that there are no more."""
    text = io.StringIO(newline="")
    values = (row.get(name) for name in columns)
    csv.writer(text).writerow([f"{value:.7g}" if isinstance(value, float) else value for value in values])
    return text.getvalue().encode()


def _scores(validation: Validation, prefix: str = "dice_") -> dict[str, float]:
    """The scores of a validation that are known, by the name of their column."""
    scores = {"val_dice": validation.dice, **{f"{prefix}{name}": each for name, each in validation.structures.items()}}
    return {name: value for name, value in scores.items() if math.isfinite(value)}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot be written: {reason}. Is the disk full or read-only?") from error


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
        self._do(lambda: self.log(step, _scores(validation)))
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
            action = f'Install it: pip install "mambahome-jax[{name}]"'
            raise ConfigError(f"--tracker {name}: the package {name} is not installed. {action}")
    return [_TRACKERS[name](name, say) for name in dict.fromkeys(names)]
