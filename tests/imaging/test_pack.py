"""What is packed in threads: one gzip member that every reader takes, the same however many threads there are."""

import gzip
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.imaging import nifti
from mambahome_jax.imaging.nifti import fortran_bytes, parts_of
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume

try:
    from isal import igzip_threaded
except ImportError:
    igzip_threaded = None

WITHOUT_ISAL = pytest.mark.skipif(igzip_threaded is None, reason="isal is not installed")


@pytest.fixture(params=[pytest.param(gzip, id="gzip"), pytest.param(igzip_threaded, id="isal", marks=WITHOUT_ISAL)])
def engine(request, monkeypatch):
    monkeypatch.setattr(nifti, "packer", request.param)
    return request.param


def with_target(packing, array) -> None:
    with packing as target:
        target.write(array)


def written(path: Path, array: np.ndarray) -> bytes:
    write_volume(path, Volume(array, np.eye(4)))
    return path.read_bytes()


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
        patch.setattr(nifti, "_PART", part)
        patch.setattr(nifti, "_BLOCK", block)
        assert b"".join(map(fortran_bytes, parts_of(array))) == array.tobytes(order="F")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_the_same_bytes_with_any_number_of_threads(engine, monkeypatch, tmp_path, dtype):
    array = np.random.default_rng(0).normal(0, 3, (100, 150, 160)).astype(dtype)
    found = []
    for count in (1, 2, 3, 8, 1):
        monkeypatch.setattr(nifti, "threads", lambda count=count: count)
        found.append(written(tmp_path / "a.nii.gz", array))
    assert len(set(found)) == 1
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    assert unpacker.decompress(found[0])[352:] == array.tobytes(order="F")
    assert unpacker.eof and not unpacker.unused_data


def test_every_reader_takes_it(engine, tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (140, 150, 160), np.int16)
    path = tmp_path / "scan.nii.gz"
    write_volume(path, Volume(array, np.diag([-1.0, -1.0, 2.0, 1.0])))
    np.testing.assert_array_equal(read_volume(path).array, array)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), array)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), array.T)
    if shutil.which("gzip"):
        subprocess.run(["gzip", "--test", str(path)], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_leaves_no_thread(engine, monkeypatch):
    monkeypatch.setattr(nifti, "threads", lambda: 3)
    before = threading.active_count()
    array = np.random.default_rng(0).integers(0, 255, (100, 200, 300), np.uint8)
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        with_target(nifti.packing(file), array)
    assert threading.active_count() == before


def test_a_worker_process_packs_alone(monkeypatch):
    assert 1 <= nifti.threads() <= 8
    monkeypatch.setattr(nifti.multiprocessing, "parent_process", lambda: object())
    assert nifti.threads() == 1


def test_without_isal_the_standard_library_serves():
    code = "import sys; sys.modules['isal'] = None; from mambahome_jax.imaging.nifti import deflate as d, packer as p"
    code += "; print(d, p)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("<module 'zlib'") and "<module 'gzip'" in shown
