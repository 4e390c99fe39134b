"""What a training says of the code that made it."""

import re
import shutil
import subprocess

import pytest

from mambahome_jax.training.runs import git_state


def test_the_commit_of_the_code_and_what_differs_from_it(tmp_path):
    assert git_state(tmp_path) is None
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *words], check=True)
    state = git_state(tmp_path)
    assert state is not None and re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["changed"] == []
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == state | {"changed": ["code.py"]}
