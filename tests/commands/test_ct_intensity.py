"""CT normalised by the dataset's own percentiles: the same numbers from preprocess to training and inference."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.imaging.normalisation import CtScale, CtWindow, normalisations
from mambahome_jax.imaging.volume import read_labels, read_volume
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, to_network_grid
from mambahome_jax.patches.loader import read_patch
from mambahome_jax.patches.store import INTENSITIES, SAMPLE, Store, ct_scale, foreground_sample
from mambahome_jax.training.setup import make_setup
from tests.commands.scans import description, preprocess_config, scan, write

SCALE = CtScale((-50.0,), (400.0,), (90.0,), (60.0,))


class Trained:
    """What inference asks a model."""

    def __init__(self, metadata):
        self.metadata = metadata

    def __call__(self, windows):
        raise NotImplementedError


@pytest.fixture
def config(tmp_path):
    return replace(preprocess_config(tmp_path), ct_intensity="percentiles")


def labelled_values(config, names):
    """Values of the labelled voxels on the network's grid, of each case."""
    found = []
    for name in names:
        image, label = (config.output_path / f"{kind}/{name}.nii.gz" for kind in ("images", "labels"))
        found.append(read_volume(image).array[read_labels(label).array > 0])
    return found


def test_numbers_are_those_of_the_labelled_voxels(config, capsys):
    assert run(config) == 0
    found = description(config)["ct_scale"]
    values = np.concatenate(labelled_values(config, "abc"))
    # All three have the same number of labelled voxels, so that no weights enter.
    assert found["low"] + found["high"] == pytest.approx(np.percentile(values, (0.5, 99.5)), abs=1)
    assert found["mean"] + found["std"] == pytest.approx([values.mean(), values.std()], rel=1e-3)
    assert "CT is normalised by its labelled voxels" in capsys.readouterr().out
    assert read_prepared(config.output_path).ct_normalisation == CtScale.from_json(found)


def test_every_case_counts_the_same_and_test_cases_do_not(config):
    rows = ["image,label,split,modality"]
    for name, split, modality in (("a", "train", "ct"), ("b", "", "ct"), ("c", "test", "ct"), ("d", "train", "mr")):
        rows.append(f"images/{name}.nii.gz,labels/{name}.nii.gz,{split},{modality}")
    image, label = scan(seed=1)
    write(config.input_path / "images/b.nii.gz", image + 1000)
    write(config.input_path / "labels/b.nii.gz", label * (np.arange(16) < 4)[:, None])
    write(config.input_path / "images/d.nii.gz", image * 0 + 3000)
    write(config.input_path / "labels/d.nii.gz", label)
    (config.input_path / "cases.csv").write_text("\n".join(rows))
    assert run(config) == 0
    a, b = labelled_values(config, "ab")
    assert len(b) < len(a) / 2
    assert description(config)["ct_scale"]["mean"] == pytest.approx([(a.mean() + b.mean()) / 2], rel=1e-3)


def test_changing_it_does_no_case_again_but_those_of_earlier_versions(config, capsys):
    assert run(replace(config, ct_intensity="window")) == 0
    assert "ct_scale" not in description(config)
    capsys.readouterr()
    assert run(config) == 0 and "3 of 3 cases up to date" in capsys.readouterr().out
    (config.output_path / f"store/b/{INTENSITIES}").unlink()
    assert run(replace(config, ct_intensity="window")) == 0
    assert "3 of 3 cases up to date" in capsys.readouterr().out and "ct_scale" not in description(config)
    assert run(config) == 0 and "2 of 3 cases up to date" in capsys.readouterr().out
    assert len(description(config)["ct_scale"]["low"]) == 1


def test_where_there_is_nothing_to_take_them_from(config, capsys):
    with pytest.raises(ConfigError, match="no CT with a label"):
        run(replace(config, modality="mr"))
    for name in "abc":
        write(config.input_path / f"labels/{name}.nii.gz", scan()[1] * 0)
    assert run(config) == 0
    assert "no voxel of a CT is labelled" in capsys.readouterr().out and "ct_scale" not in description(config)


def test_training_and_inference_see_the_same(config):
    assert run(config) == 0
    prepared = read_prepared(config.output_path)
    flags = TrainConfig(config.output_path, model="MambaHoME_tiny", steps=3)
    setup = make_setup(flags, prepared, None, devices=1)
    assert setup.properties.ct_normalisation == prepared.ct_normalisation
    resumed = json.loads(json.dumps(setup.settings()))
    assert CtScale.from_json(resumed["ct_scale"]) == prepared.ct_normalisation
    properties = DataProperties.from_json(json.loads(json.dumps(setup.properties.to_json())))
    assert properties == setup.properties
    settings = Segmenter.of(Trained(properties), SegmentOptions()).settings
    seen = to_network_grid(read_volume(config.input_path / "images/a.nii.gz"), settings)
    normalise = normalisations(properties.ct_normalisation)
    patch, _ = read_patch(Store(config.output_path), "a", (8, 8, 4), seen.shape, normalise)
    np.testing.assert_array_equal(seen.image, patch)
    by_slabs = to_network_grid(read_volume(config.input_path / "images/a.nii.gz"), settings, whole_bytes=0)
    np.testing.assert_array_equal(seen.image, by_slabs.image)
    assert seen.image.min() < -1 and seen.image.max() > 0.5
    with pytest.raises(ConfigError, match="intensities of CT"):
        Ensemble.of([Trained(properties), Trained(replace(properties, ct_normalisation=CtWindow()))])


def test_normalise_by_the_scale():
    values = np.array([-1000.0, -50, 90, 150, 400, 3000], np.float32).reshape(1, 2, 3, 1)
    expected = np.array([-140, -140, 0, 60, 310, 310], np.float32).reshape(1, 2, 3, 1) / 60
    np.testing.assert_allclose(normalisations(SCALE)["ct"](values, None), expected, rtol=1e-6)
    stats = statistics(values)
    for modality in ("mr", "us"):
        with_scale, without = normalisations(SCALE)[modality], normalisations()[modality]
        np.testing.assert_array_equal(with_scale(values, stats), without(values, stats))
    with pytest.raises(ConfigError, match="1 channel for a scan of 2"):
        SCALE(np.zeros((1, 1, 1, 2)))


@pytest.mark.parametrize(
    "change",
    [{"std": [0.0]}, {"low": [5000.0]}, {"mean": []}, {"mean": [1, 2]}, {"mean": None}, {"low": ["x"]}, {"std": 1.0}],
)
def test_damaged_numbers_in_files(config, change):
    assert run(config) == 0
    content = description(config)
    content["ct_scale"] |= change
    (config.output_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="damaged"):
        read_prepared(config.output_path)
    with pytest.raises(ConfigError, match="ct_scale"):
        DataProperties.from_json({"ct_scale": content["ct_scale"]})


def test_samples(tmp_path):
    image = np.arange(2 * 3 * 4 * 2, dtype=np.float32).reshape(2, 3, 4, 2)
    label = np.zeros((2, 3, 4), np.uint8)
    assert foreground_sample(image, label).shape == (0, 2)
    label[0, 0, 1], label[1, 2, 3] = 1, 7
    sample = foreground_sample(image, label)
    values, counts = np.unique(sample, axis=0, return_counts=True)
    assert values.tolist() == [[2, 3], [46, 47]] and counts.tolist() == [SAMPLE / 2] * 2
    with pytest.raises(DatasetError, match=r"intensities\.npy"):
        ct_scale(tmp_path, ["a"])
