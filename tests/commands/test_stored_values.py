"""A network of structures 1, 2, ... whose label maps store other values: what infer writes, and what evaluate reads."""

import json

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.commands import evaluate, infer, report
from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import EvaluateConfig, InferConfig, ReportConfig
from mambahome_jax.imaging.volume import Volume, read_labels, write_volume
from mambahome_jax.inference import batch
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.inference.postprocess import ENTRIES
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, segment
from tests.commands.scans import AFFINE, write
from tests.inference.models import Levels

STORED = {1: 100, 2: 850}
NAMES = {1: "label_100", 2: "kidney left"}


def properties(values=STORED, names=NAMES, **changes):
    table = tuple(values.items())
    return DataProperties(spacing=None, labels=tuple(names.items()), values=table, patch_size=(16, 16, 32), **changes)


@pytest.fixture
def model(monkeypatch):
    """A model whose classes are intensity levels, in the place of what --model_path names."""
    found = Levels((0.0, 0.5, 1.0), metadata=properties())
    monkeypatch.setattr(batch, "load_model", lambda path, precision: found)
    return found


def numbers():
    """(20, 18, 12) of 0, 1, 2; the second structure has a small part apart."""
    labels = np.zeros((20, 18, 12), np.uint8)
    labels[3:8, 4:9, 2:8], labels[11:16, 8:15, 5:9], labels[18, 2, 2] = 1, 2, 2
    return labels


def stored(values=STORED):
    return np.array([0, *values.values()], np.uint16)[numbers()]


def segmented(folder, **changes):
    write(folder / "in/a.nii.gz", np.array([-175, 37.5, 250], np.float32)[numbers()])
    paths = {"data_path": folder / "in", "model_path": folder / "model", "output_dir": folder / "pred"}
    assert infer.run(InferConfig(**(paths | changes))) == 0
    return json.loads((folder / "pred/run.json").read_text())


def test_results_and_all_that_tells_of_them_hold_the_stored_values(tmp_path, model):
    found = segmented(tmp_path, save_probabilities=True)
    assert found["labels"] == {"100": "label_100", "850": "kidney left"} and found["values"] == {"1": 100, "2": 850}
    result = read_labels(tmp_path / "pred/a.nii.gz")
    assert result.array.dtype == np.uint16
    np.testing.assert_array_equal(result.array, stored())
    [comment] = nib.load(tmp_path / "pred/a.nii.gz").header.extensions
    assert json.loads(comment.get_content()) == {"labels": {"100": "label_100", "850": "kidney left"}}
    assert found["cases"][0]["volume_ml"]["kidney left"] == pytest.approx(np.sum(numbers() == 2) * 6 / 1000)
    assert "a,kidney left," in (tmp_path / "pred/volumes.csv").read_text()
    assert (tmp_path / "pred/previews/a.png").is_file()
    with np.load(tmp_path / "pred/a.npz") as shares:
        assert set(shares.files) == set(ENTRIES)
        assert json.loads(str(shares["labels"])) == {"0": "background", "1": "label_100", "2": "kidney left"}
    # Once more, it is known as whole.
    again = segmented(tmp_path, save_probabilities=True, skip_existing=True)
    assert again["cases"][0]["kept"] and again["cases"][0]["volume_ml"] == found["cases"][0]["volume_ml"]


@pytest.mark.parametrize("suffix", ["nii", "mha", "nrrd"])
def test_every_format_holds_the_stored_values(tmp_path, model, suffix):
    segmented(tmp_path, output_format=suffix, previews=False)
    np.testing.assert_array_equal(read_labels(tmp_path / f"pred/a.{suffix}").array, stored())


def test_structures_are_chosen_by_name_or_by_stored_value(tmp_path, model):
    found = segmented(tmp_path, labels=("850",), keep_largest=("left kidney",), previews=False)
    expected = np.where(stored() == 850, 850, 0)
    expected[18, 2, 2] = 0
    np.testing.assert_array_equal(read_labels(tmp_path / "pred/a.nii.gz").array, expected)
    assert found["labels"] == {"850": "kidney left"}
    with pytest.raises(ConfigError, match="--labels 2: the model has no such structure; expected some of label_100"):
        segmented(tmp_path, labels=("2",))


def test_segment_gives_what_infer_writes(model):
    scan = Volume(np.array([-175, 37.5, 250], np.float32)[numbers()], AFFINE)
    np.testing.assert_array_equal(segment(model, scan).array, stored())
    kept = segment(model, scan, keep_largest="all", labels=["kidney_left"]).array
    assert np.unique(kept).tolist() == [0, 850] and kept[18, 2, 2] == 0
    eight_bits = segment(Levels((0.0, 0.5, 1.0), metadata=properties({1: 128, 2: 255})), scan).array
    assert eight_bits.dtype == np.uint8 and np.unique(eight_bits).tolist() == [0, 128, 255]


def test_mirrors_swap_classes_and_not_stored_values():
    names = {1: "kidney left", 2: "kidney right"}
    model = Levels((0.0, 0.5, 1.0), metadata=properties(names=names, mirror=("LR", "AP", "IS")))
    scan = Volume(np.array([-175, 37.5, 250], np.float32)[numbers()], AFFINE)
    settings = Segmenter.of(model, SegmentOptions(tta=True)).settings
    assert all(max(pair) <= 2 for _, pairs in settings.mirrors for pair in pairs)
    assert set(np.unique(segment(model, scan, tta=True).array)) <= {0, 100, 850}


def test_networks_of_other_stored_values_do_not_vote_together():
    one, other = (Levels((0.0, 0.5, 1.0), metadata=properties(values)) for values in (STORED, {1: 100, 2: 200}))
    with pytest.raises(ConfigError, match="stored label values 100, 200 against 100, 850"):
        Ensemble.of([one, other])


def test_a_checkpoint_carries_the_values():
    content = json.loads(json.dumps(properties().to_json()))
    assert content["values"] == {"1": 100, "2": 850} and content["labels"] == {"1": "label_100", "2": "kidney left"}
    assert DataProperties.from_json(content) == properties()
    del content["values"]
    assert DataProperties.from_json(content).values == ()
    assert "values" not in DataProperties().to_json()
    labels = {"1": "a", "2": "b"}
    for wrong in ({"1": 70000}, {"1": 100}, {"1": 100, "2": 100}, {"1": 0, "2": 100}, [100, 850], None):
        with pytest.raises(ConfigError, match=r"values is .*expected a stored value of its own, 1 to 65535"):
            DataProperties.from_json({"labels": labels, "values": wrong})


class Folders:
    """Label maps as infer, preprocess, other programs and their users leave them, of one dataset."""

    def __init__(self, home, values=STORED, names=NAMES):
        self.home, self.values, self.names = home, values, names

    def save(self, folder, array, tables=()):
        for case in "ab":
            write_volume(self.home / folder / f"{case}.nii.gz", Volume(array, AFFINE))
        for name, content in tables:
            (self.home / name).write_text(json.dumps(content))
        return self.home / folder

    def predictions(self):
        labels = {str(self.values[number]): name for number, name in self.names.items()}
        content = {"labels": labels, "values": {str(number): value for number, value in self.values.items()}}
        return self.save("pred", stored(self.values), [("pred/run.json", content)])

    def prepared(self):
        content = {"labels": {str(number): name for number, name in self.names.items()}}
        content["values"] = {str(number): value for number, value in self.values.items()}
        return self.save("out/labels", numbers(), [("out/dataset.json", content)])

    def raw(self, named=False):
        labels = {str(self.values[number]): name for number, name in self.names.items()}
        tables = [("raw/dataset.json", {"labels": labels})] if named else []
        return self.save("raw/labels", stored(self.values), tables)

    def plain(self, array):
        return self.save("plain", array)


def dice(predictions, references, home, **flags):
    config = EvaluateConfig(predictions, references, home / "eval", num_workers=0, **flags)
    assert evaluate.run(config) == 0
    structures = json.loads((home / "eval/summary.json").read_text())["structures"]
    return {name: entry["dice"] for name, entry in structures.items()}


PERFECT = {"label_100": 1.0, "kidney left": 1.0}


@pytest.mark.parametrize(("values", "names"), [(STORED, NAMES), ({1: 1, 2: 4}, {1: "edema", 2: "label_4"})])
def test_predictions_score_against_every_form_of_the_references(tmp_path, values, names):
    folders = Folders(tmp_path, values, names)
    ours, perfect = folders.predictions(), dict.fromkeys(names.values(), 1.0)
    assert dice(ours, folders.raw(), tmp_path) == perfect
    assert dice(ours, folders.raw(named=True), tmp_path) == perfect
    assert dice(ours, folders.prepared(), tmp_path) == perfect
    # A copy of preprocess's label maps without the table beside them.
    assert dice(ours, folders.plain(numbers()), tmp_path) == perfect


def test_predictions_of_other_programs_hold_numbers_or_stored_values(tmp_path):
    folders = Folders(tmp_path)
    references = folders.prepared()
    assert dice(folders.plain(numbers()), references, tmp_path) == PERFECT
    assert dice(folders.plain(stored()), references, tmp_path) == PERFECT
    # Beside preprocess's label maps, whose table then is the first that is found.
    assert dice(folders.save("out/other", stored()), references, tmp_path) == PERFECT
    assert dice(references, folders.raw(), tmp_path) == PERFECT


def test_given_names_are_of_numbers_or_of_stored_values(tmp_path):
    folders = Folders(tmp_path)
    ours, references = folders.predictions(), folders.prepared()
    for table in ({"1": "ball", "2": "box"}, {"100": "ball", "850": "box"}):
        (tmp_path / "names.json").write_text(json.dumps({"labels": table}))
        for one in (references, folders.raw(), folders.plain(numbers())):
            assert dice(ours, one, tmp_path, labels=tmp_path / "names.json") == {"ball": 1, "box": 1}
    assert dice(folders.plain(stored()), references, tmp_path, labels=tmp_path / "out/dataset.json") == PERFECT


def test_what_a_case_does_not_label_is_left_out_by_any_numbers(tmp_path):
    folders = Folders(tmp_path)
    ours, references = folders.predictions(), folders.prepared()
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    content["cases"] = [{"id": case, "labelled": [2]} for case in "ab"]
    (tmp_path / "out/dataset.json").write_text(json.dumps(content))
    assert dice(ours, references, tmp_path) == {"kidney left": 1}
    page = ReportConfig(tmp_path / "eval", predictions=ours, references=references, worst=1)
    assert report.run(page) == 0
    assert "differ in 0 voxels" in (tmp_path / "eval/report.html").read_text()


def test_a_comparison_finds_the_structures_of_another_form(tmp_path):
    folders = Folders(tmp_path)
    dice(folders.predictions(), folders.raw(), tmp_path)
    (tmp_path / "eval").rename(tmp_path / "before")
    dice(folders.plain(numbers()), folders.prepared(), tmp_path, compare=tmp_path / "before")
    found = json.loads((tmp_path / "eval/comparison.json").read_text())
    assert not found["structures_only_here"] and not found["structures_only_there"]


def test_label_maps_that_share_no_value_are_named(tmp_path, capsys):
    folders = Folders(tmp_path)
    assert set(dice(folders.plain(numbers()), folders.raw(), tmp_path)) == {
        "label_1",
        "label_2",
        "label_100",
        "label_850",
    }
    shown = capsys.readouterr().out
    assert "the predictions hold label values 1, 2, the references 100, 850, and none of these" in shown


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_images_are_no_label_maps(tmp_path, capsys, side):
    folders = Folders(tmp_path)
    image = np.random.default_rng(0).integers(1, 200, (20, 18, 12)).astype(np.uint8)
    paths = {"predictions": folders.predictions(), "references": folders.raw()}
    write_volume(paths[side] / "b.nii.gz", Volume(image, AFFINE))
    assert evaluate.run(EvaluateConfig(**paths, output_dir=tmp_path / "eval", num_workers=0)) == 1
    [failure] = json.loads((tmp_path / "eval/summary.json").read_text())["failures"]
    assert failure["case"] == "b" and "expected a label map. Is this an image?" in failure["reason"]
