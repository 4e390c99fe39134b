"""Results are kept where the same weights made them of the same scan; of all others something is said."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from flax import nnx

from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties
from mambahome_jax.imaging.volume import read_labels
from mambahome_jax.inference import batch
from mambahome_jax.weights.weights import digest_of
from tests.commands.scans import write
from tests.commands.test_infer_options import PROPERTIES, config, labels_of
from tests.imaging.dicom_files import write_slice
from tests.inference.models import Levels

ONE, TWO = (Levels(levels, metadata=PROPERTIES) for levels in ((0.0, 0.5, 1.0), (0.0, 1.0, 0.5)))


@pytest.fixture
def use(monkeypatch):
    """Function that puts a network in the place of whatever --model_path names."""

    def use(*models):
        waiting = list(models)
        monkeypatch.setattr(
            batch, "load_model", lambda path, precision: waiting.pop(0) if len(waiting) > 1 else waiting[0]
        )

    use(ONE)
    return use


@pytest.fixture
def settings(tmp_path, use):
    """Settings of a run that is done, with the results of one and two."""
    settings = config(tmp_path, skip_existing=True)
    assert infer.run(settings) == 0
    return settings


def again(settings, capsys):
    """The lines that another run prints about what was there, and the cases that it kept."""
    capsys.readouterr()
    assert infer.run(settings) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((settings.output_dir / "run.json").read_text())
    said = [line for line in lines if line.startswith(("Segmented again", "Note: "))]
    return said, [case["id"] for case in report["cases"] if case.get("kept")]


def found(settings, case):
    return read_labels(settings.output_dir / f"{case}.nii.gz").array


def test_results_of_the_same_weights_and_scans_are_kept_without_a_word(settings, capsys, tmp_path):
    assert again(settings, capsys) == ([], ["one", "two"])
    assert again(dataclasses.replace(settings, model_path=tmp_path / "elsewhere"), capsys) == ([], ["one", "two"])
    # Written again, the same scans are the same.
    for file in settings.data_path.iterdir():
        shutil.copy(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    assert again(settings, capsys) == ([], ["one", "two"])


def test_results_of_other_weights_at_the_same_path_are_made_again(settings, capsys, use):
    use(TWO)
    said = "Segmented again, as other weights made their results: one, two"
    assert again(settings, capsys) == ([said], [])
    np.testing.assert_array_equal(found(settings, "one"), np.array([0, 2, 1])[labels_of()])
    assert again(settings, capsys) == ([], ["one", "two"])


def test_results_of_another_ensemble_are_made_again(tmp_path, capsys, use):
    settings = config(tmp_path, skip_existing=True, model_path=(tmp_path / "a", tmp_path / "b"))
    use(ONE, ONE)
    assert infer.run(settings) == 0
    use(ONE, TWO)
    assert again(settings, capsys)[1] == []


def test_a_network_that_says_otherwise_how_scans_are_prepared_is_another(settings, capsys, use):
    use(Levels((0.0, 0.5, 1.0), metadata=dataclasses.replace(PROPERTIES, modality="mr")))
    assert again(settings, capsys)[1] == []


def test_a_scan_that_was_replaced_is_segmented_again(settings, capsys):
    scan = settings.data_path / "one.nii.gz"
    times = scan.stat()
    flipped = labels_of()[::-1]
    write(scan, np.array([-175, 37.5, 250], np.float32)[flipped])
    os.utime(scan, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = "Segmented again, as their scans changed since: one"
    assert again(settings, capsys) == ([said], ["two"])
    np.testing.assert_array_equal(found(settings, "one"), flipped)


def test_a_result_that_was_corrected_by_hand_is_kept_and_named(settings, capsys, use):
    mine = np.ones_like(labels_of())
    write(settings.output_dir / "one.nii.gz", mine)
    said = "Note: kept, but changed by somebody else after they were made: one"
    assert again(settings, capsys) == ([said], ["one", "two"])
    use(TWO)
    lines, kept = again(settings, capsys)
    assert kept == ["one"] and said in lines
    np.testing.assert_array_equal(found(settings, "one"), mine)


UNKNOWN = "Note: kept, but nothing says which weights and scans they were made of: one, two"


def test_results_of_another_program_are_kept_and_named(settings, capsys):
    (settings.output_dir / "run.json").unlink()
    assert again(settings, capsys) == ([UNKNOWN], ["one", "two"])
    assert again(settings, capsys) == ([UNKNOWN], ["one", "two"])


def test_results_of_an_earlier_version_are_kept_and_named(settings, capsys):
    file = settings.output_dir / "run.json"
    report = json.loads(file.read_text())
    for case in report["cases"]:
        del case["made_from"]
    file.write_text(json.dumps(report))
    assert again(settings, capsys) == ([UNKNOWN], ["one", "two"])
    assert again(dataclasses.replace(settings, keep_largest=("all",)), capsys)[0] == [
        UNKNOWN,
        "Note: some of those that are kept were made by another --keep_largest: one, two",
    ]


def test_results_in_another_format_beside_tell_nothing_of_those_that_are_there(settings, capsys):
    assert infer.run(dataclasses.replace(settings, output_format="nrrd")) == 0
    # run.json is about the others now.
    assert again(settings, capsys) == ([UNKNOWN], ["one", "two"])
    assert again(dataclasses.replace(settings, keep_largest=("all",)), capsys) == ([UNKNOWN], ["one", "two"])


def test_notes_beside_the_slices_of_a_scan_are_no_part_of_it(tmp_path, capsys, use):
    settings = dataclasses.replace(config(tmp_path), data_path=tmp_path / "dicom", skip_existing=True)
    for number in range(20):
        place = tmp_path / f"dicom/one/IM{number}"
        write_slice(place, np.full((18, 12), 20 * number - 175, np.int16), (0, 0, number), number=number)
    assert infer.run(settings) == 0
    for name in ("notes.txt", "DICOMDIR", "report.pdf"):
        (tmp_path / "dicom/one" / name).write_bytes(b"seen")
    assert again(settings, capsys) == ([], ["one"])
    place.write_bytes(place.read_bytes()[:-2] + b"\1\1")
    assert again(settings, capsys)[0] == ["Segmented again, as their scans changed since: one"]


def test_what_a_stopped_run_made_is_known(tmp_path, capsys, use, monkeypatch):
    settings = config(tmp_path, skip_existing=True)

    def stopped(*arguments, **named):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(batch, "write_json", stopped)
        infer.run(settings)
    assert not (settings.output_dir / "run.json").exists()
    assert again(settings, capsys) == ([], ["one", "two"])
    assert not [path for path in settings.output_dir.iterdir() if path.name.startswith(".")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        use(TWO)
        patch.setattr(batch, "write_json", stopped)
        infer.run(settings)
    with (settings.output_dir / ".results.jsonl").open("a") as file:
        file.write('{"id": "two", "made_')
    assert again(settings, capsys) == ([], ["one", "two"])


def test_a_digest_is_of_all_weights_and_of_what_goes_with_them():
    assert digest_of(ONE) == digest_of(Levels((0.0, 0.5, 1.0), metadata=PROPERTIES)) != digest_of(TWO)
    others = [dataclasses.replace(PROPERTIES, spacing=(1.0, 1.0, 1.0)), DataProperties(labels=((1, "liver"),)), None]
    assert len({digest_of(Levels((0.0, 0.5, 1.0), metadata=said)) for said in (PROPERTIES, *others)}) == 4
    assert digest_of(lambda windows: windows) == ""


def test_a_digest_does_not_depend_on_the_order_of_attributes():
    class Network(nnx.Module):
        def __init__(self, names):
            for name in names:
                setattr(self, name, nnx.Param(np.full(2, ord(name), np.float32)))

    assert digest_of(Network("ab")) == digest_of(Network("ba")) != digest_of(Network("ac"))
