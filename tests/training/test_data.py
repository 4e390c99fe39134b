"""--resume on data that changed: refused, naming what differs; on the same data wherever they lie it goes on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from mambahome_jax.commands import preprocess
from mambahome_jax.commands import train as command
from mambahome_jax.datasets.prepared import read_prepared, write_prepared
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.patches.store import Store, write_case, write_index
from mambahome_jax.training.checkpoints import data_differences, data_summary
from mambahome_jax.training.progress import data_notes
from mambahome_jax.training.run_report import new_report
from mambahome_jax.training.setup import case_digests, make_setup
from tests.commands.scans import preprocess_config
from tests.commands.test_train import _config, _dataset, _small, small_networks  # noqa: F401


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with data/ and run/, a training of one step on them; to be copied."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_networks(patch)
        assert command.run(_config(_dataset(root / "data"), root / "run", steps=1, val_every=1)) == 0
    return root


@pytest.fixture
def trained(whole, tmp_path):
    """Settings that continue such a run."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return _config(tmp_path / "data", tmp_path / "run", steps=1, val_every=1, resume=True)


def describe(data, **changes):
    write_prepared(dataclasses.replace(read_prepared(data), **changes))


def write_again(data, case, image=None, label=None, **changes):
    """Replace the voxels or the entry of a case, as preprocess does."""
    store = Store(data)
    image = store.read_image(case) if image is None else image
    label = store.read_label(case) if label is None else label
    entry = dataclasses.replace(store.entry(case), statistics=statistics(image), **changes)
    entry = write_case(data / "store", entry, image, label)
    write_index(data / "store", [entry if name == case else store.entry(name) for name in store.cases])


def mirrored_image(data):
    write_again(data, "c1", image=Store(data).read_image("c1")[::-1])


def moved_label(data):
    write_again(data, "c2", label=np.roll(Store(data).read_label("c2"), 1, axis=0))


def other_values(data):
    write_again(data, "c0", image=Store(data).read_image("c0") + 1)


def other_place(data):
    write_again(data, "c3", affine=tuple(map(tuple, np.diag([1.0, 1.0, 2.0, 1.0]))))


def other_validation(data):
    write_again(data, "c4", image=Store(data).read_image("c4")[:, ::-1])


CHANGES = {
    "spacing was [1.0, 1.0, 1.0], now [3.0, 3.0, 4.0]": lambda data: describe(data, spacing=(3.0, 3.0, 4.0)),
    "orientation was RAS, now LPS": lambda data: describe(data, orientation="LPS"),
    "channels was ['ct'], now ['T1']": lambda data: describe(data, channels=("T1",)),
    "labels was {'1': 'box'}, now {'1': 'cyst'}": lambda data: describe(data, labels={1: "cyst"}),
    "cases to train on changed (with other voxels: c1)": mirrored_image,
    "cases to train on changed (with other voxels: c2)": moved_label,
    "cases to train on changed (with other voxels: c0)": other_values,
    "cases to train on changed (with other voxels: c3)": other_place,
    "cases to validate on changed (with other voxels: c4)": other_validation,
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_data_are_refused_by_what_differs(trained, message):
    before = (trained.output_dir / "run.json").read_bytes()
    CHANGES[message](trained.data_train)
    with pytest.raises(ConfigError) as caught:
        command.run(trained)
    assert f"was trained on other data: {message}. Resume on the data that it began with" in str(caught.value)
    assert (trained.output_dir / "run.json").read_bytes() == before


def test_everything_that_differs_is_named_at_once(trained):
    describe(trained.data_train, spacing=(3.0, 3.0, 4.0), orientation="LPS")
    mirrored_image(trained.data_train)
    with pytest.raises(ConfigError, match=r"spacing was .*; orientation was .*; cases to train on changed .*c1"):
        command.run(trained)


def test_other_cases_are_named(trained):
    cases = read_prepared(trained.data_train).cases
    marks = {"c4": "test", "c3": "val"}
    cases = tuple(dataclasses.replace(case, split=marks.get(case.id, case.split)) for case in cases)
    describe(trained.data_train, cases=cases)
    with pytest.raises(ConfigError, match=r"train on changed \(no longer there: c3\); .*no longer there: c4; new: c3"):
        command.run(trained)


def test_another_folder_to_validate_on_is_refused(trained, tmp_path):
    other = _dataset(tmp_path / "other", cases=2, val=())
    with pytest.raises(ConfigError, match=r"cases to validate on changed \(no longer there: c4; new: c0, c1\)"):
        command.run(dataclasses.replace(trained, data_val=other))


def test_fewer_of_the_same_to_validate_on_are_no_change(trained):
    assert command.run(dataclasses.replace(trained, max_val_cases=1)) == 0


def test_the_same_data_elsewhere_are_taken(trained, tmp_path):
    moved = trained.data_train.rename(tmp_path / "moved")
    assert command.run(dataclasses.replace(trained, data_train=moved)) == 0


def test_ids_of_cases_are_not_in_the_checkpoint(trained):
    text = (trained.output_dir / "checkpoints/best/config.json").read_text()
    assert '"cases": {' in text and not any(f'"c{number}"' in text for number in range(5))


def test_runs_and_stores_of_earlier_versions_go_on(trained):
    file = trained.output_dir / "checkpoints/last/config.json"
    content = json.loads(file.read_text())
    del content["cases"]
    file.write_text(json.dumps(content))
    report = json.loads((trained.output_dir / "run.json").read_text())
    del report["data"]["digests"]
    (trained.output_dir / "run.json").write_text(json.dumps(report))
    assert command.run(trained) == 0
    describe(trained.data_train, spacing=(3.0, 3.0, 4.0))
    with pytest.raises(ConfigError, match="spacing was"):
        command.run(trained)


def test_a_store_without_checksums_still_tells_other_intensities(tmp_path):
    data = _dataset(tmp_path / "data")
    store = Store(data)

    def state():
        digests = {"train": case_digests(map(Store(data).entry, store.cases))}
        return {"data": {}, "cases": data_summary(digests)}, digests

    def changes(since):
        now, digests = state()
        return data_differences(since[0], now, since[1], digests)

    write_index(data / "store", [dataclasses.replace(store.entry(case), checksum="") for case in store.cases])
    without = state()
    assert without[0]["cases"]["train"]["voxels"] is None
    write_index(data / "store", [store.entry(case) for case in store.cases])
    assert changes(without) == []
    moved_label(data)
    assert changes(without) == []
    other_values(data)
    assert changes(without) == ["cases to train on changed (with other voxels: c0)"]


def test_a_finished_network_of_several_is_not_joined_by_one_of_other_data(trained, tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    trained.output_dir.rename(several / "member_0")
    moved_label(trained.data_train)
    report = several / "member_0/run.json"
    content = json.loads(report.read_text())
    content["configuration"]["data_train"] = str(trained.data_train)
    report.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"member_0.* was trained on other data: .*c2"):
        command.run(dataclasses.replace(trained, output_dir=several, members=2))


def said(data, data_val=None):
    """The setup of a training, and the notes that it begins with."""
    config = _config(data, None, data_val=data_val)
    setup = make_setup(config, read_prepared(data), read_prepared(data_val) if data_val else None, 1)
    return setup, data_notes(setup)


def test_validation_on_the_training_folder_is_said(whole, tmp_path):
    data, link, copy = shutil.copytree(whole / "data", tmp_path / "data"), tmp_path / "link", tmp_path / "copy"
    link.symlink_to(data)
    shutil.copytree(data, copy)
    what = "of 5 cases to validate on 4 are trained on too{} (c0, c1, c2, c3); scores tell nothing of unseen cases"
    same = f"--data_val is the folder of --data_train: {what.format('')}"
    for data_val, expected in (
        (data, same),
        (link, same),
        (copy, what.format(", by the voxels").replace("of 5", "Of 5")),
    ):
        assert said(data, data_val)[1] == (expected,)


def test_a_copy_on_the_other_side_of_the_split_is_said(tmp_path):
    data = _dataset(tmp_path / "data")
    assert said(data)[1] == ()
    write_again(data, "c4", image=Store(data).read_image("c1"))
    note = "Of 1 case to validate on 1 is trained on too, by the voxels (c4); scores tell nothing of unseen cases"
    assert said(data)[1] == (note,)


def test_the_same_scans_at_another_spacing_are_said(tmp_path):
    settings = preprocess_config(tmp_path)
    coarse = dataclasses.replace(settings, output_path=tmp_path / "coarse", spacing=(2, 2, 3))
    assert preprocess.run(settings) == preprocess.run(coarse) == 0
    data, data_val = settings.output_path, coarse.output_path
    # One by another version, which did not write down what it was made of.
    write_again(data_val, "c", fingerprint={"sources": [["where", 1, 2]]})
    note = "Of 3 cases to validate on 2 are trained on too, by the voxels (a, b); scores tell nothing of unseen cases"
    assert said(data, data_val)[1] == (note,)


def test_nothing_is_said_of_other_images(whole, tmp_path):
    other = _dataset(tmp_path / "other", cases=8, val=())
    describe(other, cases=tuple(case for case in read_prepared(other).cases if case.id in ("c5", "c6", "c7")))
    assert said(whole / "data", other)[1] == ()


def test_cases_in_no_list_of_the_split_are_said_and_reported(tmp_path):
    data = _dataset(tmp_path / "data")
    cases = read_prepared(data).cases
    describe(data, cases=tuple(dataclasses.replace(case, in_split=case.id != "c2") for case in cases))
    setup, notes = said(data)
    assert notes == ("cases in no list of the dataset's split, not trained on (1): c2",)
    report = new_report(tmp_path, setup, [])["data"]
    assert report["outside_split"] == ["c2"] and report["train"] == ["c0", "c1", "c3"]
