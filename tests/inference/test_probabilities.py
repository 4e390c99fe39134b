"""The file that holds probabilities; their values are tested in test_tiled."""

import json
from functools import partial

import numpy as np
import pytest

from mambahome_jax.errors import ConfigError, OutputError
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.postprocess import whole_probabilities, write_probabilities
from mambahome_jax.inference.segment import segment


def test_file_reads_with_numpy_alone(tmp_path):
    values = np.random.default_rng(0).uniform(size=(5, 4, 3, 2)).astype(np.float16)
    path, affine = tmp_path / "out" / "a.npz", np.diag([1.0, 2.0, 3.0, 1.0])
    write_probabilities(path, values, affine, {1: "liver"})
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["probabilities"], values)
        np.testing.assert_array_equal(archive["affine"], affine)
        assert json.loads(str(archive["labels"])) == {"0": "background", "1": "liver"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.npz"]
    assert whole_probabilities(path)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 4] ^= 0xFF
    for wrong in (content[: len(content) // 2], bytes(damaged), b""):
        path.write_bytes(wrong)
        assert not whole_probabilities(path)
    path.unlink()
    assert not whole_probabilities(path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"a\.npz: cannot be written"):
        write_probabilities(tmp_path / "file" / "a.npz", np.zeros((1, 1, 1, 2), np.float16), np.eye(4), {})


def test_another_suffix_is_refused_before_the_work():
    with pytest.raises(ConfigError, match=r"a\.nii\.gz; expected a file name that ends in \.npz"):
        segment(None, Volume(np.zeros((4, 4, 4), np.float32), np.eye(4)), save_probabilities="a.nii.gz")


def test_probabilities_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    volume = Volume(np.zeros((8, 8, 8), np.float32), np.diag([2, 2, 2, 1.0]))
    two_classes = partial(np.repeat, repeats=2, axis=-1)
    segment(two_classes, volume, roi_size=(8, 8, 8), chain="trained", spacing=(2, 2, 2), save_probabilities="~/a.npz")
    assert whole_probabilities(tmp_path / "a.npz")
