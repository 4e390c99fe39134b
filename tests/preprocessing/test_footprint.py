"""What preprocess says of the disk before its first case: near what it then writes, and no work where it cannot fit."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.errors import OutputError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing import case, dataset
from mambahome_jax.support import files
from mambahome_jax.support.files import bytes_of, free_bytes, said_bytes
from mambahome_jax.training.runs import open_data
from tests.commands.scans import preprocess_config, scan, write


@pytest.fixture
def config(tmp_path):
    config = preprocess_config(tmp_path)
    for seed, name in enumerate("abc"):
        image, label = scan((64, 48, 40), seed)
        # The noise of a CT; of less, files are packed more than those of any scanner.
        image += np.random.default_rng(seed).normal(0, 20, image.shape).astype(np.int16)
        write(config.input_path / f"images/{name}.nii.gz", image)
        write(config.input_path / f"labels/{name}.nii.gz", label)
    return replace(config, spacing=(1.1, 1.2, 3))


def free(monkeypatch, size):
    monkeypatch.setattr(case, "free_bytes", lambda folder: size)


@pytest.mark.parametrize("spacing", [(0, 0, 0), (1.7, 1.2, 2.5)])
@pytest.mark.parametrize("values", ["whole", "fractions"])
def test_the_estimate_is_near_what_is_written(config, monkeypatch, spacing, values):
    if values == "fractions":
        for seed, name in enumerate("abc"):
            image = np.random.default_rng(seed).normal(size=(64, 48, 40)).astype(np.float32)
            write(config.input_path / f"images/{name}.nii.gz", image)
    expected = []
    measure = dataset.require_disk

    def note(output, jobs, footprints, say):
        expected.append(sum(size.written for size in footprints.values()))
        measure(output, jobs, footprints, say)

    monkeypatch.setattr(dataset, "require_disk", note)
    assert run(replace(config, spacing=spacing, modality="mr")) == 0
    written = sum(bytes_of(config.output_path / part) for part in ("images", "labels", "store"))
    assert 0.5 < expected[0] / written < 2


def test_too_little_room_ends_before_the_first_case(config, monkeypatch, capsys):
    free(monkeypatch, 100_000)
    with pytest.raises(OutputError, match=r"out: 3 cases take about \d\.\d MB, 0\.1 MB are free\. Free some space or "):
        run(config)
    assert not list(config.output_path.rglob("*.nii.gz"))
    free(monkeypatch, 10**9)
    assert run(config) == 0
    assert f"1.0 GB are free in {config.output_path}" in capsys.readouterr().out
    before = bytes_of(config.output_path)
    free(monkeypatch, 0)
    with pytest.raises(OutputError, match="choose a coarser --spacing"):
        run(replace(config, overwrite=True, spacing=(0.5, 0.5, 0.5)))
    assert bytes_of(config.output_path) == before


def test_what_is_replaced_is_room_and_what_may_not_fit_is_said(config, monkeypatch, capsys):
    assert run(config) == 0
    free(monkeypatch, 0)
    assert run(replace(config, overwrite=True)) == 0
    assert "Note: the disk may get full" in capsys.readouterr().out
    # Nothing is done, nothing is said.
    assert run(config) == 0
    assert "Disk:" not in capsys.readouterr().out


def test_the_store_of_a_folder_that_is_trained_on_as_it_is(config, monkeypatch, tmp_path):
    from rich.console import Console

    free(monkeypatch, 100_000)
    with pytest.raises(OutputError, match=r"data: 3 cases .* or name another --output_dir$"):
        open_data(TrainConfig(config.input_path), tmp_path / "run", Console(quiet=True))


def test_sizes_are_those_of_files_and_links_count_nothing(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/a").write_bytes(bytes(1000))
    (tmp_path / "deep/b").write_bytes(bytes(500))
    (tmp_path / "deep/link").symlink_to(tmp_path / "deep/er")
    assert (bytes_of(tmp_path), bytes_of(tmp_path / "deep/b"), bytes_of(tmp_path / "none")) == (1500, 500, 0)
    assert bytes_of(tmp_path / "deep/link") == 0
    assert free_bytes(tmp_path / "not/yet/there") == free_bytes(tmp_path)
    assert [said_bytes(n) for n in (1234, 9_940_000, 64e6, 999_000_000, 1_500_000_000, 12e9)] == [
        *("0.0 MB", "9.9 MB", "64 MB", "999 MB", "1.5 GB", "12 GB")
    ]


def test_a_file_system_that_does_not_tell_is_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    assert free_bytes(tmp_path) is None
