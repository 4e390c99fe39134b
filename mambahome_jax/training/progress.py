"""What a person sees of a training, and what is kept of it: progress bar or lines, metrics.csv, TensorBoard."""

import csv
import io
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mambahome_jax.errors import OutputError
from mambahome_jax.support.console import duration, say
from mambahome_jax.support.files import atomic_write
from mambahome_jax.training.board import Board
from mambahome_jax.training.budget import TimeBudget

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "val_dice",
    "grad_norm",
    "update_norm",
    "images_per_second",
    "data_wait",
    "seconds",
)
# Without a terminal: a line after this many seconds, and one for about each hundredth of the way if that is slower.
LINE_SECONDS = 10.0
# Without a validation or checkpoint, who watches sees nothing new for so long.
FLUSH_SECONDS = 120.0


class MetricsLog:
    """RUN/metrics.csv, one row a step, and RUN/tensorboard. Has to be closed; a context manager does it.

    On a resume after `start` steps the rows beyond are dropped: the steps are done again. say: called with what
    happened to a file that somebody removed. Raises OutputError where nothing can be written.
    """

    def __init__(self, folder: Path, start: int = 0, say: Callable[[str], None] = print):
        self._path, self._say, self._flush_due = folder / "metrics.csv", say, 0.0
        try:
            self._open(start)
        except OSError as error:
            raise self._failure(error) from error

    def _open(self, start: int) -> None:
        self._open_rows(start)
        self._board = Board(self._path.with_name("tensorboard"), start + 1 if start else None)

    def _open_rows(self, step: int, added: Mapping[str, str] | None = None) -> None:
        _keep_rows(self._path, step, added)
        # A row reaches the file whole or not at all, also where the process is killed.
        self._file = self._path.open("a", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def _to_board(self, row: Mapping[str, Any], extra: Mapping[str, float] | None) -> None:
        for name, value in {**row, **(extra or {})}.items():
            if name not in ("step", "epoch") and value is not None:
                self._board.scalar(name, value, row["step"])

    def write(self, row: Mapping[str, Any], extra: Mapping[str, float] | None = None) -> None:
        """Keep the values of a step, named as in COLUMNS; `extra` goes to TensorBoard alone."""
        try:
            self._writer.writerow({name: _text(row.get(name)) for name in COLUMNS})
            self._to_board(row, extra)
            if time.monotonic() >= self._flush_due:
                self._flush_due = time.monotonic() + FLUSH_SECONDS
                self.flush()
        except OSError as error:
            raise self._failure(error) from error

    def complete(self, values: Mapping[str, Any], extra: Mapping[str, float] | None = None) -> None:
        """Add to the row of `values["step"]`, the last one that is kept; `extra` goes to TensorBoard alone."""
        try:
            self._file.close()
            self._open_rows(values["step"], {name: _text(values[name]) for name in COLUMNS if name in values})
            self._to_board(values, extra)
        except OSError as error:
            raise self._failure(error) from error

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """An RGB picture (rows, columns, 3) uint8 for TensorBoard."""
        try:
            self._board.picture(name, picture, step)
        except OSError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Bring everything to the disk, for who watches; into new files where they were removed meanwhile."""
        try:
            self._file.flush()
            self._board.flush()
            if not self._path.exists():
                self._file.close()
                self._board.close()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._open(0)
                self._say(f"{self._path} is gone, and the values so far with it; a new one goes on from here")
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
            self._board.close()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._path}: cannot be written: {error.strerror or error}. Is the disk full or read-only?"
        )


class NoLog(MetricsLog):
    """Keeps nothing: for the processes beside the first."""

    def __init__(self) -> None:
        pass

    def write(self, row: Mapping[str, Any], extra: Mapping[str, float] | None = None) -> None:
        """Nothing."""

    def complete(self, values: Mapping[str, Any], extra: Mapping[str, float] | None = None) -> None:
        """Nothing."""

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def _keep_rows(path: Path, step: int, added: Mapping[str, str] | None = None) -> None:
    """Write the header and the rows up to a step, its own with what is `added`, in the place of the file: a run that is
    killed here has either."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({**row, **(added or {})} if row["step"] == str(step) else row for row in _rows_up_to(path, step))
    with atomic_write(path, "output folder", parents=False) as partial:
        partial.write_bytes(text.getvalue().encode())


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A full disk may leave half a row at the end.
        rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS) and None not in row.values()]
    return [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step]


def _text(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else "" if value is None else value


@dataclass(frozen=True)
class Shown:
    """What the progress line tells of a step. memory: bytes used and there on the fullest device; waiting: share of
    the time, 0 to 1, in which the loop waited for data."""

    loss: float
    lr: float
    images_per_second: float | None = None
    memory: tuple[int, int] | None = None
    waiting: float | None = None

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}", f"lr {self.lr:.2e}"]
        if self.images_per_second:
            parts.append(f"{self.images_per_second:.3g} images/s")
        if self.memory is not None:
            used, there = (value / 2**30 for value in self.memory)
            parts.append(f"GPU {used:.1f}/{there:.0f} GiB")
        if self.waiting is not None:
            parts.append(f"data wait {self.waiting:.0%}")
        return "  ".join(parts)


def device_memory(devices: Sequence[jax.Device]) -> tuple[int, int] | None:
    """(largest use so far, limit) in bytes of the fullest device, None where the devices do not tell (CPUs)."""
    stats = [found for device in devices if (found := device.memory_stats())]
    pairs = [(s["peak_bytes_in_use"], s["bytes_limit"]) for s in stats if {"peak_bytes_in_use", "bytes_limit"} <= {*s}]
    return max(pairs) if pairs else None


class Display:
    """Progress of a training on the terminal; plain lines from time to time where it is not one."""

    def __init__(
        self,
        console: Console,
        total: int | None,
        start: int = 0,
        images_per_step: int = 1,
        budget: TimeBudget | None = None,
    ):
        self.console, self.total, self.start, self.images = console, total, start, images_per_step
        self.budget = budget
        self._times: deque[float] = deque(maxlen=32)
        self._line_due = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            columns = (
                TextColumn("Training"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            total = self.total if self.budget is None else self.budget.seconds
            self._task = self._bar.add_task("", total=total, values="")
            self._bar.update(self._task, completed=self._done(self.start))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line as it is: paths may hold what rich would take for markup."""
        say(self.console, text)

    def tick(self, step: int) -> float | None:
        """A step has ended now; returns images per second over the last ones, None until that can be said."""
        self._times.append(time.perf_counter())
        if len(self._times) < 2:
            return None
        rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        # The first step compiles; the second and third say how long the rest takes.
        if step - self.start == 4 and self.total is not None and step < self.total:
            left = duration((self.total - step) / rate)
            self.say(f"{rate * self.images:.2g} images/s: the {self.total - step} steps left take about {left}")
        return rate * self.images

    def pause(self) -> None:
        """What follows (validation) does not count as time of steps."""
        self._times.clear()

    def update(self, step: int, shown: Shown) -> None:
        """Show how far the training is."""
        count = f"step {step}" if self.total is None else f"step {step}/{self.total}"
        values = f"{count}  {shown}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(step), values=values)
            return
        now = time.perf_counter()
        if now >= self._line_due or step == self.total:
            self._line_due = now + LINE_SECONDS
            left = self._left(step, shown.images_per_second)
            self.say(values + ("" if left is None else f"  left {duration(left)}"))

    def _done(self, step: int) -> float:
        return step if self.budget is None else self.budget.spent()

    def _left(self, step: int, rate: float | None) -> float | None:
        if self.budget is not None:
            return max(self.budget.left(), 0.0)
        return (self.total - step) * self.images / rate if rate and self.total is not None else None


def dice_table(structures: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """A line a structure: name, Dice, and the change since `before`; nan where no case had the structure."""
    width = max((len(name) for name in structures), default=0)
    lines = []
    for name, value in structures.items():
        change = value - (before or {}).get(name, math.nan)
        lines.append(f"  {name:<{width}}  {value:.3f}" + (f"  {change:+.3f}" if math.isfinite(change) else ""))
    return "\n".join(lines)
