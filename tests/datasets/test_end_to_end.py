"""From the download to the scores, for a dataset of two modalities and for one of which structures are merged."""

import pytest

from tests.datasets.all_layouts import end_to_end


@pytest.mark.slow
def test_amos(tmp_path):
    assert end_to_end("amos", tmp_path)["8"] == "aorta"


@pytest.mark.slow
def test_panorama_merged(tmp_path):
    (tmp_path / "map.toml").write_text("PDAC = [1]\npancreas = [4, 5]\n")
    labels = end_to_end("panorama", tmp_path, "--label_map", str(tmp_path / "map.toml"))
    assert labels == {"1": "PDAC", "2": "pancreas"}
