"""Where compiled programs are kept: in the user's cache folder, or nowhere where there is none."""

import os
import pwd
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.support.devices import keep_programs, program_cache


@pytest.fixture(autouse=True)
def _no_folder_named(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # so that it is put back afterwards
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_in_the_home_folder_or_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert program_cache() == tmp_path / ".cache/mambahome/xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert program_cache() == tmp_path / "other/mambahome/xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert program_cache() == tmp_path / ".cache/mambahome/xla"


def _unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def _no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", _unknown)


def _missing_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))


def _empty_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "")


def _file_in_the_way(monkeypatch, tmp_path):
    (tmp_path / ".cache").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))


def _read_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)


def _unusable_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")


PLACES = [_no_home, _missing_home, _empty_home, _file_in_the_way, _read_only, _unusable_xdg]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_without_a_folder_commands_work_all_the_same(place, tmp_path, monkeypatch, capsys):
    place(monkeypatch, tmp_path)
    assert program_cache() is None
    assert cli.run_command("infer", ["--data_path", str(tmp_path / "none"), "--model_path", "none"], "infer") == 2
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    said = capsys.readouterr().err
    assert f"Error: {tmp_path}/none: no such file or folder" in said
    assert "Note: no home folder that can be written, so compiled programs are not kept" in said
    assert cli.run_command("check", [str(tmp_path / "none")], "check") == 2
    assert "Note" not in capsys.readouterr().err
    assert not (tmp_path / "nonexistent").exists() and Path("/dev/null").is_char_device()


def test_functions_keep_programs_where_the_user_named_no_other_folder(tmp_path, monkeypatch):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_programs() == jax.config.jax_compilation_cache_dir == str(tmp_path / "mambahome/xla")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        assert keep_programs() == jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        assert keep_programs() == "" and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", named)
