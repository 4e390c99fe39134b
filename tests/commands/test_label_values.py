"""Label maps whose values have gaps or lie above 255: numbered 1, 2, 3, ... by preprocess, named by check."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.commands.check import run as check
from mambahome_jax.commands.preprocess import run
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.flags import CheckConfig, PreprocessConfig
from mambahome_jax.imaging.volume import Volume, read_labels, write_volume
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing import dataset as preprocessing
from mambahome_jax.preprocessing.dataset import prepare_dataset
from tests.commands.scans import AFFINE, description, preprocess_config, reasons, scan, write


@pytest.fixture
def config(tmp_path):
    return replace(preprocess_config(tmp_path), spacing=(0, 0, 0))


def store_values(config, values, cases="abc", dtype=np.uint8, suffix=".nii.gz"):
    """Label maps with `values` in the place of 0, 1, 2."""
    for case in cases:
        (config.input_path / f"labels/{case}.nii.gz").unlink(missing_ok=True)
        path = config.input_path / f"labels/{case}{suffix}"
        write_volume(path, Volume(np.array(values, dtype)[scan()[1]], AFFINE))


def name_structures(config, labels):
    (config.input_path / "dataset.json").write_text(json.dumps({"labels": labels}))


def ranks(array):
    return np.unique(array, return_inverse=True)[1].reshape(array.shape)


def require_numbered(config, cases="abc"):
    """Label maps, store and index of OUT hold the ranks of the values that any case stores."""
    stored = {case: read_labels(next(config.input_path.glob(f"labels/{case}.*"))).array for case in cases}
    known = sorted({0}.union(*(np.unique(array).tolist() for array in stored.values())))
    store = Store(config.output_path)
    for case, array in stored.items():
        expected = np.searchsorted(known, array)[::-1, ::-1]  # LPS as RAS
        label = read_labels(config.output_path / f"labels/{case}.nii.gz").array
        np.testing.assert_array_equal(label, expected)
        np.testing.assert_array_equal(store.read_label(case), expected)
        values, counts = np.unique(expected, return_counts=True)
        assert store.entry(case).class_counts == dict(zip(values.tolist(), counts.tolist(), strict=True))
        for value in values[1:20]:
            assert (expected[tuple(store.class_positions(case, value).T)] == value).all()


@pytest.mark.parametrize(
    ("values", "dtype", "suffix"),
    [
        ((0, 255, 255), np.uint8, ".nii.gz"),
        ((0, 1, 4), np.uint8, ".nii.gz"),
        ((0, 100, 200), np.float32, ".nii.gz"),
        ((0, 205, 850), np.uint16, ".nii.gz"),
        ((0, 2, 2035), np.int32, ".nii"),
        ((0, 3, 600), np.int16, ".mha"),
        ((0, 300, 65535), np.uint16, ".nrrd"),
    ],
)
def test_values_without_names_are_numbered_by_what_occurs(config, capsys, values, dtype, suffix):
    store_values(config, values, dtype=dtype, suffix=suffix)
    assert check(CheckConfig(config.input_path, num_workers=1)) == 0
    assert run(config) == 0
    require_numbered(config)
    stored = sorted({*values} - {0})
    content = description(config)
    assert content["values"] == {str(number): value for number, value in enumerate(stored, 1)}
    assert content["labels"] == {str(number): f"label_{value}" for number, value in enumerate(stored, 1)}
    assert read_prepared(config.output_path).values == dict(enumerate(stored, 1))
    shown = capsys.readouterr().out
    assert f"{', '.join(map(str, stored))} " in shown and "infer writes" in shown
    # Once more changes nothing.
    before = {path: path.stat().st_mtime_ns for path in config.output_path.rglob("*.*") if path.name != "index.json"}
    assert run(config) == 0 and description(config) == content
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} <= {config.output_path / "dataset.json"}


def test_values_without_gaps_are_left_as_they_are(config, monkeypatch, capsys):
    monkeypatch.setattr(preprocessing, "renumber_case", None)
    assert run(config) == 0
    assert "values" not in description(config) and "structure 1" not in capsys.readouterr().out


def test_a_table_with_gaps_is_numbered_and_the_stored_values_are_kept(config, capsys):
    store_values(config, (0, 205, 850), dtype=np.uint16)
    name_structures(config, {"205": "ball", "850": "box"})
    assert run(config) == 0
    require_numbered(config)
    content = description(config)
    assert (content["labels"], content["values"]) == ({"1": "ball", "2": "box"}, {"1": 205, "2": 850})
    assert "205, 850 are structures 1, 2" in capsys.readouterr().out
    # Preprocessed once more, OUT still knows what its numbers stand for.
    assert load_dataset(config.output_path).values == {1: 205, 2: 850}
    # Who chooses structures numbers them.
    assert run(replace(config, labels=("box",), output_path=config.output_path.with_name("box"))) == 0
    chosen = json.loads((config.output_path.with_name("box") / "dataset.json").read_text())
    assert chosen["labels"] == {"1": "box"} and "values" not in chosen


def test_kept_cases_follow_the_values_of_all_cases(config, capsys):
    store_values(config, (0, 10, 30))
    assert run(config) == 0
    images = {path: path.stat().st_mtime_ns for path in (config.output_path / "images").iterdir()}
    store_values(config, (0, 20, 30), cases="b")
    assert run(config) == 0
    assert "1 done, 2 kept" in capsys.readouterr().out
    require_numbered(config)
    assert description(config)["values"] == {"1": 10, "2": 20, "3": 30}
    unchanged = {path for path, time in images.items() if path.stat().st_mtime_ns == time}
    assert {path.name for path in unchanged} == {"a.nii.gz", "c.nii.gz"}
    store_values(config, (0, 1, 2))
    assert run(config) == 0
    require_numbered(config)
    assert "values" not in description(config)


def test_cases_that_were_written_before_values_were_numbered_are_numbered_now(config, monkeypatch):
    store_values(config, (0, 100, 200))
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "numbering", lambda stored: {})
        assert run(config) == 0
    assert Store(config.output_path).entry("a").foreground_counts.keys() == {100, 200}
    assert run(config) == 0
    require_numbered(config)
    assert description(config)["values"] == {"1": 100, "2": 200}


def test_a_case_that_cannot_be_numbered_is_reported_and_done_again_next_time(config, monkeypatch):
    store_values(config, (0, 100, 200))
    rewrite = preprocessing.renumber_case

    def failing(job, **table):
        if job.case.id == "b":
            raise OSError("gone")
        return rewrite(job, **table)

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "renumber_case", failing)
        assert run(config) == 1
    assert reasons(config).keys() == {"b"} and Store(config.output_path).cases == ("a", "c")
    assert run(config) == 0
    require_numbered(config)


def test_a_checksum_is_of_the_numbers(config):
    assert run(config) == 0
    numbered = [Store(config.output_path).entry(case).checksum for case in "abc"]
    store_values(config, (0, 100, 200))
    assert run(config) == 0
    assert [Store(config.output_path).entry(case).checksum for case in "abc"] == numbered


def test_a_store_alone_gets_label_maps_of_its_numbers(config):
    store_values(config, (0, 100, 200))
    summary = prepare_dataset(load_dataset(config.input_path), config, store_only=True)
    require_numbered(config)
    assert [case.label for case in summary.prepared.cases] == [f"labels/{case}.nii.gz" for case in "abc"]
    (config.output_path / "labels/b.nii.gz").unlink()
    again = prepare_dataset(load_dataset(config.input_path), config, store_only=True)
    assert again.done == ("b",)
    require_numbered(config)


@pytest.mark.parametrize("stored", [(0, -1, 100001), (0, 614454277, -7)])
def test_a_label_map_table_takes_values_of_any_size(config, stored):
    store_values(config, stored, dtype=np.int32)
    (config.input_path.parent / "map.toml").write_text(f"ball = {stored[1]}\nbox = [{stored[2]}]\n")
    assert run(replace(config, label_map=config.input_path.parent / "map.toml")) == 0
    label = read_labels(config.output_path / "labels/a.nii.gz").array
    np.testing.assert_array_equal(label, scan()[1][::-1, ::-1])
    assert description(config)["labels"] == {"1": "ball", "2": "box"} and "values" not in description(config)


def test_more_than_255_structures(config):
    label = np.zeros((12, 16, 8), np.uint16)
    label[:, :, :3] = np.repeat(np.arange(6 * 16 * 3).reshape(6, 16, 3), 2, axis=0) + 5
    for case in "abc":
        write(config.input_path / f"labels/{case}.nii.gz", label)
    assert run(config) == 0
    require_numbered(config)
    assert len(description(config)["values"]) == 288


def test_a_stray_value_is_named_with_its_case(config, capsys):
    label = scan()[1]
    label[0, 0, 0] = 200
    write(config.input_path / "labels/b.nii.gz", label)
    assert run(config) == 0
    require_numbered(config)
    assert "label value 200 occurs in 1 voxel of b alone" in capsys.readouterr().out
    report = config.input_path.parent / "report.json"
    assert check(CheckConfig(config.input_path, json=report, num_workers=1)) == 1
    [finding] = [one for one in json.loads(report.read_text())["findings"] if one["kind"] == "label value"]
    assert (finding["case"], finding["severity"]) == ("b", "warning") and finding["file"].endswith("labels/b.nii.gz")
    assert finding["found"] == "label value 200 in 1 voxel"
    assert "stored label values 1, 2, 200 are structures 1, 2, 3" in capsys.readouterr().out


def test_a_small_structure_of_most_cases_is_no_stray_value(config, capsys):
    for case in "ab":
        label = scan()[1]
        label[0, 0, :2] = 3
        write(config.input_path / f"labels/{case}.nii.gz", label)
    assert run(config) == 0 and check(CheckConfig(config.input_path, num_workers=1)) == 0
    assert "alone" not in capsys.readouterr().out


def test_a_value_that_resampling_loses_is_named_and_no_structure(config, capsys):
    label = scan()[1]
    label[0, 1, 1] = 3
    write(config.input_path / "labels/b.nii.gz", label)
    assert run(replace(config, spacing=(4, 4, 6))) == 0
    assert description(config)["labels"] == {"1": "label_1", "2": "label_2"}
    assert "label value 3 is in no voxel at this spacing" in capsys.readouterr().out


def gradient(kind=np.uint8):
    """An MR image (12, 16, 8) of many values, all positive as those of a label map."""
    return (scan()[0] / 8 + 125 + 60 * np.random.default_rng(1).random((12, 16, 8))).clip(0, 200).astype(kind)


def copied_folder(folder):
    for part in ("images", "labels"):
        write(folder / part / "a.nii.gz", gradient())


def linked(folder):
    write(folder / "images/a.nii.gz", gradient())
    (folder / "labels").mkdir()
    (folder / "labels/a.nii.gz").symlink_to(folder / "images/a.nii.gz")


def named_twice(folder):
    write(folder / "scans/a.nii.gz", gradient())
    (folder / "cases.csv").write_text("id,image,label\na,scans/a.nii.gz,scans/a.nii.gz\n")


def in_another_format(folder):
    write(folder / "images/a.nii.gz", gradient().astype(np.int16))
    (folder / "labels").mkdir()
    write_volume(folder / "labels/a.nrrd", Volume(gradient().astype(np.float32), AFFINE))


def without_fractions(folder):
    write(folder / "images/a.nii.gz", gradient(np.float32))
    write(folder / "labels/a.nii.gz", gradient())


def with_names(folder):
    copied_folder(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "liver"}}))


def hounsfield(folder):
    for part in ("images", "labels"):
        write(folder / part / "a.nii.gz", scan()[0])


def one_of_two_channels(folder):
    table = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "tumour": 1},
        "file_ending": ".nii.gz",
    }
    for name, seed in (("imagesTr/a_0000", 0), ("imagesTr/a_0001", 1), ("labelsTr/a", 1)):
        write(folder / f"{name}.nii.gz", np.abs(scan(seed=seed)[0]))
    (folder / "dataset.json").write_text(json.dumps(table | {"numTraining": 1}))


IN_ONE_FILE = (copied_folder, linked, named_twice, with_names, hounsfield)
BY_VOXELS = (in_another_format, without_fractions, one_of_two_channels)


@pytest.mark.parametrize(
    ("give", "fast"), [*((give, False) for give in IN_ONE_FILE + BY_VOXELS), *((give, True) for give in IN_ONE_FILE)]
)
def test_an_image_is_no_label_map_of_its_own(tmp_path, capsys, give, fast):
    give(tmp_path / "in")
    assert check(CheckConfig(tmp_path / "in", num_workers=1, fast=fast, json=tmp_path / "report.json")) == 2
    errors = [
        one for one in json.loads((tmp_path / "report.json").read_text())["findings"] if one["severity"] == "error"
    ]
    assert [(one["case"], one["found"]) for one in errors] == [("a", "every voxel is as in its image")]
    config = PreprocessConfig(tmp_path / "in", tmp_path / "out", spacing=(0, 0, 0), num_workers=1, modality="mr")
    assert run(config) == 2
    assert "every voxel is as in its image; expected a label map" in capsys.readouterr().out


@pytest.mark.parametrize(("slope", "intercept"), [(1, 2000), (0.2, 500)])
def test_a_shifted_or_scaled_image_is_no_label_map(config, capsys, slope, intercept):
    for case in "ab":
        image = np.rint(scan()[0] * slope + intercept).astype(np.uint16)
        write(config.input_path / f"labels/{case}.nii.gz", image)
    write(config.input_path / "labels/c.nii.gz", scan()[1])
    assert run(config) == 1
    assert sorted(reasons(config)) == ["a", "b"]
    assert "values without a name, which change from voxel to voxel" in capsys.readouterr().out
    assert description(config)["labels"] == {"1": "label_1", "2": "label_2"}
    assert check(CheckConfig(config.input_path, num_workers=1)) == 1


def test_a_label_map_like_its_image_in_few_values_is_one(config):
    for case in "abc":
        image = scan()[1].astype(np.float32)
        image[0, 0, 0] = 0.5
        write(config.input_path / f"images/{case}.nii.gz", image)
    assert run(replace(config, modality="mr")) == 0
