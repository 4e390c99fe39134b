"""What infer holds in memory beside the scan at work."""

import weakref

import numpy as np
import pytest

from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import InferConfig
from mambahome_jax.inference import batch
from mambahome_jax.inference.batch import InferRun, failure_reason
from mambahome_jax.inference.read_ahead import held_bytes, nbytes_of, read_ahead
from mambahome_jax.inference.result_files import ResultFiles
from mambahome_jax.inference.segment import Segmenter, SegmentOptions
from tests.commands.scans import write
from tests.inference.models import Levels

SHAPE = (20, 18, 12)
NBYTES = 4 * 20 * 18 * 12
PROPERTIES = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32))


def run_for(folder, cases, num_workers):
    for case in cases:
        write(folder / "in" / f"{case}.nii.gz", np.zeros(SHAPE, np.int16))
    config = InferConfig(folder / "in", folder / "model", folder / "out", num_workers=num_workers)
    segmenter = Segmenter.of(Levels((0.0, 1.0), metadata=PROPERTIES), SegmentOptions())
    return InferRun(config, segmenter, ResultFiles(config)), [
        Scan(case, folder / "in" / f"{case}.nii.gz") for case in cases
    ]


@pytest.mark.parametrize(
    ("num_workers", "held", "ahead"), [(1, 10 * NBYTES, 1), (3, 10 * NBYTES, 3), (3, 2 * NBYTES, 1), (3, 0, 0)]
)
def test_no_more_is_read_ahead_than_fits(tmp_path, num_workers, held, ahead):
    run, scans = run_for(tmp_path, "abcdef", num_workers)
    begun = []

    def read(scan):
        begun.append(scan.case)
        return run.read(scan)

    most = []
    for number, (scan, nbytes, reading) in enumerate(read_ahead(read, scans, num_workers, held)):
        assert nbytes == NBYTES
        volume, prepared, _ = reading.result()
        assert scan.case == "abcdef"[number]
        assert volume.array.dtype == np.int16 and prepared.kept is not None
        most.append(len(begun) - number - 1)
    # Reading begins in a thread, which may be late.
    assert max(most) <= ahead
    assert begun == list("abcdef") if num_workers == 1 else sorted(begun) == list("abcdef")


@pytest.mark.parametrize(
    ("available", "held"), [(None, 512 << 20), (2 << 30, 512 << 20), (64 << 30, 2 << 30), (1 << 40, 4 << 30)]
)
def test_more_is_read_ahead_where_memory_is_plentiful(monkeypatch, available, held):
    monkeypatch.setattr("mambahome_jax.inference.read_ahead.available_memory", lambda: available)
    assert held_bytes() == held


def test_a_large_scan_is_let_go_before_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))
    monkeypatch.setattr(batch, "held_bytes", lambda: 0)
    alive, read = [], batch.read_volume

    def watched(path, **options):
        assert not any(ref() is not None for ref in alive), "the scan before is still there"
        volume = read(path, **options)
        alive.append(weakref.ref(volume))
        return volume

    monkeypatch.setattr(batch, "read_volume", watched)
    run, _ = run_for(tmp_path, "abc", 2)
    assert infer.run(run.config) == 0
    assert len(alive) == 3


def test_a_scan_whose_header_cannot_be_read_counts_by_its_file(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(bytes(100))
    assert nbytes_of(Scan("a", tmp_path / "a.nrrd")) == 400
    assert nbytes_of(Scan("b", tmp_path / "b.nii.gz")) == 0


def test_a_failure_is_one_line():
    assert failure_reason(DatasetError("series:\n  1: 3 slices\n  2: 4 slices\n")) == "series: 1: 3 slices; 2: 4 slices"
    assert failure_reason(ValueError("a\nb")) == "ValueError: a; b"
