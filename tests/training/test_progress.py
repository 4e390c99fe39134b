"""metrics.csv and TensorBoard of a run that is killed, and on a disk that is full."""

import shutil
import threading
from pathlib import Path

import pytest

from mambahome_jax.errors import OutputError
from mambahome_jax.support.console import duration
from mambahome_jax.training.progress import FileLog, rows_up_to


def _lines(folder):
    return (folder / "metrics.csv").read_bytes().decode().splitlines()


def test_rows_are_in_the_file_before_anything_is_flushed_or_closed(tmp_path):
    log = FileLog(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step, "loss": 0.5})
    assert [line.split(",")[0] for line in _lines(tmp_path)] == ["step", "1", "2", "3"]
    # As a run that is killed right after it was resumed from step 2.
    again = FileLog(tmp_path, start=2)
    assert [line.split(",")[0] for line in _lines(tmp_path)] == ["step", "1", "2"]
    again.step({"step": 3, "loss": 0.25})
    assert _lines(tmp_path)[-1].startswith("3,") and not list(tmp_path.glob(".*"))
    for opened in (log, again):
        opened.__exit__()


def test_half_a_row_and_what_is_glued_to_it_are_dropped(tmp_path):
    with FileLog(tmp_path) as log:
        log.step({"step": 1, "loss": 0.5})
        log.step({"step": 2, "loss": 0.25})
    header, first, second = _lines(tmp_path)
    (tmp_path / "metrics.csv").write_text("\n".join([header, first, first[:5] + second, second, second[:5]]))
    assert [row["step"] for row in rows_up_to(tmp_path / "metrics.csv")] == ["1", "2"]


def test_a_folder_that_was_removed_is_made_again_and_told(tmp_path):
    said = []
    (tmp_path / "run").mkdir()
    log = FileLog(tmp_path / "run", say=said.append)
    log.step({"step": 1, "loss": 0.5})
    log.flush()
    shutil.rmtree(tmp_path / "run")
    log.step({"step": 2, "loss": 0.5})
    log.flush()
    log.step({"step": 3, "loss": 0.5})
    log.__exit__()
    assert [line.split(",")[0] for line in _lines(tmp_path / "run")] == ["step", "3"]
    assert said == [f"{tmp_path}/run/metrics.csv is gone, and the values so far with it; a new one goes on from here"]
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_is_told_and_nobody_waits_for_it(tmp_path):
    threads = threading.active_count()
    log = FileLog(tmp_path)
    log.step({"step": 1, "loss": 0.5})
    records = log._events._py_recordio_writer
    records.close()
    with Path("/dev/full").open("wb", buffering=0) as records._writer:
        for step in range(2, 30):
            with pytest.raises(OutputError, match=r"metrics\.csv: cannot be written: No space left on device"):
                log.step({"step": step, "loss": 0.5})
    log._file.close()
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
