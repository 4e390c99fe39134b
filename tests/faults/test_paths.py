"""Odd names and paths: used or refused by name, nothing written elsewhere, inputs as they were."""

import json
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax.commands import evaluate, infer, preprocess
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError, MambaHomeError
from mambahome_jax.flags import EvaluateConfig, InferConfig, PreprocessConfig
from mambahome_jax.inference import batch
from mambahome_jax.patches.store import Store
from tests.commands.scans import scan, write
from tests.faults.fuzz_files import digest
from tests.faults.fuzz_worker import PROPERTIES
from tests.inference.models import Levels

GOOD = ["two words", "quo'te\"s", "[bold]x[red]", "Łódź-脳", "a" * 200, "$(touch x);&|", "-rf", "%s{0}"]
BAD = {
    "line\nbreak": "control characters",
    "tab\there": "control characters",
    "x" * 201: "201 bytes",
    "é" * 124: "248 b",
}


@pytest.fixture(autouse=True)
def _levels(monkeypatch):
    monkeypatch.setattr(batch, "load_model", lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES))


def outside(tmp_path, *outputs):
    """Everything below tmp_path but the outputs."""
    return sorted(path for path in tmp_path.rglob("*") if not any(path.is_relative_to(output) for output in outputs))


def run_all(tmp_path, data, names):
    """preprocess, infer and evaluate; reasons for what each of the first two refused."""
    ready, predicted, scored = (tmp_path / name for name in ("ready", "predicted", "scored"))
    before, there = digest([data]), outside(tmp_path, ready, predicted, scored)
    code = preprocess.run(PreprocessConfig(data, ready, spacing=(0, 0, 0), modality="ct", num_workers=1))
    assert code == (1 if len(names) < len(list(data.glob("images/*"))) else 0)
    infer.run(InferConfig(data, Path("model"), predicted))
    evaluate.run(EvaluateConfig(predicted, data / "labels", scored))
    assert sorted(Store(ready).cases) == sorted(names)
    assert {path.name.removesuffix(".nii.gz") for path in predicted.glob("*.nii.gz")} == set(names)
    assert {path.stem for path in predicted.glob("previews/*")} == set(names)
    assert outside(tmp_path, ready, predicted, scored) == there and digest([data]) == before
    found = {entry["id"]: entry["reason"] for entry in json.loads((ready / "dataset.json").read_text())["skipped"]}
    return found, {
        entry["id"]: entry["reason"] for entry in json.loads((predicted / "run.json").read_text())["failures"]
    }


def test_names_of_all_kinds(tmp_path, capsys):
    for name in [*GOOD, *BAD]:
        for kind, array in zip(("images", "labels"), scan(), strict=True):
            write(tmp_path / "plain.nii", array)
            (tmp_path / "in" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "plain.nii").rename(tmp_path / "in" / kind / f"{name}.nii")
    for reasons in run_all(tmp_path, tmp_path / "in", GOOD):
        assert reasons.keys() == {repr(name)[1:-1] for name in BAD}
        for name, words in BAD.items():
            assert words in reasons[repr(name)[1:-1]] and "\n" not in reasons[repr(name)[1:-1]]
    assert "Traceback" not in capsys.readouterr().out


def test_links_are_followed_and_said_and_what_they_name_stays(tmp_path, capsys):
    image, label = scan()
    write(tmp_path / "elsewhere/i.nii.gz", image)
    write(tmp_path / "elsewhere/l.nii.gz", label)
    for kind, name in (("images", "i"), ("labels", "l")):
        (tmp_path / "in" / kind).mkdir(parents=True)
        (tmp_path / "in" / kind / "a.nii.gz").symlink_to(tmp_path / "elsewhere" / f"{name}.nii.gz")
        (tmp_path / "in" / kind / "loop.nii.gz").symlink_to("loop.nii.gz")
        (tmp_path / "in" / kind / "gone.nii.gz").symlink_to("nowhere.nii.gz")
    for reasons in run_all(tmp_path, tmp_path / "in", ["a"]):
        assert reasons.keys() == {"loop", "gone"}
        assert "loop.nii.gz: " in reasons["loop"] and "gone.nii.gz: " in reasons["gone"]
    assert "2 files lie outside of" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../b", "..", "", "a\nb"])
def test_a_prepared_folder_cannot_send_us_elsewhere(tmp_path, name):
    for kind, array in zip(("images", "labels"), scan(), strict=True):
        write(tmp_path / f"in/{kind}/a.nii.gz", array)
    preprocess.run(PreprocessConfig(tmp_path / "in", tmp_path / "ready", spacing=(0, 0, 0), modality="ct"))
    file = tmp_path / "ready" / "dataset.json"
    content = json.loads(file.read_text())
    content["cases"][0]["id"] = name
    file.write_text(json.dumps(content))
    for read in (read_prepared, load_dataset):
        with pytest.raises(DatasetError, match=r"dataset.json: damaged \(ValueError: case .*expected|rename"):
            read(tmp_path / "ready")


def test_a_table_with_ids_and_paths_that_lead_elsewhere(tmp_path):
    image, _ = scan()
    write(tmp_path / "far/a.nii.gz", image)
    rows = [
        "id,image",
        "../up,../far/a.nii.gz",
        f"{'x' * 300},../far/a.nii.gz",
        "fine,../far/a.nii.gz",
        "/etc,/etc/passwd",
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cases.csv").write_text("\n".join(rows))
    dataset = load_dataset(tmp_path / "in")
    assert [case.id for case in dataset.cases] == ["fine"]
    reasons = dict(dataset.skipped)
    assert "a name that a file can have" in reasons["../up"] and "300 bytes" in reasons["x" * 300]
    assert "no scan by its name" in reasons["/etc"]
    assert "1 file lies outside of" in dataset.notes[1]


def test_results_of_a_scan_with_a_writable_array_leave_it_as_it_was(tmp_path):
    write(tmp_path / "in/a.nii", scan()[0].astype(np.float32))
    before = (tmp_path / "in/a.nii").read_bytes()
    assert infer.run(InferConfig(tmp_path / "in", Path("model"), tmp_path / "out")) == 0
    assert (tmp_path / "in/a.nii").read_bytes() == before


@pytest.mark.parametrize("flag", ["data", "output"])
@pytest.mark.parametrize("command", ["preprocess", "infer"])
def test_a_folder_that_is_a_link_to_itself_is_named(tmp_path, command, flag):
    for kind, array in zip(("images", "labels"), scan(), strict=True):
        write(tmp_path / f"in/{kind}/a.nii.gz", array)
    (tmp_path / "loop").symlink_to("loop")
    data, output = (tmp_path / "loop", tmp_path / "out") if flag == "data" else (tmp_path / "in", tmp_path / "loop")
    with pytest.raises(MambaHomeError, match="loop"):
        if command == "preprocess":
            preprocess.run(PreprocessConfig(data, output, modality="ct"))
        else:
            infer.run(InferConfig(data, Path("model"), output))
