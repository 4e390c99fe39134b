"""preprocess --resampling: what it decides in the folder, the plan, the checkpoint and at inference."""

import json
from dataclasses import replace

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands.preprocess import run
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.imaging.geometry import reorient, resample
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, to_network_grid
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.plan_folder import planned_settings
from tests.commands.scans import preprocess_config


@pytest.fixture
def config(tmp_path):
    return replace(preprocess_config(tmp_path), spacing=None, modality="mr")


def settings(config) -> dict:
    return json.loads((config.output_path / "plan.json").read_text())


def set_by_hand(config, name, value) -> None:
    plan = settings(config)
    plan[name]["value"] = value
    (config.output_path / "plan.json").write_text(json.dumps(plan))


def test_linear_unless_asked_and_a_later_run_keeps_what_was_asked(config, capsys):
    config = replace(config, spacing=(1.4, 1.3, 3))
    assert run(config) == 0
    assert settings(config)["resampling"]["value"] == "linear"
    assert "resampling" not in json.loads((config.output_path / "dataset.json").read_text())
    linear = Store(config.output_path).read_image("a")
    assert run(replace(config, resampling="cubic")) == 0
    text = capsys.readouterr().out
    assert "Resampling: cubic, given by --resampling" in text and "3 done, 0 kept" in text
    prepared, cubic = read_prepared(config.output_path), Store(config.output_path)
    assert prepared.resampling == "cubic" and settings(config)["resampling"]["value"] == "cubic"
    image = reorient(mh.read_volume(config.input_path / "images/a.nii.gz"), "RAS")
    np.testing.assert_array_equal(cubic.read_image("a")[..., 0], resample(image, (1.4, 1.3, 3), "cubic").array)
    assert np.abs(cubic.read_image("a") - linear).max() > 1
    # The label map is as it was.
    assert sum(cubic.entry("a").foreground_counts.values()) > 0
    assert run(replace(config, spacing=None)) == 0
    text = capsys.readouterr().out
    assert "Resampling: cubic, given by --resampling" in text and "0 done, 3 kept" in text
    # --spacing says nothing of it.
    assert run(config) == 0 and "0 done, 3 kept" in capsys.readouterr().out
    linear_again = replace(config, resampling="linear")
    assert run(linear_again) == 0 and "3 done, 0 kept" in capsys.readouterr().out


def test_a_folder_without_a_plan_is_planned_as_its_cases_are(config):
    assert run(replace(config, spacing=(1.4, 1.3, 3), resampling="cubic")) == 0
    (config.output_path / "plan.json").unlink()
    mh.plan(folder=config.output_path, output=config.output_path / "plan.json")
    assert planned_settings(TrainConfig(config.output_path)).settings["resampling"].value == "cubic"


def test_an_edited_plan_decides_and_train_refuses_one_that_the_cases_do_not_follow(config):
    assert run(config) == 0
    set_by_hand(config, "resampling", "cubic")
    with pytest.raises(
        DatasetError, match="resampling is cubic, but the cases are resampled by linear; expected linear"
    ):
        planned_settings(TrainConfig(config.output_path))
    assert run(config) == 0
    assert planned_settings(TrainConfig(config.output_path)).settings["resampling"].value == "cubic"
    assert read_prepared(config.output_path).resampling == "cubic"
    assert mh.plan(folder=config.output_path, memory=24).plan.resampling.value == "cubic"
    set_by_hand(config, "resampling", "quintic")
    with pytest.raises(DatasetError, match="resampling is 'quintic'; expected one of linear, cubic"):
        run(config)


@pytest.mark.parametrize("resampling", ["linear", "cubic"])
@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_inference_resamples_as_the_checkpoint_says(config, tmp_path, resampling, whole_bytes):
    spacing = (1.4, 1.3, 2.5)
    assert run(replace(config, spacing=spacing, resampling=resampling)) == 0
    data = DataProperties(spacing, modality="mr", labels=((1, "a"),), resampling=resampling, patch_size=(16, 16, 16))
    assert DataProperties.from_json(data.to_json()) == data
    assert ("resampling" in data.to_json()) == (resampling == "cubic")
    segmenter = Segmenter.of(Network(data), SegmentOptions())
    assert segmenter.settings.to_json()["resampling"] == resampling
    volume = mh.read_volume(config.input_path / "images/b.nii.gz")
    scan = to_network_grid(volume, segmenter.settings, whole_bytes=whole_bytes)
    stored, entry = Store(config.output_path).read_image("b"), Store(config.output_path).entry("b")
    expected = (stored - entry.statistics.mean[0]) / entry.statistics.std[0]
    np.testing.assert_allclose(scan.image, expected, rtol=0, atol=2e-5)
    part = np.concatenate(
        [scan.slab(1, start, min(start + 5, scan.shape[1])) for start in range(0, scan.shape[1], 5)], 1
    )
    np.testing.assert_allclose(part, expected, rtol=0, atol=2e-5)
    other = replace(segmenter.settings, resampling="linear" if resampling == "cubic" else "cubic")
    assert np.abs(to_network_grid(volume, other).image - expected).max() > 1e-2


class Network:
    """What a network says of itself."""

    def __init__(self, data):
        self.metadata = data

    def __call__(self, windows):
        raise NotImplementedError


def test_networks_of_different_resampling_are_no_ensemble():
    one, other = (Network(DataProperties(modality="mr", resampling=name)) for name in ("linear", "cubic"))
    with pytest.raises(ConfigError, match="resampling"):
        Segmenter.of([one, other], SegmentOptions())


def test_a_checkpoint_of_an_earlier_version_means_linear(tmp_path):
    values = {name: value for name, value in DataProperties().to_json().items() if name != "resampling"}
    assert DataProperties.from_json(values).resampling == "linear"
    with pytest.raises(ConfigError, match="resampling is 'quintic'; expected one of linear, cubic"):
        DataProperties.from_json(values | {"resampling": "quintic"})
