"""What a person sees of a training, and what is kept of it: progress bar or lines, metrics.csv, TensorBoard."""

import csv
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from mambahome_jax.errors import OutputError

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "val_dice",
    "grad_norm",
    "update_norm",
    "images_per_second",
    "seconds",
)
# Without a terminal: a line after this many seconds, and one for about each hundredth of the way if that is slower.
LINE_SECONDS = 10.0


class MetricsLog:
    """RUN/metrics.csv, one row a step, and RUN/tensorboard. Has to be closed; a context manager does it.

    On a resume after `start` steps the rows beyond are dropped: the steps are done again. Raises OutputError where
    nothing can be written.
    """

    def __init__(self, folder: Path, start: int = 0):
        self._path = folder / "metrics.csv"
        try:
            kept = _rows_up_to(self._path, start)
            self._file = self._path.open("w", newline="", encoding="utf-8")
            self._writer = csv.DictWriter(self._file, COLUMNS)
            self._writer.writeheader()
            self._writer.writerows(kept)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        except OSError as error:
            raise self._failure(error) from error

    def write(self, row: Mapping[str, Any], extra: Mapping[str, float] | None = None) -> None:
        """Keep the values of a step, named as in COLUMNS; `extra` goes to TensorBoard alone."""
        try:
            self._writer.writerow({name: _text(row.get(name)) for name in COLUMNS})
            for name, value in {**row, **(extra or {})}.items():
                if name not in ("step", "epoch") and value is not None:
                    self._board.add_scalar(name, value, row["step"])
        except OSError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Bring everything to the disk, for who watches."""
        try:
            self._file.flush()
            self._board.flush()
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

    def flush(self) -> None:
        """Nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A killed process may leave half a row at the end.
        rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS) and None not in row.values()]
    return [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step]


def _text(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else "" if value is None else value


class Display:
    """Progress of a training on the terminal; plain lines from time to time where it is not one."""

    def __init__(self, console: Console, total: int, start: int = 0, images_per_step: int = 1):
        self.console, self.total, self.start, self.images = console, total, start, images_per_step
        self._times: deque[float] = deque(maxlen=32)
        self._line_due = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            columns = (
                TextColumn("Training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=self.total, completed=self.start, values="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line as it is: paths may hold what rich would take for markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tick(self, step: int) -> float | None:
        """A step has ended now; returns images per second over the last ones, None until that can be said."""
        self._times.append(time.perf_counter())
        if len(self._times) < 2:
            return None
        rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        # The first step compiles; the second and third say how long the rest takes.
        if step - self.start == 4 and step < self.total:
            left = duration((self.total - step) / rate)
            self.say(f"{rate * self.images:.2g} images/s: the {self.total - step} steps left take about {left}")
        return rate * self.images

    def pause(self) -> None:
        """What follows (validation) does not count as time of steps."""
        self._times.clear()

    def update(self, step: int, loss: float, rate: float | None) -> None:
        """Show how far the training is."""
        values = f"loss {loss:.4f}" + (f"  {rate:.3g} images/s" if rate else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=values)
            return
        now = time.perf_counter()
        if now >= self._line_due or step == self.total:
            self._line_due = now + LINE_SECONDS
            left = f"  left {duration((self.total - step) * self.images / rate)}" if rate else ""
            self.say(f"step {step}/{self.total}  {values}{left}")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
