"""Patches: where they lie, what they hold, and that a resumed loader goes on exactly where it was."""

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.imaging.normalisation import CtWindow, MinMax, normalisation_for, normalisations
from mambahome_jax.patches.loader import draw_centre, make_loader, patch_start, read_patch
from mambahome_jax.patches.store import Store, StoreEntry, write_case, write_index


def make_store(root, shapes, label=None, modality="mr", body_box=None):
    """Store of one case a shape; image of noise around 100; label: two boxes, or what `label` gives for a shape."""
    entries = []
    for i, shape in enumerate(shapes):
        image = np.random.default_rng(i).normal(100, 20, (*shape, 1)).astype(np.float32)
        mask = np.zeros(shape, np.uint8)
        if label is None:
            mask[1:3, 1:3, 1:3], mask[-4:-1, -4:-1, -4:-1] = 1, 2
        else:
            mask = label(shape)
        entry = StoreEntry(
            id=f"c{i}",
            shape=shape,
            channels=1,
            spacing=(1.0, 1.0, 1.0),
            affine=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
            modality=modality,
            statistics=statistics(image),
            body_box=body_box or ((0, 0, 0), shape),
            class_counts=None,
        )
        entries.append(write_case(root, entry, image, mask))
    write_index(root, entries)
    return Store(root)


@pytest.fixture
def batches():
    """Function that gives the first n batches of a loader, and closes it."""
    iterators = []

    def first(loader, n, state=None):
        iterator = iter(loader)
        iterators.append(iterator)
        if state is not None:
            iterator.set_state(state)
        return list(itertools.islice(iterator, n))

    yield first
    for iterator in iterators:
        iterator.close()


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert set(one) == set(other) == {"image", "label", "case"}
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_a_batch_holds_normalised_crops_of_the_named_cases(tmp_path, batches):
    store = make_store(tmp_path, [(20, 24, 22), (18, 30, 25), (40, 17, 19)])
    for batch in batches(make_loader(store, store.cases, (16, 16, 16), 3, seed=1), 4):
        assert batch["image"].shape == (3, 16, 16, 16, 1)
        assert batch["label"].shape == (3, 16, 16, 16)
        assert [batch[key].dtype for key in ("image", "label", "case")] == [np.float32, np.int32, np.int32]
        for image, label, case in zip(batch["image"], batch["label"], batch["case"], strict=True):
            entry = store.entry(store.cases[case])
            whole = normalisation_for(entry.modality)(store.read_image(entry.id), entry.statistics)
            start = np.argwhere(whole == image[0, 0, 0])[0][:3]
            region = tuple(slice(a, a + 16) for a in start)
            np.testing.assert_array_equal(image, whole[region])
            np.testing.assert_array_equal(label, store.read_label(entry.id)[region])


def test_small_volumes_are_zero_padded_after_normalisation(tmp_path, batches):
    store = make_store(tmp_path, [(9, 20, 12)], modality="ct")
    (batch,) = batches(make_loader(store, store.cases, (16, 16, 16), 2), 1)
    entry = store.entry("c0")
    whole = CtWindow()(store.read_image("c0"), entry.statistics)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        # 16 - 9 = 7 voxels of padding, 4 before; 16 - 12 = 4, 2 before.
        inside = image[4:13, :, 2:14]
        first = np.argwhere((whole[0, :, 0] == inside[0, 0, 0]).all(axis=-1))[0, 0]
        np.testing.assert_array_equal(inside, whole[:, first : first + 16])
        assert np.count_nonzero(image) == np.count_nonzero(inside)
        assert np.count_nonzero(label) == np.count_nonzero(label[4:13, :, 2:14])


def test_every_case_comes_once_before_any_comes_again_in_changing_order(tmp_path, batches):
    store = make_store(tmp_path, [(16, 16, 16)] * 6)
    found = batches(make_loader(store, store.cases, (8, 8, 8), 2, seed=5), 9)
    rounds = np.concatenate([batch["case"] for batch in found]).reshape(3, 6)
    for order in rounds:
        assert sorted(order) == list(range(6))
    assert not (rounds[0] == rounds[1]).all() or not (rounds[1] == rounds[2]).all()


def test_same_seed_same_batches_another_seed_others(tmp_path, batches):
    store = make_store(tmp_path, [(20, 20, 20)] * 5)
    some = batches(make_loader(store, store.cases, (8, 8, 8), 2, seed=1), 6)
    assert_same(some, batches(make_loader(store, store.cases, (8, 8, 8), 2, seed=1), 6))
    other = batches(make_loader(store, store.cases, (8, 8, 8), 2, seed=2), 6)
    assert any((a["image"] != b["image"]).any() for a, b in zip(some, other, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_resumes_exactly(tmp_path, batches, taken):
    store = make_store(tmp_path, [(20, 20, 20)] * 5)
    loader = make_loader(store, store.cases, (8, 8, 8), 2, seed=4)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    following = list(itertools.islice(iterator, 6))
    iterator.close()
    fresh = make_loader(Store(tmp_path), store.cases, (8, 8, 8), 2, seed=4)
    assert_same(following, batches(fresh, 6, state))


@pytest.mark.slow
def test_processes_give_the_same_batches_and_resume_exactly(tmp_path, batches):
    store = make_store(tmp_path, [(20, 20, 20)] * 5)
    expected = batches(make_loader(store, store.cases, (8, 8, 8), 2, seed=4), 6)
    loader = make_loader(store, store.cases, (8, 8, 8), 2, seed=4, num_workers=2)
    iterator = iter(loader)
    found = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    assert_same(expected[:3], found)
    assert_same(expected[3:], batches(loader, 3, state))


def test_closing_ends_the_threads(tmp_path):
    store = make_store(tmp_path, [(20, 20, 20)])
    before = set(threading.enumerate())
    iterator = iter(make_loader(store, store.cases, (8, 8, 8), 2))
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_three_of_four_patches_are_centred_on_foreground_drawn_by_voxels(tmp_path):
    store = make_store(tmp_path, [(30, 30, 30)])
    label, rng = store.read_label("c0"), np.random.default_rng(0)
    found = np.bincount([label[tuple(draw_centre(store, "c0", rng, 0.75, False))] for _ in range(4000)], minlength=3)
    # Class 1 has 8 voxels, class 2 has 27; the other quarter hits them with probability 35 / 27000.
    np.testing.assert_allclose(found / 4000, [0.25, 0.75 * 8 / 35, 0.75 * 27 / 35], atol=0.03)


def test_class_balanced_centres(tmp_path):
    store = make_store(tmp_path, [(30, 30, 30)])
    label, rng = store.read_label("c0"), np.random.default_rng(0)
    found = np.bincount([label[tuple(draw_centre(store, "c0", rng, 1.0, True))] for _ in range(2000)], minlength=3)
    np.testing.assert_allclose(found / 2000, [0, 0.5, 0.5], atol=0.04)


def test_other_centres_lie_evenly_in_the_body_box(tmp_path):
    box = ((4, 0, 10), (9, 30, 12))
    store = make_store(tmp_path, [(30, 30, 30)], body_box=box)
    rng = np.random.default_rng(0)
    centres = np.array([draw_centre(store, "c0", rng, 0.0, False) for _ in range(3000)])
    np.testing.assert_array_equal([centres.min(axis=0), centres.max(axis=0) + 1], box)
    np.testing.assert_allclose(centres.mean(axis=0), [6, 14.5, 10.5], atol=0.5)


def test_case_without_foreground_gives_patches_of_background(tmp_path, batches):
    store = make_store(tmp_path, [(20, 20, 20)], label=lambda shape: np.zeros(shape, np.uint8))
    (batch,) = batches(make_loader(store, store.cases, (8, 8, 8), 4), 1)
    assert batch["image"].std() > 0.5
    assert not batch["label"].any()


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39)), min_size=3, max_size=3))
def test_window_lies_inside_where_it_fits_and_holds_its_centre(axes):
    size, shape = [a[0] for a in axes], [a[1] for a in axes]
    centre = [min(a[2], a[1] - 1) for a in axes]
    for first, n, whole, c in zip(patch_start(centre, size, shape), size, shape, centre, strict=True):
        if n <= whole:
            assert 0 <= first <= c < first + n <= whole
            if n // 2 <= c <= whole - n + n // 2:
                assert first == c - n // 2
        else:
            assert -first + whole <= n and abs((n - whole) + 2 * first) <= 1


def test_modality_can_be_overridden(tmp_path):
    store = make_store(tmp_path, [(20, 20, 20)], modality="ct")
    image, _ = read_patch(store, "c0", (10, 10, 10), (8, 8, 8), normalisations(override="us"))
    expected = MinMax()(store.read_image("c0", (6, 6, 6), (14, 14, 14)), store.entry("c0").statistics)
    np.testing.assert_array_equal(image, expected)


def test_wrong_arguments(tmp_path):
    store = make_store(tmp_path, [(20, 20, 20)])
    with pytest.raises(DatasetError, match="no case to train on"):
        make_loader(store, [], (8, 8, 8), 2)
    with pytest.raises(DatasetError, match="no case 'x'"):
        make_loader(store, ["x"], (8, 8, 8), 2)
    with pytest.raises(ConfigError, match="patch_size"):
        make_loader(store, store.cases, (8, 0, 8), 2)
    with pytest.raises(ConfigError, match="batch_size"):
        make_loader(store, store.cases, (8, 8, 8), 0)
    write_case(tmp_path, store.entry("c0"), store.read_image("c0"), None)
    write_index(tmp_path, [write_case(tmp_path, store.entry("c0"), store.read_image("c0"), None)])
    with pytest.raises(DatasetError, match="1 case has no label"):
        make_loader(Store(tmp_path), ["c0"], (8, 8, 8), 2)


def test_a_damaged_case_is_named(tmp_path, batches):
    store = make_store(tmp_path, [(20, 20, 20)])
    (tmp_path / "c0/image/zarr.json").write_text("{")
    with pytest.raises(DatasetError, match=r"c0: .*image: cannot be read"):
        batches(make_loader(store, store.cases, (8, 8, 8), 2), 1)


@pytest.mark.parametrize("parts", [2, 4])
def test_shares_of_a_batch_are_the_batch(tmp_path, batches, parts):
    store = make_store(tmp_path, [(20, 20, 20)] * 5)
    whole = batches(make_loader(store, store.cases, (8, 8, 8), 4, seed=3), 7)
    shares = [batches(make_loader(store, store.cases, (8, 8, 8), 4, seed=3, share=(n, parts)), 7) for n in range(parts)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*shares, strict=True)
    ]
    assert_same(whole, joined)


def test_the_state_of_a_share_is_that_of_the_whole(tmp_path, batches):
    store = make_store(tmp_path, [(20, 20, 20)] * 5)
    states = []
    for share in ((0, 1), (1, 2)):
        iterator = iter(make_loader(store, store.cases, (8, 8, 8), 4, seed=3, share=share))
        for _ in range(3):
            next(iterator)
        states.append(iterator.get_state())
        iterator.close()
    assert states[0] == states[1]
    with pytest.raises(ConfigError, match="a multiple of 3"):
        make_loader(store, store.cases, (8, 8, 8), 4, share=(0, 3))
