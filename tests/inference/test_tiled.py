"""Tile by tile as from whole arrays: the sums of `sliding_window`, interpolated by SciPy and NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from mambahome_jax.config import DataProperties
from mambahome_jax.imaging.geometry import orientation_of, reorient, resample_to
from mambahome_jax.imaging.normalisation import CtWindow, MinMax, normalisation_for
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference import targets, tiled
from mambahome_jax.inference.ensemble import mirrored
from mambahome_jax.inference.segment import SegmentSettings, label, to_network_grid
from mambahome_jax.inference.sliding_window import sliding_window
from mambahome_jax.inference.tiled import Tiling
from tests.inference.models import Convolution, Levels
from tests.inference.test_segment import oriented_affine

ROI = (16, 16, 32)
MIRRORS = ((0, ((1, 2),)), (2, ()))


def network(seed, classes=4):
    """Its logits depend on the place in the window, so that every weight and every window counts."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(classes, 1, 3, 3, 3))
    return Convolution(weight, rng.normal(size=classes), rng.uniform(0.5, 1.5, ROI))


def scan(shape, orientation="RAS", spacing=(1.0, 1.2, 2.0), turn=0.0):
    values = np.random.default_rng(sum(shape)).integers(-400, 400, shape).astype(np.int16)
    return Volume(values, oriented_affine(orientation, spacing, turn))


def from_whole_arrays(models, prepared, settings):
    """Probabilities on the network's grid, and the logits of each class on the scan's own grid."""
    published = settings.chain == "published"
    each = [
        np.asarray(
            sliding_window(
                mirrored(model, settings.mirrors),
                prepared.image,
                ROI,
                settings.overlap,
                "constant" if published else "gaussian",
                settings.sw_batch_size,
                "constant",
            ),
            np.float64,
        )
        for model in models
    ]
    shares = np.mean([softmax(logits, axis=-1) for logits in each], axis=0)
    logits = Volume(each[0] if len(each) == 1 else np.log(shares), prepared.affine)
    grid = (prepared.oriented.affine, prepared.oriented.shape)
    there = resample_to(logits, *grid, "nearest" if published else "linear")
    return shares, reorient(there, orientation_of(prepared.file_affine)).array


def assert_same_labels(found, logits):
    two = np.sort(logits, axis=-1)[..., -2:]
    clear = two[..., 1] - two[..., 0] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], logits.argmax(axis=-1)[clear])


@pytest.fixture(params=[tiled.FINE, tiled.COARSE], ids=["fine", "coarse"])
def parts(request, monkeypatch):
    """Tiles as on a CPU, and as on a GPU."""
    monkeypatch.setattr(tiled, "parts_for", lambda device: request.param)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("chain", ["trained", "published"])
@pytest.mark.parametrize(
    ("volume", "spacing", "overlap", "members", "mirrors"),
    [
        (scan((37, 30, 41)), (1.7, 1.1, 1.3), 0.5, 1, ()),
        (scan((21, 40, 33), "PSR"), (0.7, 1.5, 1.6), 0.25, 1, MIRRORS),
        (scan((70, 18, 20), "LIP"), None, 0.6, 2, ()),
        (scan((9, 12, 11), "AIL", (3.0, 1.0, 0.8)), (1.0, 1.0, 1.0), (0.5, 0.1, 0.7), 3, MIRRORS),
        (scan((24, 25, 26), "RAS", turn=0.3), (1.3, 1.3, 1.3), 0, 1, ()),
    ],
)
def test_labels_and_probabilities(volume, spacing, overlap, members, mirrors, chain):
    models = [network(seed) for seed in range(members)]
    settings = SegmentSettings(spacing, "RAS", CtWindow(), ROI, overlap, 3, chain, mirrors)
    prepared = to_network_grid(volume, settings)
    shares, logits = from_whole_arrays(models, prepared, settings)
    kept = []
    result = label(models, prepared, with_probabilities=kept.append)
    np.testing.assert_array_equal(result.affine, volume.affine)
    assert_same_labels(result.array, logits)
    np.testing.assert_allclose(kept[0], shares, rtol=1e-3, atol=1e-5)

    by_slabs = to_network_grid(volume, settings, whole_bytes=0)
    assert prepared.kept is not None and by_slabs.kept is None
    np.testing.assert_array_equal(by_slabs.image, prepared.image)
    slabbed = label(models, by_slabs, device_bytes=0)
    np.testing.assert_array_equal(slabbed.array, result.array)


@pytest.mark.parametrize("chain", ["trained", "published"])
@pytest.mark.parametrize(
    ("orientation", "spacing", "shear", "points"),
    [
        ("RAS", (1.3, 1.3, 1.3), [(0, 1, 0.3)], None),
        ("LPS", (1.3, 1.1, 4.0), [(1, 2, 0.8)], None),  # as a tilted gantry has it
        ("PSR", (0.6, 0.7, 1.2), [(0, 1, -0.4), (0, 2, 0.5), (2, 1, 0.2)], None),
        ("RAS", (2.9, 3.1, 3.3), [(2, 0, -0.6)], (150, 700)),  # a voxel of the network has many of the scan
    ],
)
def test_sheared_axes(monkeypatch, chain, orientation, spacing, shear, points):
    if points is not None:
        if chain == "published":
            pytest.skip("an odd size puts voxels halfway between two, where the nearest one is up to rounding")
        monkeypatch.setattr(targets, "_POINTS", points[0])
        monkeypatch.setattr(targets, "_LOOKED", points[1])
    straight = scan((24, 25, 26), orientation, turn=0.2)
    affine = straight.affine.copy()
    for axis, along, share in shear:
        affine[:3, along] += share * affine[:3, axis]
    volume, settings = Volume(straight.array, affine), SegmentSettings(spacing, "RAS", CtWindow(), ROI, 0.5, 2, chain)
    prepared = to_network_grid(volume, settings)
    models = [network(0), network(1)]
    _, logits = from_whole_arrays(models, prepared, settings)
    found = label(models, prepared)
    assert found.shape == volume.shape and found.array.dtype == np.uint8
    assert_same_labels(found.array, logits)


@pytest.mark.parametrize("share", [0, 0.4])
def test_many_classes_need_two_bytes(share):
    affine = np.eye(4)
    affine[0, 1] = share
    prepared = to_network_grid(
        Volume(scan((16, 17, 18)).array, affine), SegmentSettings((1.5, 1.5, 1.5), "RAS", CtWindow(), ROI)
    )
    found = label(network(0, 300), prepared)
    assert found.array.dtype == np.uint16 and found.array.max() > 255


@pytest.mark.parametrize("modality", ["ct", "mr", "us"])
@pytest.mark.parametrize("chain", ["trained", "published"])
@pytest.mark.parametrize("axis", range(3))
def test_slabs_of_the_image_are_those_of_the_whole(modality, chain, axis):
    volume = Volume(np.stack([scan((21, 17, 13)).array, scan((21, 17, 13)).array * 2], -1), scan((21, 17, 13)).affine)
    settings = SegmentSettings((0.7, 1.9, 1.5), "PSR", normalisation_for(modality), ROI, chain=chain)
    prepared = to_network_grid(volume, settings, whole_bytes=0)
    planes = [prepared.slab(axis, k, min(k + 4, prepared.shape[axis])) for k in range(0, prepared.shape[axis], 4)]
    whole = to_network_grid(volume, settings)
    np.testing.assert_array_equal(np.concatenate(planes, axis), whole.image)
    assert whole.image.dtype == np.float32


def test_the_network_is_not_asked_for_more_than_a_slab():
    asked = []

    class Watched:
        def __init__(self, prepared):
            self.prepared = prepared

        def __getattr__(self, name):
            return getattr(self.prepared, name)

        def slab(self, axis, start, stop):
            asked.append((axis, stop - start))
            return self.prepared.slab(axis, start, stop)

    settings = SegmentSettings(None, "RAS", CtWindow(), ROI)
    volume = scan((30, 40, 200))
    label(network(0), Watched(to_network_grid(volume, settings, whole_bytes=0)))
    assert {axis for axis, _ in asked} == {2}
    assert sum(planes for _, planes in asked) == 200
    assert max(planes for _, planes in asked) <= 48


def test_few_tiles_are_alive(monkeypatch):
    most = []

    add = tiled.Tiles.add

    def counted(self, predicted, corners):
        done = add(self, predicted, corners)
        most.append(sum(total.nbytes + weight.nbytes for total, weight in self.alive.values()))
        return done

    monkeypatch.setattr(tiled.Tiles, "add", counted)
    settings = SegmentSettings(None, "RAS", CtWindow(), ROI)
    label(network(0), to_network_grid(scan((18, 20, 400)), settings))
    tiling = Tiling((18, 20, 400), ROI)
    assert max(most) <= tiling.bytes_alive(4)
    # A window's depth is 32 of 400 planes, and tiles reach beyond the volume.
    assert tiling.bytes_alive(4) < 0.2 * 4 * 5 * 24 * 24 * 400


def test_large_volumes_are_walked_along_their_longest_axis():
    assert Tiling((100, 90, 400), (96, 96, 96)).axis == 2
    assert Tiling((400, 100, 100), (96, 96, 96)).axis == 2
    large = Tiling((1000, 512, 512), (96, 96, 96))
    assert large.axis == 0 and large.edge == (24, 48, 48)
    coarse = Tiling((512, 512, 333), (192, 192, 48), tiled.COARSE)
    assert coarse.edge == (192, 192, 24) and coarse.bytes_alive(16) < 2.5 * 2**30
    # 16 classes need less than half of a bound of 6 GiB.
    assert large.bytes_alive(16) < 3 * 2**30
    assert Tiling((20, 60, 40), ROI, few=0).axis == 1


def test_more_than_256_classes_need_two_bytes():
    def predict(windows):
        return jnp.concatenate([jnp.zeros((*windows.shape[:4], 299)), windows[..., :1]], axis=-1)

    settings = SegmentSettings(None, "RAS", MinMax(), (16, 16, 16))
    values = np.zeros((8, 8, 8), np.float32)
    values[2, 3, 4] = 1
    result = label(predict, to_network_grid(Volume(values, np.eye(4)), settings)).array
    assert result.dtype == np.uint16
    assert result[2, 3, 4] == 299 and result.sum() == 299


def test_levels_on_a_grid_of_half_the_size():
    model = Levels((0.0, 0.5, 1.0), metadata=DataProperties(spacing=None))
    coarse = np.random.default_rng(0).integers(0, 3, (12, 10, 9))
    values = np.asarray((-175, 37.5, 250), np.float32)[coarse]
    settings = SegmentSettings((0.5, 0.5, 0.5), "LAS", CtWindow(), ROI)
    result = label(model, to_network_grid(Volume(values, np.eye(4)), settings))
    np.testing.assert_array_equal(result.array, coarse)
