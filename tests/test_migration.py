"""What commit 86784e3 wrote still loads: prepared folders, checkpoints, runs to continue.

tests/migration/runs_86784e3.zip was written by tests/migration/make.py with that commit's code. Each array in its
checkpoints holds one number, so that the archive stays small; values.json has them under the published names.
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.cli import run_command
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.training import train as training

ARCHIVE = Path(__file__).parent / "migration" / "runs_86784e3.zip"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def test_a_prepared_folder_is_read(earlier):
    prepared = read_prepared(earlier / "ready")
    assert [case.id for case in prepared.cases] == ["case_0", "case_1", "case_2"]
    assert prepared.spacing == (1.0, 1.0, 2.0) and prepared.labels == {1: "liver", 2: "spleen"}
    assert {case.modality for case in prepared.cases} == {"ct"}


@pytest.mark.parametrize("recipe", ["published", "strong"])
def test_a_checkpoint_has_the_same_weights(earlier, recipe):
    model = mh.load_model(earlier / recipe / "checkpoints" / "best")
    expected = json.loads((earlier / "values.json").read_text())[recipe]
    exported = mh.export_official(model)
    assert exported.keys() == expected.keys()
    for name, (shape, value) in expected.items():
        np.testing.assert_array_equal(exported[name], np.full(shape, value, np.float32), err_msg=name)


def test_a_run_folder_is_a_model(earlier):
    model = mh.load_model(earlier / "strong")
    volume = mh.read_volume(earlier / "raw" / "images" / "case_2.nii.gz")
    labels = mh.segment(model, volume)
    assert labels.array.shape == volume.array.shape and labels.array.max() <= 2


def traced_alone(make):
    """A step that changes no number, for the state that the real one takes and gives: to compile that takes long."""

    def made(*arguments):
        real = make(*arguments)

        @jax.jit
        def step(state, batch, rate):
            after, metrics = jax.eval_shape(real, state, batch, rate)
            kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
            assert kinds[0] == kinds[1]
            return dataclasses.replace(state, step=state.step + 1), dict.fromkeys(metrics, rate)

        return step

    return made


@pytest.mark.slow
def test_a_run_goes_on(earlier, capsys, monkeypatch):
    monkeypatch.setattr("mambahome_jax.training.step.compiler_options", lambda **_: None)
    monkeypatch.setattr(training, "make_train_step", traced_alone(training.make_train_step))
    flags = "--model MambaHoME_tiny --feature_size 12 --patch_size 32 32 32 --batch_size 1 --steps 4 --val_every 2"
    folders = ["--data_train", str(earlier / "ready"), "--output_dir", str(earlier / "strong")]
    arguments = [*folders, *flags.split(), "--recipe", "strong", "--augment", "False", "--resume"]
    assert run_command("train", arguments, "mambahome train") == 0, capsys.readouterr().err
    rows = (earlier / "strong" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4"]
    assert json.loads((earlier / "strong" / "run.json").read_text())["status"] == "finished"
