"""What commands print: in any encoding, to readers that may leave early, with command lines ready to paste."""

import contextlib
import errno
import functools
import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
# Takes a line about the work.
Say = Callable[[str], None]
# Takes results as they come, and how many there will be; passes them on.
Track = Callable[[Iterable[T], int], Iterable[T]]

_STDERR = 2  # descriptor
LOG_WIDTH = 120  # of tables in a log
_CELL_SECONDS = 0.5  # between two texts of a line in a notebook


class _Pipe(io.FileIO):
    """Bytes to a descriptor; given up where nobody reads them any more, their disk is full, or their terminal gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self._say(error)
            return memoryview(data).nbytes

    def _say(self, error: OSError) -> None:
        """Once, where this is not the stream that says so."""
        told, self._told = getattr(self, "_told", self.fileno() == _STDERR), True
        if not told:
            with contextlib.suppress(OSError):
                os.write(_STDERR, f"Note: output is lost, the work goes on: {error.strerror}\n".encode())


def protect_output() -> None:
    """Have sys.stdout and sys.stderr escape what their encoding lacks, and outlive their reader (`--help | head`).

    The work goes on when the reader has gone: its results are files. Streams that are not the process's own, as of a
    notebook or a test, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper or stream is not getattr(sys, f"__{name}__"):
            continue
        errors = "backslashreplace" if stream.errors in ("strict", "surrogateescape") else stream.errors
        unbuffered = isinstance(stream.buffer, io.FileIO)
        if not unbuffered and not isinstance(stream.buffer.raw, io.FileIO):
            # The console of Windows, which is no pipe and has all letters.
            stream.reconfigure(errors=errors)
            continue
        stream.flush()
        raw = _Pipe(stream.fileno(), "w", closefd=False)
        protected = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=errors,
            line_buffering=stream.line_buffering,
            write_through=unbuffered,
        )
        setattr(sys, name, protected)


def silent(text: str) -> None:
    """Say nothing: for work whose lines nobody reads."""


def untracked(results: Iterable[T], total: int) -> Iterable[T]:
    """Pass results on and show nothing, in the place of `tracked`."""
    return results


def command_line(command: str, *words: str | Path) -> str:
    """`mambahome COMMAND ...` as a shell takes it: words with spaces and the like are quoted."""
    line = ["mambahome", command, *map(str, words)]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


def say(console: "Console", text: str) -> None:
    """Print text as it is: no markup, no colours. On a terminal its lines end between words.

    Not those with a command line or a word that is wider than the terminal, such as a path: they can be copied whole.
    """
    whole = not console.is_terminal or "mambahome " in text or max(map(len, text.split()), default=0) > console.width
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=whole)


@contextlib.contextmanager
def logged(console: "Console", file: Path) -> Iterator[None]:
    """Append to a file what the console prints meanwhile, without bars; what the file does not take is lost."""
    from rich.console import Console, RenderHook
    from rich.control import Control
    from rich.text import Text

    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1))
        except OSError:
            yield
            return
        # In a notebook rich would print into the cell, whatever the file.
        log = Console(file=stream, width=LOG_WIDTH, force_terminal=False, force_jupyter=False, no_color=True)

        class Log(RenderHook):
            def process_renderables(self, renderables: list[Any]) -> list[Any]:
                shown = [each for each in renderables if not isinstance(each, Control)]
                with contextlib.suppress(OSError):
                    for each in shown:
                        log.print(each, soft_wrap=isinstance(each, Text))
                return renderables

        console.push_render_hook(Log())
        try:
            yield
        finally:
            console.pop_render_hook()


def bars(console: "Console", *columns: Any, **options: Any) -> "Progress":
    """Make bars of these columns, of rich.progress; options: of its Progress."""
    from rich.constrain import Constrain
    from rich.progress import Progress

    class Narrow(Progress):
        """Leave room for the ^C that a terminal writes behind a bar, which would else go on in the next line."""

        def get_renderables(self) -> Iterator[Any]:
            yield Constrain(self.make_tasks_table(self.tasks), console.width - len("^C"))

    return Narrow(*columns, console=console, **options)


def progress_bar(console: "Console", text: str = "{task.description}", *, disable: bool = False) -> "Progress":
    """Make the bar of a command: what is done, how many, for how long and how much longer. text: before the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn(text), BarColumn(bar_width=None), MofNCompleteColumn(), *times)
    # The mean over an hour: a scan may take minutes, and within half of one nothing would be known.
    disable = disable or console.quiet or console.is_jupyter  # see CellLine
    return bars(console, *columns, disable=disable, speed_estimate_period=3600.0)


def tracked(console: "Console", text: str) -> Track:
    """Make what passes results on and shows a bar meanwhile, `text` before it; a line of the cell in a notebook."""

    def track(results: Iterable[T], total: int) -> Iterator[T]:
        with progress_bar(console, text, disable=not total) as progress, CellLine(console) as line:
            bar, begun = progress.add_task("", total=total), time.monotonic()
            for number, result in enumerate(results, 1):
                progress.advance(bar)
                spent = time.monotonic() - begun
                left = duration(spent / number * (total - number))
                line.show(f"{text}: {number} of {total}, {duration(spent)}, left {left}")
                yield result

    return track


def scan_bars(console: "Console") -> tuple[Track, Callable[[int, int], None]]:
    """Make what passes scans on and shows a bar of them, and what takes (windows done, windows in all) of one."""
    progress, line = progress_bar(console), CellLine(console)
    # The first window waits for the compiled network.
    scans, windows = (progress.add_task(name, total=None) for name in ("scans", "compiling"))

    def track(results: Iterable[T], total: int) -> Iterator[T]:
        progress.update(scans, total=total)
        with progress if total else contextlib.nullcontext():
            for number, result in enumerate(results, 1):
                progress.advance(scans)
                line.show(f"scans: {number} of {total}")
                yield result

    def show(done: int, total: int) -> None:
        progress.update(windows, description="windows", completed=done, total=total)
        line.show(f"windows: {done} of {total}")

    return track, show


class CellLine(contextlib.AbstractContextManager):
    """One line of a notebook's cell that is written anew; nothing elsewhere. Needs no widgets, as rich's bars do."""

    def __init__(self, console: "Console"):
        self.on, self._cell, self._due, self._text = console.is_jupyter and not console.quiet, None, 0.0, ""

    def show(self, text: str) -> None:
        """Show a text in the place of the one before, at most twice a second."""
        self._text = text
        if self.on and time.monotonic() >= self._due:
            self._write()

    def __exit__(self, *_: object) -> None:
        """Show the last text that there was."""
        if self._cell is not None:
            self._write()

    def _write(self) -> None:
        from IPython.display import display

        self._due, content = time.monotonic() + _CELL_SECONDS, {"text/plain": self._text}
        if self._cell is None:
            self._cell = display(content, raw=True, display_id=True)
        else:
            self._cell.update(content, raw=True)


@contextlib.contextmanager
def counting(
    progress: bool | Callable[[int, int], None] | None, text: str
) -> Iterator[Callable[[int, int], None] | None]:
    """Give what takes (done, in all) and shows it: a bar with `text` before it, the caller's own, None for nothing."""
    if not isinstance(progress, bool) or not progress:
        yield progress or None
        return
    from rich.console import Console

    console = Console()
    with progress_bar(console) as bar, CellLine(console) as line:
        task = bar.add_task(text, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            line.show(f"{text}: {done} of {total}")

        yield show


@functools.cache
def say_once(text: str) -> None:
    """Print a line to the standard error, the first time in this process that it is said."""
    print(text, file=sys.stderr)


def shown(progress: bool, text: str) -> tuple[Say, Track]:
    """Make what a command as a function tells of its work: nothing, or lines and a bar, `text` before it."""
    if not progress:
        return silent, untracked
    from rich.console import Console

    console = Console()
    return partial(say, console), tracked(console, text)


def counted(number: int, noun: str, verb: str = "") -> str:
    """Write "1 case is", "1,000 cases are"; noun: in the singular, may be empty; verb: in the plural."""
    if number == 1:
        verb = {"are": "is", "were": "was", "have": "has"}.get(verb, verb and f"{verb}s")
    elif noun:
        noun += "es" if noun.endswith("s") else "s"
    return " ".join(filter(None, (f"{number:,}", noun, verb)))


def duration(seconds: float) -> str:
    """Say seconds as a person does: 42 s, 2 min 30 s, 17 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600 and (rest := round(seconds) % 60):
        return f"{round(seconds) // 60} min {rest:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
