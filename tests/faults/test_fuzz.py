"""A small part of what `make faults` does: each kind of damage to a NIfTI file, and a few of each other kind."""

import pytest

from tests.faults import fuzz_files, fuzz_others


@pytest.mark.slow
def test_damaged_nifti_files_give_a_result_or_one_line(tmp_path):
    result = fuzz_files.fuzz(tmp_path, 32, first=2000)
    assert result["faults"] == []
    assert [counts["tried"] for counts in result["commands"].values()] == [32, 32, 32]
    assert 16 <= result["commands"]["preprocess"]["refused"] < 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NRRD", "dataset.json", ".pth"])
def test_other_damaged_files_give_a_result_or_one_line(kind):
    result = fuzz_others.fuzz(kind, 8, first=2000)
    assert result["faults"] == [] and result["refused"] > 0
