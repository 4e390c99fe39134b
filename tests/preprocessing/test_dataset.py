"""check and preprocess as functions: keywords as the flags' names, a typed result, nothing printed."""

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.patches.store import Store
from tests.commands.scans import preprocess_config


def test_preprocess_is_silent_and_returns_paths_and_failures(tmp_path, capsys):
    flags = vars(preprocess_config(tmp_path))
    (flags["input_path"] / "images/b.nii.gz").write_bytes(b"no scan")
    result = mh.preprocess(**flags | {"input_path": str(flags["input_path"])})
    assert capsys.readouterr() == ("", "")
    assert (result.done, result.kept, result.exit_code) == (("a", "c"), (), 1)
    ((case, reason),) = result.failed
    assert case == "b" and "images/b.nii.gz" in reason
    assert result.prepared.root == flags["output_path"] and result.prepared.spacing == (1, 1, 3)
    assert all(result.prepared.image_path(case).is_file() for case in result.prepared.cases)
    assert Store(result.prepared.store).cases == tuple(entry.id for entry in result.entries) == ("a", "c")
    assert mh.preprocess(**flags).kept == ("a", "c")
    with pytest.raises(mh.ConfigError, match="spacings: there is no such keyword; did you mean spacing"):
        mh.preprocess(input_path="in", output_path="out", spacings=(1, 1, 1))
    with pytest.raises(mh.DatasetError, match="no such folder"):
        mh.preprocess(input_path=tmp_path / "nowhere", output_path=tmp_path / "other")


def test_check_is_silent_and_returns_facts_and_findings(tmp_path, capsys):
    folder = preprocess_config(tmp_path).input_path
    (folder / "images/b.nii.gz").write_bytes(b"no scan")
    result = mh.check(folder=folder, json=tmp_path / "check.json", num_workers=1)
    assert capsys.readouterr() == ("", "")
    assert [fact.id for fact in result.facts] == ["a", "b", "c"] and result.usable == 2
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert [finding.case for finding in errors] == ["b"] and (result.counts["error"], result.exit_code) == (1, 1)
    assert result.summary.plan is not None and np.allclose(result.summary.plan.spacing.value, (2, 1, 3))
    assert (tmp_path / "check.json").is_file()
    with pytest.raises(mh.DatasetError, match="no such folder"):
        mh.check(folder=str(tmp_path / "nowhere"))
