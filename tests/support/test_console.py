"""What commands print: readers that leave early, encodings without a letter, command lines to paste."""

import io
import os
import shlex
import subprocess
import sys
import types

import pytest
from rich.console import Console

from mambahome_jax.support.console import command_line, counted, logged, say, tracked

PRINT = "from mambahome_jax.support.console import protect_output; protect_output(); "


def _python(code, env=None, **streams):
    return subprocess.run(
        [sys.executable, *streams.pop("flags", ()), "-c", PRINT + code],
        env={**os.environ, **(env or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_stops_nothing(stream, flags, tmp_path):
    read, write = os.pipe()
    os.close(read)
    code = (
        f"import sys; print('x' * 100000, file=sys.{stream}, flush=True); print('y', file=sys.{stream}); "
        f"open({str(tmp_path / 'done')!r}, 'w').close()"
    )
    done = _python(code, flags=flags, **{stream: write})
    os.close(write)
    assert done.returncode == 0 and not (done.stdout or done.stderr)
    assert (tmp_path / "done").exists()


def test_lines_end_between_words_on_a_terminal_alone():
    def said(text, terminal=True):
        stream = io.StringIO()
        say(Console(file=stream, width=20, force_terminal=terminal, _environ={}), text)
        return stream.getvalue().splitlines()

    prose, path = "a scan of the [bold]liver[/bold] :cat: and more", "in /a/folder/with/a/long/name/x"
    assert said(prose) == ["a scan of the ", "[bold]liver[/bold] ", ":cat: and more"]
    assert said(prose, terminal=False) == [prose]
    assert said(path) == [path]
    assert said("Next: mambahome train --data_train READY") == ["Next: mambahome train --data_train READY"]


def test_a_log_takes_a_name_that_is_not_text(tmp_path):
    console = Console(quiet=True)
    with logged(console, tmp_path / "log.txt"):
        say(console, os.fsdecode(b"scan_\xff") + " \u00e9")
    assert (tmp_path / "log.txt").read_text("utf-8") == "scan_\\udcff \u00e9\n"


def test_a_log_takes_in_a_notebook_what_the_cell_shows(tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    console = Console(quiet=True)
    with logged(console, tmp_path / "log.txt"):
        say(console, "3 steps")
    assert (tmp_path / "log.txt").read_text("utf-8") == "3 steps\n"


@pytest.mark.parametrize("words", ["--help", "", "--version", "dance", "check --help", "check none"])
def test_commands_are_silent_for_a_reader_that_has_gone(words):
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "mambahome_jax", *words.split()]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    expected = 0 if words.endswith(("--help", "--version")) else 2
    assert done.returncode == expected and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a file that is always full")  # noqa: PTH110
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_where_its_log_cannot_be_written(stream):
    code = f"import sys; [print('x' * 9000, file=sys.{stream}, flush=True) for _ in range(3)]"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = _python(code, **{stream: full})
    assert done.returncode == 0
    lost = b"Note: output is lost, the work goes on: No space left on device\n"
    assert (done.stderr == lost) if stream == "stdout" else not done.stdout


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding, stream):
    code = f"import sys; print('ü漢\\udcfc', file=sys.{stream})"
    done = _python(code, {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0
    text = getattr(done, stream).decode(encoding).strip()
    assert text == {"ascii": "\\xfc\\u6f22\\udcfc", "utf-8": "ü漢\\udcfc"}.get(encoding, "ü\\u6f22\\udcfc")


def test_an_error_handler_that_the_user_chose_stays():
    done = _python("print('漢')", {"PYTHONIOENCODING": "ascii:replace"})
    assert done.stdout.strip() == b"?"


def test_tables_and_bars_are_drawn_in_any_encoding():
    code = (
        "from rich.console import Console; from rich.table import Table; from rich.progress import track\n"
        "table = Table(title='漢'); table.add_column('x'); table.add_row('漢字'); Console().print(table)\n"
        "for _ in track(range(2), '漢'): pass"
    )
    done = _python(code, {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and b"\\u6f22\\u5b57" in done.stdout


def test_a_command_line_can_be_pasted():
    line = command_line("train", "--data_train", "/a b/it's $HOME", "--steps", "3")
    assert shlex.split(line) == ["mambahome", "train", "--data_train", "/a b/it's $HOME", "--steps", "3"]
    assert command_line("train", "--data_train", "READY") == "mambahome train --data_train READY"


def test_in_a_notebook_one_line_of_the_cell_is_written_anew(monkeypatch):
    shown = []

    class Cell:
        def update(self, content, raw):
            shown.append(content["text/plain"])

    def display(content, raw, display_id):
        shown.append(content["text/plain"])
        return Cell()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("mambahome_jax.support.console._CELL_SECONDS", 0.0)
    console = Console(force_jupyter=True)
    assert list(tracked(console, "Reading")(iter("abc"), 3)) == ["a", "b", "c"]
    assert [line.partition(",")[0] for line in shown] == [f"Reading: {n} of 3" for n in (1, 2, 3, 3)]
    shown.clear()
    assert list(tracked(Console(quiet=True, force_jupyter=True), "Reading")(iter("abc"), 3)) and not shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, "case"), "1 case"),
        ((1000, "case"), "1,000 cases"),
        ((0, "class"), "0 classes"),
        ((1, "class"), "1 class"),
        ((1, "voxel", "are"), "1 voxel is"),
        ((2, "voxel", "are"), "2 voxels are"),
        ((1, "", "were"), "1 was"),
        ((1, "channel", "stand"), "1 channel stands"),
        ((3, "channel", "stand"), "3 channels stand"),
    ],
)
def test_noun_and_verb_follow_the_number(arguments, expected):
    assert counted(*arguments) == expected
