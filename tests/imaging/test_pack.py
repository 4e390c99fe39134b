"""What is packed in threads: one gzip member that every reader takes, the same however many threads there are."""

import gzip
import shutil
import subprocess
import sys
import threading
import time
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.imaging import deflate, pack
from mambahome_jax.imaging.pack import fortran_bytes, gzipped, parts_of
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from tests.imaging.engines import ENGINES


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(deflate, "engine", request.param)
    return request.param


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=3, max_size=4),
    axes=st.permutations(range(4)),
    flips=st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint32, np.float32, np.float64]),
    part=st.sampled_from([1, 100, 1 << 22]),
    block=st.sampled_from([1, 50, 1 << 16]),
)
def test_any_memory_order_in_parts_of_any_size(shape, axes, flips, dtype, part, block):
    axes = [axis for axis in axes if axis < len(shape)]
    values = np.random.default_rng(0).integers(0, 255, [shape[axis] for axis in axes]).astype(dtype)
    array = values.transpose(np.argsort(axes))[tuple(slice(None, None, flip) for flip in flips[: len(shape)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_PART", part)
        patch.setattr(pack, "_BLOCK", block)
        expected = array.tobytes(order="F")
        assert b"".join(map(fortran_bytes, parts_of(array))) == expected
        assert gzip.decompress(b"".join(gzipped(b"head", array))) == b"head" + expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_the_same_bytes_with_any_number_of_threads(engine, monkeypatch, dtype):
    monkeypatch.setattr(pack, "_PART", 1 << 14)
    array = np.random.default_rng(0).normal(0, 3, (40, 50, 60)).astype(dtype)
    found = []
    for count in (1, 2, 3, 8, 1):
        monkeypatch.setattr(pack, "threads", lambda count=count: count)
        found.append(b"".join(gzipped(b"head", array)))
    assert len(set(found)) == 1
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    assert unpacker.decompress(found[0]) == b"head" + array.tobytes(order="F")
    assert unpacker.eof and not unpacker.unused_data


def test_every_reader_takes_it(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_PART", 1 << 14)
    array = np.random.default_rng(0).integers(-1000, 1000, (40, 50, 60), np.int16)
    path = tmp_path / "scan.nii.gz"
    write_volume(path, Volume(array, np.diag([-1.0, -1.0, 2.0, 1.0])))
    np.testing.assert_array_equal(read_volume(path).array, array)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), array)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), array.T)
    if shutil.which("gzip"):
        subprocess.run(["gzip", "--test", str(path)], check=True)


def test_few_parts_are_in_memory_and_no_thread_stays(monkeypatch):
    monkeypatch.setattr(pack, "_PART", 1)
    monkeypatch.setattr(pack, "_LEAST_SLICES", 1)
    monkeypatch.setattr(pack, "threads", lambda: 3)
    begun: list[int] = []

    def deflated(content, *, noise):
        begun.append(content.nbytes)
        return b""

    monkeypatch.setattr(deflate, "deflated", deflated)
    before = threading.active_count()
    pieces = gzipped(b"head", np.zeros((2, 2, 200), np.uint8))
    next(pieces)
    for taken in range(50):
        next(pieces)
        time.sleep(0.001)
        # Those that were taken, and what three threads have begun or wait to hand over.
        assert len(begun) <= taken + 1 + 3
    pieces.close()
    assert threading.active_count() == before


def test_a_worker_process_packs_alone(monkeypatch):
    assert 1 <= pack.threads() <= 8
    monkeypatch.setattr(pack.multiprocessing, "parent_process", lambda: object())
    assert pack.threads() == 1


def test_without_isal_zlib_serves():
    code = "import sys; sys.modules['isal'] = None; from mambahome_jax.imaging import deflate; print(deflate.engine)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("<module 'zlib'")
