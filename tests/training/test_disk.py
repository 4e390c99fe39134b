"""What runs take on the disk is said before they begin."""

import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from mambahome_jax.commands import train
from mambahome_jax.errors import OutputError
from mambahome_jax.training import disk
from tests.commands.test_train import _config, _dataset, small_networks


def stored_bytes(checkpoint: Path) -> int:
    """Bytes of the arrays in a checkpoint."""
    items = [checkpoint / name for name in ("model", "optimizer") if (checkpoint / name).is_dir()]
    leaves = [leaf for item in items for leaf in jax.tree.leaves(ocp.PyTreeCheckpointHandler().metadata(item).tree)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_training_says_what_its_checkpoints_take(tmp_path, monkeypatch, capsys, keep):
    small_networks(monkeypatch)
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", recipe="strong", keep_last=keep, num_workers=0)
    config = replace(config, deep_supervision=False)
    assert train.run(config) == 0
    text = capsys.readouterr().out
    said = re.search(r"Disk: checkpoints take (\S+) MB .* MB while one is written; \S+ GB are free in (\S+)", text)
    assert said is not None and said[2] == str(tmp_path / "run")
    best, last = (stored_bytes(tmp_path / "run/checkpoints" / name) for name in ("best", "last"))
    assert last > 3 * best > 0  # the moving average, the parameters that are trained, and two moments of each
    assert float(said[1]) == pytest.approx((best + keep * last) / 1e6, abs=0.06)

    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    with pytest.raises(OutputError, match=r"other/checkpoints: checkpoints take .*, but 0\.0 MB are free in .*other\."):
        train.run(replace(config, output_dir=tmp_path / "other"))
    assert not list((tmp_path / "other/checkpoints").iterdir())
    # A run that goes on replaces its checkpoints: room for the first ones, not for one more.
    monkeypatch.setattr(disk, "bytes_of", lambda path: best + last)
    assert train.run(replace(config, resume=True)) == 0
    assert "Note: the disk may get full" in capsys.readouterr().out
