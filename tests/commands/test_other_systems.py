"""What other systems lack is taken away here, from the workers of the commands too; they did not run on those."""

import os
import re
import subprocess
import sys

import pytest

from tests.commands.scans import scan, write
from tests.conftest import ROOT

# Windows has none of these, macOS lacks the first.
MISSING = """
import os, signal, sys
for module, names in (
    (os, ("sched_getaffinity", "fork", "getuid", "geteuid", "killpg", "setsid", "fchmod")),
    (signal, ("SIGHUP", "SIGKILL", "SIGUSR1", "pthread_sigmask")),
):
    for name in names:
        vars(module).pop(name, None)
sys.modules |= dict.fromkeys(("resource", "termios", "pwd"))
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Run a module with arguments where that is missing; its output."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MISSING)
    paths = os.pathsep.join(map(str, (tmp_path / "site", ROOT / "kernels", ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0"}

    def run(module: str, *arguments: object) -> str:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        # Text without an encoding is not UTF-8 on Windows.
        assert not re.findall(r"mambahome_\w+\S*: EncodingWarning.*", said)
        return said

    return run


def test_commands_need_nothing_that_other_systems_lack(tmp_path, elsewhere):
    for seed, name in enumerate(("a", "b b", "\u00e4")):
        image, label = scan(seed=seed)
        write(tmp_path / f"in/images/{name}.nii.gz", image)
        write(tmp_path / f"in/labels/{name}.nii.gz", label)
    more = ("--input_path", "in", "--output_path", "ready", "--modality", "ct")
    assert "3 done" in elsewhere("mambahome_jax", "preprocess", *more, "--spacing", 2, 1, 3, "--num_workers", 2)
    more = ("--data_train", "ready", "--output_dir", "run", "--model", "MambaHoME_tiny", "--recipe", "published")
    elsewhere("tests.training.train_process", *more, "--patch_size", 32, 16, 16, "--steps", 2, "--num_workers", 1)
    assert (tmp_path / "run" / "checkpoints" / "last").is_dir()
    more = ("--predictions", "in/labels", "--references", "in/labels", "--output_dir", "scores")
    assert "1.000" in elsewhere("mambahome_jax", "evaluate", *more)
    elsewhere("mambahome_jax", "report", "--evaluation", "scores")
    assert "\u00e4" in (tmp_path / "scores" / "report.html").read_text(encoding="utf-8")
