"""What a checkpoint says of the scans of its training."""

import json
from dataclasses import replace

import pytest

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.intensity import IntensityStatistics
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.patches.store import StoreEntry, read_entry, training_ranges
from mambahome_jax.ranges import ScanRanges, StructureRange

ROW = (-1000.0, -990.0, 10.0, 100.0, 400.0)


def entry(name, shape=(10, 20, 30), low=-1000.0, **changes) -> StoreEntry:
    """A case of 1 x 1 x 2 mm voxels."""
    affine = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    statistics = IntensityStatistics((0.0,), (1.0,), (-1000.0,), (500.0,))
    counts = {0: 5000, 1: 1000}
    made = StoreEntry(
        name, shape, 1, (1, 1, 2), affine, "ct", statistics, ((0, 0, 0), shape), counts, percentiles=((low, *ROW[1:]),)
    )
    return replace(made, **changes)


NAMES = {1: "liver", 2: "tumour"}


def test_least_and_largest_of_the_cases():
    entries = [entry("a"), entry("b", (12, 18, 40), low=-1024.0, class_counts={0: 1, 1: 2000, 2: 50})]
    (found,) = training_ranges(entries, NAMES)
    assert (found.modality, found.cases) == ("ct", 2)
    assert found.extent_mm == ((10, 12), (18, 20), (60, 80))
    assert found.percentiles == (((-1024, -1000), (-990, -990), (10, 10), (100, 100), (400, 400)),)
    assert found.structures == (StructureRange("liver", 2, 2, 2.0, 4.0), StructureRange("tumour", 2, 1, 0.1, 0.1))


def test_each_modality_has_its_own_and_a_flag_makes_one_of_all():
    entries = [entry("a"), entry("b", modality="mr")]
    assert [(item.modality, item.cases) for item in training_ranges(entries, NAMES)] == [("ct", 1), ("mr", 1)]
    assert [(item.modality, item.cases) for item in training_ranges(entries, NAMES, "us")] == [("us", 2)]


def test_structures_that_a_case_was_not_labelled_for_do_not_count():
    (found,) = training_ranges([entry("a", labelled=(2,)), entry("b", class_counts=None)], NAMES)
    assert found.structures == (StructureRange("liver", 0, 0, 0.0, 0.0), StructureRange("tumour", 1, 0, 0.0, 0.0))


def test_a_store_of_earlier_versions_gives_no_percentiles(tmp_path):
    from mambahome_jax.patches import store

    content = store._to_json(entry("a"))
    del content["percentiles"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/case.json").write_text(json.dumps(content))
    old = read_entry(tmp_path, "a")
    assert old == entry("a", percentiles=())
    assert training_ranges([old, entry("b")], NAMES)[0].percentiles == ()


def test_they_travel_as_json_and_older_checkpoints_have_none():
    data = DataProperties(ranges=training_ranges([entry("a"), entry("b", modality="mr")], NAMES))
    assert DataProperties.from_json(json.loads(json.dumps(data.to_json()))) == data
    assert hash(data)
    assert DataProperties.from_json(replace(data, val_dice=0.8).to_json()).val_dice == 0.8
    old = DataProperties().to_json()
    assert "ranges" not in old and DataProperties.from_json(old).ranges == ()


@pytest.mark.parametrize(
    "change",
    [
        {"cases": 1.5},
        {"extent_mm": [[1, 2]]},
        {"extent_mm": [[2, 1]] * 3},
        {"extent_mm": [[1, float("inf")]] * 3},
        {"percentiles": [[[0, 1]]]},
        {"percentiles": 3},
        {"volumes_ml": {"liver": {"labelled": 1}}},
        {"volumes_ml": []},
    ],
)
def test_damaged_ranges_are_named(change):
    content = DataProperties(ranges=training_ranges([entry("a")], NAMES)).to_json()
    content["ranges"]["ct"] |= change
    with pytest.raises(ConfigError, match="ranges is"):
        DataProperties.from_json(content)


def test_of_an_ensemble_they_are_those_of_all():
    class Trained:
        def __init__(self, *entries):
            self.metadata = DataProperties(ranges=training_ranges(entries, NAMES))

    members = [Trained(entry("a")), Trained(entry("b", (12, 18, 40), class_counts={0: 1, 1: 2000, 2: 50}))]
    found = Ensemble(tuple(members)).ranges("ct")
    assert isinstance(found, ScanRanges) and (found.cases, found.extent_mm) == (2, ((10, 12), (18, 20), (60, 80)))
    assert found.structures == (StructureRange("liver", 2, 2, 2.0, 4.0), StructureRange("tumour", 2, 1, 0.1, 0.1))
    members[1].metadata = replace(members[1].metadata, val_dice=0.3)
    assert Ensemble(tuple(members)).ranges("ct") == replace(found, structures=())
    assert Ensemble((members[0],)).ranges("mr") is None and Ensemble((*members, object())).ranges("ct") is None
