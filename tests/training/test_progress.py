"""metrics.csv and TensorBoard of a run that is killed, and on a disk that is full."""

import math
import shutil
import threading
from pathlib import Path

import pytest

from mambahome_jax.errors import OutputError
from mambahome_jax.support.console import duration
from mambahome_jax.training.callbacks import MetricsFile, TensorBoard, following, rows_up_to, run_files
from mambahome_jax.training.validation import Validation
from tests.training.stand_in import log_steps


def _lines(folder):
    return (folder / "metrics.csv").read_bytes().decode().splitlines()


def test_rows_are_in_the_file_before_anything_is_flushed_or_closed(tmp_path):
    log, again = MetricsFile(("a",)), MetricsFile(("a",))
    log.run(tmp_path, {}, 0)
    for step in (1, 2, 3):
        log.step({"step": step, "loss": 0.5})
        assert [line.split(",")[0] for line in _lines(tmp_path)] == ["step", "1", "2", "3"][: step + 1]
    # As a run that is killed right after it was resumed from step 2, whose validation is made up for.
    again.run(tmp_path, {}, 2)
    assert [line.split(",")[0] for line in _lines(tmp_path)] == ["step", "1", "2"]
    again.validation(2, Validation(0.75, {"a": 0.75}))
    again.step({"step": 3, "loss": 0.25})
    again.validation(3, Validation(0.5, {"a": math.nan}))
    assert _lines(tmp_path)[2:] == ["2,,0.5,,0.75,0.75,,,,,", "3,,0.25,,0.5,,,,,,"] and not list(tmp_path.glob(".*"))
    for opened in (log, again):
        opened.end("finished")


def test_half_a_row_and_what_is_glued_to_it_are_dropped(tmp_path):
    log_steps(MetricsFile(), tmp_path, {1: 0.5, 2: 0.25})
    header, first, second = _lines(tmp_path)
    (tmp_path / "metrics.csv").write_text("\n".join([header, first, first[:5] + second, second, second[:5]]))
    assert [row["step"] for row in rows_up_to(tmp_path / "metrics.csv")] == ["1", "2"]


def test_a_folder_that_was_removed_is_made_again_and_told(tmp_path):
    said = []
    (tmp_path / "run").mkdir()
    files = run_files(say=said.append)
    with following(files, tmp_path / "run", {}, 0, lambda: "finished"):
        for step in (1, 2, 3):
            if step == 2:
                shutil.rmtree(tmp_path / "run")
            for each in files:
                each.step({"step": step, "loss": 0.5})
    assert [line.split(",")[0] for line in _lines(tmp_path / "run")] == ["step", "2", "3"]
    assert said == [f"{tmp_path}/run/metrics.csv is gone, and the values so far with it; a new one goes on from here"]
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_is_told_and_nobody_waits_for_it(tmp_path):
    threads = threading.active_count()
    log = TensorBoard()
    log.run(tmp_path, {}, 0)
    log.step({"step": 1, "loss": 0.5})
    records = log._events._py_recordio_writer
    records.close()
    with Path("/dev/full").open("wb", buffering=0) as records._writer:
        for step in range(2, 30):
            with pytest.raises(OutputError, match=r"tensorboard: cannot be written: No space left on device"):
                log.step({"step": step, "loss": 0.5})
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (41.6, "42 s"),
        (150, "2 min 30 s"),
        (119.7, "2 min"),
        (480, "8 min"),
        (599.8, "10 min"),
        (1020, "17 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_durations_as_a_person_says_them(seconds, expected):
    assert duration(seconds) == expected
