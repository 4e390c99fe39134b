"""check on small datasets with one fault each: the finding, its severity and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.commands.check import run
from mambahome_jax.commands.preprocess import run as preprocess
from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.flags import CheckConfig, PreprocessConfig
from mambahome_jax.preprocessing import examine
from mambahome_jax.support import processes
from mambahome_jax.support.processes import WorkerDied
from tests.commands import odd_cases as odd
from tests.commands import test_preprocess_faults as faults
from tests.commands.scans import AFFINE, scan, write
from tests.datasets.miniatures import MINIATURES


@pytest.fixture
def folder(tmp_path):
    """Six sound cases a to f."""
    for seed, name in enumerate("abcdef"):
        image, label = scan(seed=seed)
        write(tmp_path / f"in/images/{name}.nii.gz", image)
        write(tmp_path / f"in/labels/{name}.nii.gz", label)
    return tmp_path / "in"


def report(folder: Path, **settings) -> dict:
    """Exit code and JSON of a check in this process."""
    file = folder.parent / "report.json"
    code = run(CheckConfig(folder, json=file, num_workers=1, **settings))
    content = json.loads(file.read_text())
    assert content["exit_code"] == code
    return content


def only(content: dict, **wanted) -> dict:
    """The one finding with these entries."""
    found = [item for item in content["findings"] if all(item[key] == value for key, value in wanted.items())]
    assert len(found) == 1, content["findings"]
    return found[0]


def test_a_label_map_stored_another_way_is_noted(folder):
    """Its voxels lie where the image's do; nothing has to be done."""
    stored = nib.load(folder / "labels/c.nii.gz")
    nib.save(stored.as_reoriented([[0, -1], [2, 1], [1, 1]]), folder / "labels/c.nii.gz")
    content = report(folder)
    finding = only(content, case="c", kind="orientation")
    assert (finding["severity"], content["exit_code"]) == ("note", 0)
    assert "voxels stored as" in finding["found"]


def test_a_sound_dataset_is_clean_and_summarised(folder, capsys):
    content = report(folder)
    assert (content["exit_code"], content["findings"], content["usable"]) == (0, [], 6)
    assert content["counts"] == {"error": 0, "warning": 0, "note": 0}
    summary = content["summary"]
    assert summary["spacing_mm"]["median"] == [2, 1, 3] and summary["shape"]["max"] == [12, 16, 8]
    assert summary["cases"] == [["-", "-", 6, 6]]
    liver = summary["structures"][0]
    # 4 x 6 x 3 voxels of 6 mm3.
    assert (liver["value"], liver["cases"], liver["ml"]["median"]) == (1, 6, [0.432])
    images = [scan(seed=seed) for seed in range(6)]
    lows = [image.min() for image, _ in images]
    medians = [np.median(image[label > 0]) for image, label in images]
    assert summary["intensities"][0]["percentiles"][0] == np.median(lows)
    assert summary["intensities"][0]["foreground"][3] == np.median(medians)
    assert summary["plan"]["spacing"][0] == [2, 1, 3] and summary["modality"] == "ct"
    shown = capsys.readouterr().out
    assert (
        "spacing 2 1 3: the median" in shown
        and "READY --modality ct" in shown
        and "6 of 6 cases can be preprocessed; nothing found" in shown
    )


@pytest.mark.parametrize(
    ("break_case", "words"),
    [
        (faults.truncated, "truncated"),
        (faults.too_few_voxels, "truncated"),
        (faults.nan, "1 voxel is NaN"),
        (faults.four_dimensions, "4D volume (12, 16, 8, 2)"),
        (faults.other_shape, "grid of 12 x 16 x 9 voxels"),
        (faults.shifted, "up to 1.5 mm (0.5 voxels)"),
        (faults.unknown_values, "unknown label values 9, 200"),
        (faults.values_above_65535, "label values from 0 to 180000"),
        (faults.image_as_label, "every voxel is as in its image"),
        (faults.fractional_label, "label value 0.5"),
        (faults.label_without_image, "has no image"),
    ],
)
def test_what_preprocess_refuses_is_an_error(folder, capsys, break_case, words):
    break_case(folder)
    content = report(folder)
    finding = only(content, severity="error")
    assert finding["case"] == "b" and words in finding["found"] and finding["action"]
    assert content["exit_code"] == 1
    # The same words as preprocess, so that nobody has to guess whether it is the same fault.
    capsys.readouterr()
    assert preprocess(PreprocessConfig(folder, folder.parent / "out", spacing=(2, 1, 3), num_workers=1)) == 1
    assert finding["found"] in capsys.readouterr().out


def test_several_faults_of_one_case_are_all_named(folder):
    faults.unknown_values(folder)
    label = nib.load(folder / "labels/b.nii.gz")
    affine = AFFINE.copy()
    affine[0, 3] += 4
    write(folder / "labels/b.nii.gz", np.asarray(label.dataobj), affine)
    faults.truncated(folder)
    errors = [item for item in report(folder)["findings"] if item["severity"] == "error"]
    assert [(item["kind"], item["case"]) for item in errors] == [("grid", "b"), ("image file", "b"), ("label", "b")]


def test_no_damaged_file_stops_it_and_nothing_usable_is_2(folder, capsys):
    odd.damaged_files(folder)
    content = report(folder)
    assert (content["exit_code"], content["usable"]) == (2, 0)
    assert sorted({item["case"] for item in content["findings"] if item["severity"] == "error"}) == list("abcdef")
    assert report(folder, fast=True)["exit_code"] in (1, 2)
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_case", "kind", "words"),
    [
        (odd.constant, "intensity", "all voxels are 7"),
        (odd.no_air, "intensity", "values from 24 to"),
        (odd.empty_label, "label", "every voxel is background"),
        (odd.no_background, "label", "no voxel is background"),
        (odd.no_label, "missing", "no label map"),
        (odd.same_voxels, "duplicate", "the same image as a"),
        (odd.sheared, "affine", "5.7 degrees off a right angle"),
        (odd.forms_disagree, "header", "sform and qform lie up to 6 mm (2 voxels) apart"),
        (odd.pixdim_disagrees, "header", "pixdim 1 x 1 x 1 mm, but spacing 2 x 1 x 3 mm in the sform"),
        (odd.no_form, "header", "neither sform nor qform"),
        (odd.coarse, "spacing", "spacing 2 x 1 x 24 mm, far off along S-I"),
        (odd.long, "shape", "shape 12 x 16 x 40 voxels, far off along S-I"),
        (odd.structure_in_no_case, "structure", "label 3 (pancreas) occurs in none of 6 label maps"),
    ],
)
def test_what_is_worth_a_look_is_a_warning(folder, break_case, kind, words):
    break_case(folder)
    content = report(folder)
    assert (content["exit_code"], content["usable"]) == (1, 6)
    findings = [item for item in content["findings"] if item["severity"] == "warning" and item["kind"] == kind]
    assert findings and all(item["case"] in ("b", "") and words in item["found"] for item in findings), content
    assert all(item["action"] for item in findings)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (odd.oblique, "oblique", "turned by 11.5 degrees"),
        (odd.mirrored, "orientation", "stored as RPS, of the other handedness; 5 of 6 scans are LPS"),
        (odd.little_off, "shift", "0.05 mm (0.025 voxels)"),
    ],
)
def test_what_needs_no_mending_is_a_note(folder, change, kind, words):
    change(folder)
    content = report(folder)
    assert (content["exit_code"], content["counts"]["error"], content["counts"]["warning"]) == (0, 0, 0)
    findings = [item for item in content["findings"] if item["kind"] == kind]
    assert findings and all(item["case"] == "b" and words in item["found"] for item in findings)


@pytest.mark.parametrize(
    ("break_case", "words"),
    [
        (faults.four_dimensions, "4D volume"),
        (faults.other_shape, "grid of"),
        (faults.shifted, "1.5 mm"),
        (odd.forms_disagree, "sform"),
        (odd.coarse, "24 mm"),
    ],
)
def test_fast_finds_what_headers_show(folder, break_case, words):
    break_case(folder)
    content = report(folder, fast=True)
    assert content["exit_code"] == 1
    assert any(words in item["found"] for item in content["findings"])
    assert content["summary"]["structures"] == [] and content["summary"]["intensities"] == []


def test_fast_finds_copied_files_and_reads_no_voxels(folder):
    (folder / "images/b.nii.gz").write_bytes((folder / "images/a.nii.gz").read_bytes())
    faults_too = scan()[0].astype(np.float32)
    faults_too[0, 0, 0] = np.nan
    write(folder / "images/c.nii.gz", faults_too)
    content = report(folder, fast=True)
    assert only(content, kind="duplicate")["case"] == "b"
    assert content["counts"]["error"] == 0


def test_several_processes_find_the_same(folder):
    for seed, name in enumerate("ghijkl", start=6):
        for kind, array in zip(("images", "labels"), scan(seed=seed), strict=True):
            write(folder / f"{kind}/{name}.nii.gz", array)
    faults.nan(folder)
    same_voxels_of_a = (folder / "images/a.nii.gz").read_bytes()
    (folder / "images/k.nii.gz").write_bytes(same_voxels_of_a)
    alone = report(folder)
    run(CheckConfig(folder, json=folder.parent / "two.json", num_workers=2))
    together = json.loads((folder.parent / "two.json").read_text())
    assert {**alone, "seconds": 0} == {**together, "seconds": 0}
    assert len(alone["findings"]) == 2


def test_many_small_cases_are_handed_over_in_batches(folder, monkeypatch):
    alone = report(folder)
    asked = []

    def run_jobs(function, jobs, workers, *, threads, batch):
        asked.append(batch)
        return processes.run_jobs(function, jobs, workers, threads=threads, batch=batch)

    monkeypatch.setattr(examine, "run_jobs", run_jobs)
    monkeypatch.setattr(examine, "_THREAD_BELOW", 2)
    monkeypatch.setattr(examine, "_BATCH", 3)
    monkeypatch.setattr(examine, "_BATCHES", 1)
    run(CheckConfig(folder, json=folder.parent / "batches.json", num_workers=2))
    assert {**alone, "seconds": 0} == {**json.loads((folder.parent / "batches.json").read_text()), "seconds": 0}
    assert asked == [3]


def test_a_case_whose_process_died_is_a_finding(folder, monkeypatch):
    def run_jobs(function, jobs, workers, **_):
        results = {"a": WorkerDied("its process was killed"), "b": MemoryError("3 GiB"), "c": ZeroDivisionError("x")}
        for job in jobs:
            yield job, results.get(job.case.id) or function(job)

    monkeypatch.setattr(examine, "run_jobs", run_jobs)
    content = report(folder)
    found = {item["case"]: item["found"] for item in content["findings"] if item["severity"] == "error"}
    assert found == {
        "a": "its process was killed",
        "b": "out of memory (3 GiB)",
        "c": "ZeroDivisionError: x",
    }


def test_long_lists_are_cut_in_the_terminal_only(folder, capsys):
    for name in "abcdef":
        write(folder / f"labels/{name}.nii.gz", np.zeros((12, 16, 8), np.uint8))
    content = report(folder, show=2)
    assert sum(item["kind"] == "label" for item in content["findings"]) == 6
    assert "and 4 more: --show 0 lists all" in capsys.readouterr().out
    report(folder, show=0)
    assert "more: --show" not in capsys.readouterr().out


def test_a_pipe_in_the_place_of_a_scan_is_no_wait(folder):
    import os

    from mambahome_jax.imaging.volume import read_volume

    os.mkfifo(folder / "pipe.nii")
    with pytest.raises(DatasetError, match="not a regular file"):
        read_volume(folder / "pipe.nii")


def test_wrong_usage(folder, tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        run(CheckConfig(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="cannot be written"):
        run(CheckConfig(folder, json=tmp_path / "missing/report.json", num_workers=1))


def test_from_the_command_line(folder):
    faults.nan(folder)
    command = [sys.executable, "-m", "mambahome_jax", "check", str(folder), "--num_workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "1 voxel is NaN" in result.stdout and "Traceback" not in result.stderr
    assert subprocess.run([*command, "--fast"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", MINIATURES)
def test_in_every_layout_the_errors_are_the_cases_that_preprocess_skips(name, tmp_path):
    miniature = MINIATURES[name](tmp_path / "in")
    content = report(miniature.folder)
    errors = {item["case"] for item in content["findings"] if item["severity"] == "error"}
    assert errors == set(miniature.skipped)
    assert content["layout"] == miniature.layout and content["exit_code"] in (0, 1)
    remarks = {item["case"]: item["found"] for item in content["findings"] if item["kind"] == "label"}
    assert all(words in remarks[case] for case, words in miniature.remarks.items())
