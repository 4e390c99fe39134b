"""The patch store gives back what was written, by regions, and survives interrupted writes."""

import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import volume
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.imaging.volume import count_values
from mambahome_jax.patches import store as store_module
from mambahome_jax.patches.store import (
    Store,
    StoreEntry,
    ct_scale,
    foreground_positions,
    read_entry,
    write_case,
    write_index,
)


def make_case(root: Path, name: str, shape=(70, 20, 9), channels=1, labelled=True, seed=0):
    """Write one case of noise with three labels; returns (entry, image, label)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*shape, channels)).astype(np.float32)
    label = rng.choice(np.array([0, 1, 2, 7], np.uint8), size=shape, p=[0.7, 0.2, 0.09, 0.01])
    entry = StoreEntry(
        id=name,
        shape=shape,
        channels=channels,
        spacing=(0.8, 0.8, 3.0),
        affine=tuple(tuple(map(float, row)) for row in np.diag([0.8, 0.8, 3, 1])),
        modality="mr",
        statistics=statistics(image),
        body_box=((0, 0, 0), shape),
        class_counts=None,
        fingerprint={"version": 1},
    )
    return write_case(root, entry, image, label if labelled else None), image, label


@pytest.fixture
def two_cases(tmp_path):
    """A store of case a (one channel, labelled) and case b (two channels, unlabelled), with their arrays."""
    a, image_a, label_a = make_case(tmp_path / "store", "a")
    b, image_b, _ = make_case(tmp_path / "store", "b", (8, 9, 10), channels=2, labelled=False, seed=1)
    write_index(tmp_path / "store", [a, b])
    return Store(tmp_path / "store"), image_a, label_a, image_b


def test_reads_back_whole_arrays_and_entries(two_cases, tmp_path):
    store, image_a, label_a, image_b = two_cases
    assert store.cases == ("a", "b")
    np.testing.assert_array_equal(store.read_image("a"), image_a)
    np.testing.assert_array_equal(store.read_label("a"), label_a)
    np.testing.assert_array_equal(store.read_image("b"), image_b)
    assert (store.read_image("a").dtype, store.read_label("a").dtype) == (np.float32, np.uint8)
    entry = store.entry("a")
    assert entry == read_entry(tmp_path / "store", "a")
    assert entry.class_counts == {value: int((label_a == value).sum()) for value in (0, 1, 2, 7)}
    assert entry.foreground_counts == {value: int((label_a == value).sum()) for value in (1, 2, 7)}
    assert entry.statistics.mean == (pytest.approx(float(image_a.mean()), abs=1e-6),)
    assert store.entry("b").class_counts is None
    assert Store(tmp_path).cases == ("a", "b")


def test_regions_are_cut_to_the_volume(two_cases):
    store, image, label, _ = two_cases
    np.testing.assert_array_equal(store.read_image("a", (60, 3, 2), (68, 19, 9)), image[60:68, 3:19, 2:9])
    np.testing.assert_array_equal(store.read_label("a", (-5, -1, 4), (3, 30, 20)), label[:3, :, 4:])
    assert store.read_label("a", (80, 0, 0), (90, 5, 5)).shape == (0, 5, 5)
    assert store.read_label("a", (-9, 0, 0), (-2, 5, 5)).shape == (0, 5, 5)


@settings(max_examples=30)
@given(st.data())
def test_any_region_equals_the_slice(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "any_region"
    if not root.exists():
        write_index(root, [make_case(root, "a", (70, 66, 5))[0]])
    store = Store(root)
    image = np.random.default_rng(0).normal(size=(70, 66, 5, 1)).astype(np.float32)
    start = [data.draw(st.integers(0, n - 1)) for n in (70, 66, 5)]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, (70, 66, 5), strict=True)]
    region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(store.read_image("a", tuple(start), tuple(stop)), image[region])


def test_a_volume_of_several_chunks_is_one_file_and_a_patch_needs_few_of_its_bytes(tmp_path):
    entry, image, _ = make_case(tmp_path, "a", (130, 130, 65))
    write_index(tmp_path, [entry])
    files = [path for path in (tmp_path / "a/image").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["0", "zarr.json"]
    # Chunks that are not needed may be damaged: only those that the patch touches are read.
    (shard,) = (path for path in files if path.name == "0")
    content = bytearray(shard.read_bytes())
    np.testing.assert_array_equal(Store(tmp_path).read_image("a", (0, 0, 0), (64, 64, 64)), image[:64, :64, :64])
    content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)
    shard.write_bytes(content)
    np.testing.assert_array_equal(Store(tmp_path).read_image("a", (0, 0, 0), (64, 64, 64)), image[:64, :64, :64])
    # Neither with all of TensorStore's settings, nor with advice by which the case would be kept as it is.
    with pytest.raises(DatasetError, match=r"a: .*image: cannot be read .*again with --overwrite") as caught:
        Store(tmp_path).read_image("a")
    assert "spec" not in str(caught.value)


def test_foreground_positions(two_cases):
    store, _, label, _ = two_cases
    found = {value: store.class_positions("a", value) for value in store.entry("a").foreground_counts}
    assert list(found) == [1, 2, 7]
    for value, positions in found.items():
        assert positions.dtype == np.int32
        np.testing.assert_array_equal(positions, np.argwhere(label == value))


def test_sample_of_foreground_positions_is_even_and_always_the_same():
    label = np.zeros((40, 40, 40), np.uint8)
    label[:20], label[20, 0, :3] = 1, 5
    found = foreground_positions(label, limit=1000)
    assert {value: len(positions) for value, positions in found.items()} == {1: 1000, 5: 3}
    assert len(np.unique(found[1], axis=0)) == 1000
    np.testing.assert_allclose(found[1].mean(axis=0), [9.5, 19.5, 19.5], atol=1.5)
    np.testing.assert_array_equal(found[1], foreground_positions(label, limit=1000)[1])
    assert foreground_positions(np.zeros((2, 2, 2), np.uint8)) == {}


def test_counts_of_values_in_slabs(monkeypatch):
    monkeypatch.setattr(volume, "_SLAB", 7)
    label = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint16)
    label[0, 0, 0] = 900
    assert count_values(label) == dict(zip(*map(np.ndarray.tolist, np.unique(label, return_counts=True)), strict=True))


def test_pickles_and_is_read_by_several_threads(two_cases):
    store, image, *_ = two_cases
    copy = pickle.loads(pickle.dumps(store))
    starts = [(i % 60, i % 15, i % 5) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda s: copy.read_image("a", s, (s[0] + 9, s[1] + 4, s[2] + 3)), starts)
    for (i, j, k), part in zip(starts, parts, strict=True):
        np.testing.assert_array_equal(part, image[i : i + 9, j : j + 4, k : k + 3])


def test_one_thread_at_a_time_parses_headers(two_cases, monkeypatch):
    """CPython 3.11 raises SystemError where two threads parse source at once, which NumPy does to read a header."""
    running, together, load = threading.Semaphore(1), [], np.load

    def slow_load(*args, **kwargs):
        together.append(not running.acquire(blocking=False))
        time.sleep(0.02)
        running.release()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", slow_load)
    stores = [Store(two_cases[0].root) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: stores[n % 2].class_positions("a", (1, 2, 7)[n % 3]), range(6)))
    assert len(together) >= 4 and not any(together)


def test_open_arrays_are_bounded(two_cases, monkeypatch):
    store, image_a, _, image_b = two_cases
    monkeypatch.setattr(store_module, "_CACHED", 1)
    store = Store(store.root)
    for _ in range(2):
        np.testing.assert_array_equal(store.read_image("a"), image_a)
        np.testing.assert_array_equal(store.read_image("b"), image_b)
        assert store._arrays.cache_info().currsize == 1


def test_replacing_a_case_leaves_nothing_of_the_old_one(tmp_path):
    make_case(tmp_path, "a")
    entry, image, _ = make_case(tmp_path, "a", (5, 6, 7), labelled=False, seed=3)
    write_index(tmp_path, [entry])
    np.testing.assert_array_equal(Store(tmp_path).read_image("a"), image)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["case.json", "image"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "index.json"]


def test_interrupted_write_keeps_the_old_case(tmp_path, monkeypatch):
    old, image, _ = make_case(tmp_path, "a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "foreground_positions", fail)
        with pytest.raises(OutputError, match="a: cannot be written: No space left on device"):
            make_case(tmp_path, "a", seed=9)
    assert read_entry(tmp_path, "a") == old
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    write_index(tmp_path, [old])
    np.testing.assert_array_equal(Store(tmp_path).read_image("a"), image)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        make_case(tmp_path / "file", "a")


def test_unknown_case_and_missing_label(two_cases):
    store, *_ = two_cases
    with pytest.raises(DatasetError, match="no case 'c' among 2"):
        store.read_image("c")
    with pytest.raises(DatasetError, match=r"b: .*: has no label"):
        store.read_label("b")


def test_damaged_index_and_case(tmp_path):
    entry, *_ = make_case(tmp_path, "a")
    with pytest.raises(DatasetError, match=r"index\.json: no such file"):
        Store(tmp_path)
    write_index(tmp_path, [entry])
    (tmp_path / "a/foreground.npz").unlink()
    with pytest.raises(DatasetError, match=r"foreground\.npz: cannot be read .*Run preprocess"):
        Store(tmp_path).class_positions("a", 1)
    (tmp_path / "a/case.json").write_text("{}")
    assert read_entry(tmp_path, "a") is None
    assert read_entry(tmp_path, "b") is None
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(content | {"version": 0}))
    with pytest.raises(DatasetError, match="version 0; expected version 1"):
        Store(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(content | {"cases": [{"id": "a"}]}))
    with pytest.raises(DatasetError, match=r"damaged \(KeyError"):
        Store(tmp_path)


def _half_a_header(content):
    return b"\x93NUMPY\x01\x00\x0b\x00{'descr': (\n"


def _cut(content):
    return content[: len(content) // 2]


def _flipped(content):
    return content[:200] + bytes([content[200] ^ 0xFF]) + content[201:]


@pytest.mark.parametrize("damage", [_cut, _flipped, lambda _: b"", lambda _: b"PK\3\4 nothing", _half_a_header])
@pytest.mark.parametrize("name", ["foreground.npz", "intensities.npy"])
def test_damaged_arrays_of_a_case_are_named(tmp_path, name, damage):
    entry, *_ = make_case(tmp_path, "a")
    write_index(tmp_path, [entry])
    file = tmp_path / "a" / name
    if name == "intensities.npy":
        np.save(file, np.ones((200, 1), np.float32))
        if damage is _flipped:
            pytest.skip("a file without a checksum")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DatasetError, match=rf"^a: .*{name}: cannot be read .*Run preprocess"):
        Store(tmp_path).class_positions("a", 1) if name == "foreground.npz" else ct_scale(tmp_path, ["a"])


def test_fingerprint_survives_json(tmp_path):
    entry, image, label = make_case(tmp_path, "a")
    fingerprint = {"sources": [["/x", 3, 1795437911356037759]], "spacing": None, "labels": {"1": "a"}}
    write_case(tmp_path, replace(entry, fingerprint=fingerprint), image, label)
    assert read_entry(tmp_path, "a").fingerprint == fingerprint
