"""Paths as people type them: one form that every library opens."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax import cli
from mambahome_jax.errors import ConfigError
from mambahome_jax.support.paths import is_url, local_path, one_form
from tests.commands.scans import write

COMPOSED = "Müller"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
SCAN = mh.Volume(np.zeros((8, 8, 8), np.float32), np.diag([2, 2, 2, 1.0]))


@pytest.mark.parametrize("text", ["READY", "a/b.nii.gz", "/tmp/x y", "./READY/", "a//b", "~x-that-is-no-user/y"])
def test_what_needs_no_resolving_stays(text):
    assert local_path(text) == Path(text)


def test_a_parent_folder_is_that_of_a_link_s_target(tmp_path, monkeypatch):
    (tmp_path / "far/below").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "far/below")
    monkeypatch.chdir(tmp_path / "here")
    assert local_path("../READY") == tmp_path / "READY"
    assert local_path("link/../READY") == tmp_path / "far/READY"
    assert local_path("new/../READY/x") == Path("READY/x")
    assert local_path("../here/link") == Path("link")
    assert local_path("..") == tmp_path


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/scans") == tmp_path / "scans"
    assert local_path("~") == tmp_path
    monkeypatch.setattr(os.path, "expanduser", os.fspath)
    with pytest.raises(ConfigError, match=r"~/scans: no home folder is known. Set HOME"):
        local_path("~/scans")


@pytest.mark.parametrize("url", ["s3://bucket/../scans", "gs://bucket/~", "https://host/a", "http://host/a"])
def test_urls_stay_and_no_command_takes_them(url):
    assert is_url(url) and is_url(Path(url)) and local_path(url) == Path(url)
    with pytest.raises(ConfigError, match=rf"{url}: a URL; expected a file or folder of this machine"):
        cli.parse("infer", ["--data_path", url, "--model_path", "w.pth"])


@pytest.mark.parametrize(
    "of",
    [
        mh.read_volume,
        mh.read_labels,
        mh.load_model,
        lambda url: mh.write_volume(url, SCAN),
        lambda url: mh.segment(None, SCAN, save_probabilities=url),
    ],
)
def test_no_function_makes_a_folder_of_a_url(tmp_path, monkeypatch, of):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^s3://bucket/a.npz: a URL; expected a file or folder of this machine"):
        of("s3://bucket/a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["C:/scans", "C:\\scans", "a:b/c", "scans", "12:/x"])
def test_what_is_no_url(name):
    assert not is_url(name)


@pytest.mark.parametrize(("typed", "stored"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_name_is_found_in_the_other_unicode_form(tmp_path, typed, stored):
    (tmp_path / stored / stored).mkdir(parents=True)
    assert local_path(tmp_path / typed / typed / "new") == tmp_path / stored / stored / "new"
    assert local_path(tmp_path / stored) == tmp_path / stored


def test_a_new_name_is_composed(tmp_path):
    assert local_path(tmp_path / DECOMPOSED) == tmp_path / COMPOSED
    assert one_form(DECOMPOSED) == COMPOSED and one_form("a") == "a"


def test_every_path_of_a_command_line_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = cli.parse("preprocess", ["--input_path", "../a", "~/b", "--output_path", "../READY/"])
    assert config.input_path == (tmp_path / "a", tmp_path / "home/b")
    assert config.output_path == tmp_path / "READY"
    config = cli.parse("train", ["--data_train", "../READY", "--use_pretrained", "../w.pth"])
    assert (config.data_train, config.use_pretrained) == (tmp_path / "READY", str(tmp_path / "w.pth"))
    config = cli.parse("check", ["../a", "--json", "~/c.json"])
    assert (config.folder, config.json) == (tmp_path / "a", tmp_path / "home/c.json")
    config = cli.parse("convert", ["../a.pth", "~/b.npz"])
    assert (config.source, config.destination) == (tmp_path / "a.pth", tmp_path / "home/b.npz")


@pytest.mark.parametrize("words", [["--output_dir", ""], ["--output_dir="]])
def test_an_empty_path_is_not_the_working_folder(words):
    with pytest.raises(ConfigError, match="a path is empty text"):
        cli.parse("infer", ["--data_path", "a", "--model_path", "b", *words])


@pytest.mark.parametrize("flag", ["--data_path", "--output_dir"])
def test_a_name_that_is_too_long_is_told_in_one_line(flag, tmp_path):
    words = {"--data_path": "a", "--model_path": "b", "--output_dir": "c"} | {flag: str(tmp_path / ("x" * 300))}
    with pytest.raises(ConfigError, match="xx: File name too long; expected a path that you may open"):
        cli.parse("infer", [word for pair in words.items() for word in pair])


def test_a_path_that_begins_with_a_dash():
    config = cli.parse("infer", ["--data_path=-a b", "--model_path", "w.pth", "--output_dir=-o"])
    assert (config.data_path, config.output_dir) == (Path("./-a b"), Path("./-o"))


def test_functions_take_such_paths_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / DECOMPOSED / "a.nii", np.zeros((3, 4, 5), np.int16))
    for path in (f"../{COMPOSED}/a.nii", f"~/{COMPOSED}/a.nii"):
        volume = mh.read_volume(path)
        assert volume.shape == mh.read_labels(path).shape == (3, 4, 5)
    mh.write_volume("~/b.nii.gz", volume)
    assert (tmp_path / "b.nii.gz").is_file()
    with pytest.raises(mh.CheckpointError, match=f"{tmp_path}/w.pth: no such file"):
        mh.load_model("~/w.pth")
