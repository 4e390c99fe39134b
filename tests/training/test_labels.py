"""Label values of training and validation data: numbered alike, or matched by what they stand for."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.commands.preprocess import run
from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.structures import match_structures
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing import dataset as preprocessing
from mambahome_jax.training.progress import label_lines
from mambahome_jax.training.setup import make_setup
from tests.commands.scans import preprocess_config, scan, write


def folder(home, values, names=None):
    """A preprocessed folder of three cases whose label maps store `values` in the place of 0, 1, 2."""
    config = replace(preprocess_config(home), spacing=(0, 0, 0))
    for case in "abc":
        write(config.input_path / f"labels/{case}.nii.gz", np.array(values, np.uint16)[scan()[1]])
    if names:
        (config.input_path / "dataset.json").write_text(json.dumps({"labels": names}))
    assert run(config) == 0
    return read_prepared(config.output_path)


def setup_of(prepared, prepared_val=None):
    flags = TrainConfig(prepared.root, model="MambaHoME_tiny", steps=1, hold_out=0)
    return make_setup(flags, prepared, prepared_val, 1)


def test_a_network_has_a_channel_for_each_structure_and_knows_the_stored_values(tmp_path):
    setup = setup_of(folder(tmp_path, (0, 1, 255)))
    assert setup.model.out_chans == 3 and setup.structures == {1: "label_1", 2: "label_255"}
    assert dict(setup.properties.values) == {1: 1, 2: 255}
    assert label_lines(setup) == [
        "Labels: stored label values 1, 255 are structures 1, 2; infer writes the stored values"
    ]
    assert DataProperties.from_json(setup.properties.to_json()) == setup.properties


def test_a_folder_of_an_earlier_version_trains_as_it_is_and_its_gaps_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "numbering", lambda stored: {})
    setup = setup_of(folder(tmp_path, (0, 1, 40)))
    assert setup.model.out_chans == 41 and setup.properties.values == ()
    assert label_lines(setup) == [
        "Note: 38 output channels stand for no structure, as label values go up to 40; preprocess.py numbers them "
        "without gaps"
    ]


def test_values_without_gaps_are_not_spoken_of(tmp_path):
    setup = setup_of(folder(tmp_path, (0, 1, 2)))
    assert setup.properties.values == () and label_lines(setup) == []
    assert "values" not in setup.properties.to_json()


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ((0, 1, 255), (0, 1, 255), None),
        ((0, 1, 255), (0, 255, 255), {1: 2}),
        ((0, 100, 200), (0, 200, 100), None),
        ((0, 1, 2), (0, 2, 2), {1: 2}),
    ],
)
def test_folders_that_number_differently_are_matched_by_what_is_stored(tmp_path, train, val, expected):
    data, data_val = folder(tmp_path / "train", train), folder(tmp_path / "val", val)
    assert setup_of(data, data_val).val_values == expected


def test_folders_are_matched_by_name_and_what_is_not_trained_is_said(tmp_path):
    data = folder(tmp_path / "train", (0, 2, 2), {"2": "liver"})
    data_val = folder(tmp_path / "val", (0, 1, 2), {"1": "spleen", "2": "Liver"})
    setup = setup_of(data, data_val)
    assert setup.val_values == {2: 1}
    assert label_lines(setup)[0] == "Note: spleen of --data_val: not trained, so background there"
    unnamed = folder(tmp_path / "unnamed", (0, 2, 2))
    assert setup_of(data, unnamed).val_values is None
    with pytest.raises(
        DatasetError, match=r"structures 1 heart; expected 1 liver\. Preprocess both folders with the same"
    ):
        setup_of(data, folder(tmp_path / "other", (0, 7, 7), {"7": "heart"}))


def test_structures_are_matched_by_name_before_their_stored_values():
    assert match_structures({1: "a", 2: "b"}, {1: "b", 2: "a"}) == {1: 2, 2: 1}
    assert match_structures({1: "label_7"}, {3: "ball"}, {1: 7}, {3: 7}) == {1: 3}
    assert match_structures({1: "box"}, {3: "ball"}, {1: 7}, {3: 7}) == {}
    assert match_structures({7: "ball"}, {1: "label_7", 2: "label_9"}, None, {1: 7, 2: 9}) == {7: 1}
