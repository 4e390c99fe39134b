"""Which labels trade places where a training mirrors: from the store's label maps, and again at inference."""

import json

import numpy as np
import pytest
from rich.console import Console

from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, write_prepared
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.inference.ensemble import mirrors_for
from mambahome_jax.patches.store import StoreEntry, write_case, write_index
from mambahome_jax.training import runs
from mambahome_jax.training.setup import choose_mirrors, make_setup, recorded_mirrors

SHAPE = (48, 16, 16)
KIDNEYS = {1: "left kidney", 2: "right kidney"}
HEART = {1: "right ventricle", 2: "left ventricle"}
SPACING = (1.0, 1.0, 1.0)


def ball_and(kind, number):
    """Label map with a ball on one side, and on the other a ball or a flat box of its volume."""
    x, y, z = np.indices(SHAPE) - np.array([12, 8, 8])[:, None, None, None]
    radius = 5.5 + 0.2 * number
    label = np.where(x**2 + y**2 + z**2 < radius**2, 1, 0).astype(np.uint8)
    x = x - 24
    other = x**2 + y**2 + z**2 < radius**2 if kind == "ball" else np.max(np.abs([x / 0.5, y, z]), axis=0) < radius
    label[other] = 2
    return label


def prepared(root, kind, labels, cases=4, split=None):
    entries, listed = [], []
    for number in range(cases):
        label = ball_and(kind, number)
        image = label[..., None].astype(np.float32)
        affine = tuple(map(tuple, np.eye(4)))
        entry = StoreEntry(
            f"c{number}", SHAPE, 1, SPACING, affine, "mr", statistics(image), ((0, 0, 0), SHAPE), class_counts=None
        )
        entries.append(write_case(root / "store", entry, image, label))
        names = (f"images/c{number}.nii.gz", f"labels/c{number}.nii.gz")
        listed.append(PreparedCase(f"c{number}", *names, split, "mr", SHAPE, SPACING, f"c{number}"))
    write_index(root / "store", entries)
    found = Prepared(root, "sides", SPACING, "RAS", ("mr",), labels, tuple(listed))
    write_prepared(found)
    return found


@pytest.mark.parametrize(
    ("kind", "labels", "pairs"), [("ball", KIDNEYS, ((1, 2),)), ("box", KIDNEYS, ()), ("box", HEART, ())]
)
def test_label_maps_decide_which_labels_trade_places(tmp_path, kind, labels, pairs):
    mirrors, lines = choose_mirrors(("LR",), prepared(tmp_path, kind, labels), labels, explicit=True)
    assert mirrors == ((0, pairs),)
    assert ("trade places" in lines[0]) == bool(pairs) and "in 4 cases" in lines[0]


def test_names_decide_where_too_few_cases_have_both(tmp_path):
    for labels, pairs in ((KIDNEYS, ((1, 2),)), (HEART, ())):
        mirrors, (line,) = choose_mirrors(("LR",), prepared(tmp_path, "box", labels, 2), labels, explicit=True)
        assert mirrors == ((0, pairs),) and "by their names, as 2 cases have both" in line
    # Label maps of the test split are not looked at.
    mirrors, _ = choose_mirrors(("LR",), prepared(tmp_path, "box", KIDNEYS, 4, "test"), KIDNEYS, explicit=True)
    assert mirrors == ((0, ((1, 2),)),)


def test_a_side_without_its_other_leaves_the_axis_out_in_a_line(tmp_path):
    data = prepared(tmp_path, "ball", {1: "left atrium"})
    assert choose_mirrors(("LR",), data, {1: "left atrium"}, explicit=False) == (
        (),
        ("Not mirrored along LR: the labels have no counterpart of left atrium",),
    )
    with pytest.raises(ConfigError, match="--mirror LR: left atrium would become"):
        choose_mirrors(("LR",), data, {1: "left atrium"}, explicit=True)
    assert choose_mirrors(("none",), data, {1: "left atrium"}, explicit=True) == ((), ())


def test_the_checkpoint_says_what_traded_places_and_inference_does_the_same(tmp_path):
    data = prepared(tmp_path, "box", HEART)
    config = TrainConfig(tmp_path, recipe="strong", steps=1, patch_size=(32, 16, 16))
    setup = make_setup(config, data, None, 1)
    assert setup.augmentation.mirror == ((0, ()),) and setup.properties.mirror_pairs == (("LR", ()),)
    assert setup.properties.mirror == ("LR",) and "keep their labels" in setup.mirror_lines[0]
    content = json.loads(json.dumps(setup.properties.to_json()))
    assert content["mirror_pairs"] == {"LR": []}
    again = DataProperties.from_json(content)
    assert again == setup.properties
    assert mirrors_for(HEART, "LPS", again.mirror, [again.mirror_pairs])[0] == ((0, ()),)
    # A checkpoint of an earlier version swapped whatever its names said.
    assert mirrors_for(HEART, "LPS", ("LR",), [None])[0] == ((0, ((1, 2),)),)
    mirrors, remarks = mirrors_for(HEART, "LPS", ("LR",), [None, again.mirror_pairs])
    assert mirrors == () and "in the training of these networks different labels traded places" in remarks[0]
    assert mirrors_for({1: "left atrium"}, "RAS", ("LR",), [(("LR", ()),)])[0] == ((0, ()),)
    with pytest.raises(ConfigError, match="mirror_pairs"):
        DataProperties.from_json(content | {"mirror_pairs": {"LR": [[1]]}})
    # Without mirrors the entry is left out, as before.
    assert "mirror_pairs" not in DataProperties().to_json()


def test_a_run_goes_on_with_the_mirrors_that_it_began_with(tmp_path):
    data = prepared(tmp_path, "box", HEART)
    config = TrainConfig(tmp_path, recipe="strong", steps=1, patch_size=(32, 16, 16))
    folder = tmp_path / "run/checkpoints/last"
    (folder / "model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {}, "training": {"mirror": [[0, [[1, 2]]]]}}))
    setup = make_setup(config, data, None, 1, recorded_mirrors(tmp_path / "run"))
    assert setup.augmentation.mirror == ((0, ((1, 2),)),) and setup.properties.mirror_pairs == (("LR", ((1, 2),)),)
    assert setup.mirror_lines == ("In mirrored scans labels trade places as when this run began",)
    # Another axis is another setting, which the resumed run is refused for.
    assert make_setup(config, data, None, 1, ((1, ()),)).augmentation.mirror == ((0, ()),)


@pytest.mark.parametrize(("given", "planned"), [(None, True), (("LR",), False)])
def test_a_planned_mirror_that_does_not_fit_is_left_out_in_a_line(tmp_path, monkeypatch, given, planned):
    data = prepared(tmp_path, "ball", {1: "left atrium"})
    settings = {"mirror": {"value": ["LR"]}, "recipe": {"value": "strong"}}
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, **settings}))
    monkeypatch.setattr(runs.Training, "run", lambda self: self)
    config = TrainConfig(tmp_path, mirror=given, steps=1, patch_size=(32, 16, 16))
    training = runs.run_training(config, Console(quiet=True))
    assert training.flags.mirror == ("LR",)
    if planned:
        setup = make_setup(training.flags, data, None, 1, settings=training.settings)
        assert setup.augmentation.mirror == () and "Not mirrored along LR" in setup.mirror_lines[0]
    else:
        with pytest.raises(ConfigError, match="--mirror LR: left atrium would become"):
            make_setup(training.flags, data, None, 1, settings=training.settings)
