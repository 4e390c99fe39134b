"""What a dataset's folders hold beside its cases is skipped with a reason or noted, never unseen."""

import dataclasses
import json

import numpy as np
import pytest

from mambahome_jax.commands import check, preprocess
from mambahome_jax.datasets.files import parts
from mambahome_jax.datasets.find_scans import find_scans
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import CheckConfig, PreprocessConfig
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from mambahome_jax.patches.store import Store
from tests.commands.scans import description, preprocess_config, reasons, write
from tests.datasets.test_layouts import touch
from tests.imaging.dicom_files import RTSTRUCT, write_slice
from tests.imaging.test_dicom_series import VOXELS, series

NNUNET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}


def skipped(folder):
    return dict(load_dataset(folder).skipped)


def test_images_and_labels(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "images/b.mgz", "images/c.img", "images/c.hdr")
    touch(tmp_path, "images/sub/d.nii.gz", "labels/e.nii.zst", "images/notes.txt", "images/.x", "images/_f.nii.gz")
    touch(tmp_path, "images/a.mgz", "extra/g.nii.gz", "labels/_f.nii.gz", "images/README")
    write_slice(tmp_path / "images/IM1", np.zeros((4, 5), np.int16))
    dataset = load_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["_f", "a"]
    found = dict(dataset.skipped)
    assert set(found) == {"b", "c", "sub", "e", "images", "extra"}
    assert "FreeSurfer" in found["b"] and "Analyze" in found["c"] and "zstd" in found["e"]
    assert "1 DICOM slice lies among other files, IM1 the first" in found["images"] and "d.nii.gz" in found["sub"]
    (note,) = dataset.notes
    assert "images/a.mgz" in note and "scans of no case (g.nii.gz)" in found["extra"]


@pytest.mark.parametrize("above", ["", "in/", "in/data/"])
def test_scans_beside_the_folders_of_a_dataset_are_named(tmp_path, above):
    touch(tmp_path, *(f"in/data/{part}/a.nii.gz" for part in ("images", "labels")))
    touch(tmp_path, *(f"{above}{name}" for name in ("stray.nii.gz", "other.mgz", "notes.txt", "._b.nii.gz")))
    dataset = load_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["a"] and dataset.notes == ()
    found = dict(dataset.skipped)
    assert set(found) == {"stray", "other"}
    assert all(f"{above}{name}" in found[name.split(".")[0]] for name in ("stray.nii.gz", "other.mgz"))


def test_nnunet_and_decathlon(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz", "imagesTr/c_0000.mgz")
    touch(tmp_path, "imagesTr/d_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    series(tmp_path / "imagesTr/e")
    (tmp_path / "dataset.json").write_text(json.dumps(NNUNET))
    found = skipped(tmp_path)
    assert set(found) == {"a_0001", "b", "c_0000", "d", "e"} and "of no case by its name" in found["b"]
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"1": "x"}}))
    touch(tmp_path, *(f"labelsTr/{name}.nii.gz" for name in ("b", "a_0000", "a_0001", "d_0000")))
    assert set(skipped(tmp_path)) == {"a", "c_0000", "e"}


@pytest.mark.parametrize("name", ["p9", "Patient 9"])
def test_a_folder_a_case(tmp_path, name):
    touch(tmp_path, "p1/ct.nii.gz", "p1/labels.nii.gz", "p2/ct.mgz", "p2/labels.mgz", "p1/t1.nii.gz", "notes/a.txt")
    touch(
        tmp_path, "p1/segmentations/liver.nii.gz", "masks/x.nii.gz", "out/a.nii.gz", "out/run.json", "p3/labels.nii.gz"
    )
    series(tmp_path / name / "study")
    series(tmp_path / "p1/dicom")
    dataset = load_dataset(tmp_path)
    found = dict(dataset.skipped)
    assert [case.id for case in dataset.cases] == ["p1"]
    assert set(found) == {"p2_ct", "p2_labels", "p3", name} and "scans of no case (study)" in found[name]
    (note,) = dataset.notes
    assert "t1.nii.gz" in note and "p1/dicom/" in note


def test_slices_in_folders_below_the_folder_of_their_case(tmp_path):
    series(tmp_path / "images/p1/study/one")
    touch(tmp_path, "labels/p1.nii.gz")
    dataset = load_dataset(tmp_path)
    assert [(case.id, case.image.name) for case in dataset.cases] == [("p1", "p1")] and dataset.skipped == ()


def test_preprocess_and_check_say_it_and_end_with_1(tmp_path, capsys):
    config = preprocess_config(tmp_path)
    (tmp_path / "in/images/d.mgz").write_bytes(b"x")
    assert preprocess.run(config) == 1
    assert "d.mgz: FreeSurfer's format" in reasons(config)["d"] and len(description(config)["cases"]) == 3
    assert "Skipped d: " in capsys.readouterr().out
    assert check.run(CheckConfig(tmp_path / "in", fast=True, json=tmp_path / "check.json")) == 1
    assert "FreeSurfer" in (tmp_path / "check.json").read_text()


def test_of_a_folder_of_several_series_one_is_chosen(tmp_path, capsys):
    series(series(tmp_path / "in/images/p1"), "1.2.5", "B{}", add=7)
    series(tmp_path / "in/images/p2", "1.2.6")
    for name in ("p1", "p2"):
        write(tmp_path / f"in/labels/{name}.nii.gz", np.ones((5, 4, 3), np.uint8), np.diag([-1.0, -1, 2.5, 1]))
    config = PreprocessConfig(tmp_path / "in", tmp_path / "out", spacing=(0, 0, 0), modality="ct", num_workers=1)
    assert preprocess.run(config) == 1
    assert "Choose one with --series UID" in reasons(config)["p1"]
    chosen = dataclasses.replace(config, series=("1.2.5",), orientation="LPS")
    assert preprocess.run(chosen) == 0
    np.testing.assert_array_equal(Store(tmp_path / "out").read_image("p1"), VOXELS[..., None] + 7.0)
    # Of another series it is another case.
    assert preprocess.run(dataclasses.replace(chosen, series=("1.2.3.4",))) == 0
    np.testing.assert_array_equal(Store(tmp_path / "out").read_image("p1"), VOXELS[..., None])
    assert "1 of 2 cases up to date" in capsys.readouterr().out
    assert check.run(CheckConfig(tmp_path / "in", series=("1.2.5",), fast=True)) == 0
    with pytest.raises(DatasetError, match=r"no series 9\.9; expected one of 1\.2\.3\.4, 1\.2\.5, 1\.2\.6"):
        preprocess.run(dataclasses.replace(config, series=("9.9",)))
    # Without labels each series of a folder is a scan of its own.
    assert check.run(CheckConfig(tmp_path / "in/images", fast=True, json=tmp_path / "check.json")) in (0, 1)
    assert json.loads((tmp_path / "check.json").read_text())["cases"] == 3


def test_a_folder_of_images_that_are_not_read_says_why(tmp_path):
    touch(tmp_path, "images/a.mgz", "labels/a.nii.gz")
    with pytest.raises(DatasetError, match=r"images: the folder holds no scan.*a\.mgz: FreeSurfer's format"):
        load_dataset(tmp_path)
    (tmp_path / "cases.csv").write_text("image\nimages/a.mgz\nlabels/a.nii.gz\n")
    assert "mgz is no scan by its name" in skipped(tmp_path)["line 2"] and "nibabel" in skipped(tmp_path)["line 2"]


def test_slices_below_other_files_are_part_of_a_case(tmp_path):
    folder = series(tmp_path / "p1/study").parent
    write_slice(folder / "RS1", np.zeros((4, 5), np.int16), sop_class=RTSTRUCT, series="1.2.9")
    touch(folder, "README.txt")
    assert [path.name for path in parts(folder)] == ["RS1", "IM0", "IM1", "IM2"]
    assert [path.name for path in parts(folder / "study")] == ["IM0", "IM1", "IM2"]


def test_check_of_scans_alone_takes_the_series_that_infer_takes(tmp_path, capsys):
    series(tmp_path / "in/p1/one", "1.2.5")
    series(tmp_path / "in/p2/one", "1.2.6")
    touch(tmp_path, "in/p2/segmentations/liver.nii.gz")
    config = CheckConfig(tmp_path / "in", series=("1.2.5",), fast=True, json=tmp_path / "check.json")
    assert check.run(config) in (0, 1)
    assert json.loads((tmp_path / "check.json").read_text())["cases"] == 1
    assert "folders of label maps" in " ".join(capsys.readouterr().out.split())


def test_label_maps_that_are_not_read_are_named(tmp_path):
    touch(tmp_path, *(f"images/p{number}.nii.gz" for number in range(1, 6)), "labels/p2.nii.gz", "labels/below/p3.nii")
    write_slice(tmp_path / "labels/p1.dcm", np.zeros((4, 5), np.int16), sop_class=RTSTRUCT)
    series(tmp_path / "labels/p4")
    touch(tmp_path, "labels/notes.txt", "labels/README", "labels/previews/p1.png")
    found = skipped(tmp_path)
    assert set(found) == {"p1", "p4", "below"} and "label maps of no case (p3.nii)" in found["below"]
    assert "p1.dcm: DICOM, which is not read as a label map" in found["p1"] and "labels/p4: DICOM" in found["p4"]


def test_parts_of_a_dataset_without_a_case_are_looked_into(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.zst", "labelsTs/c.mgz")
    series(tmp_path / "imagesTs/e")
    (tmp_path / "dataset.json").write_text(json.dumps(NNUNET))
    assert set(skipped(tmp_path)) == {"b", "c", "e"}


def test_of_a_case_without_its_scan_other_formats_are_named(tmp_path):
    touch(tmp_path, "BDMAP_00000001/ct.nii.gz", "BDMAP_00000001/combined_labels.nii.gz", "BDMAP_00000002/ct.mgz")
    touch(tmp_path, "loose.nii.gz")
    dataset = load_dataset(tmp_path)
    assert "FreeSurfer" in dict(dataset.skipped)["BDMAP_00000002_ct"] and "loose" in dict(dataset.skipped)


def test_series_of_several_folders_are_listed_with_their_folders_and_missing_ones_are_not_found(tmp_path):
    series(tmp_path / "p1/one", "1.2.5")
    series(tmp_path / "p1/two", "1.2.6")
    with pytest.raises(DatasetError, match=r"1\.2\.5: 3 slices of 5 x 4 \(CT\), first one/IM0\n.*first two/IM0"):
        read_volume(tmp_path / "p1")
    (tmp_path / "cases.csv").write_text("image\np1\np2\n")
    assert f"{tmp_path / 'p2'} not found; expected a path" in skipped(tmp_path)["line 3"]


def test_dot_files_beside_scans_are_named_once(tmp_path):
    for kind, array in (("images", np.zeros((4, 4, 4), np.int16)), ("labels", np.ones((4, 4, 4), np.uint8))):
        (tmp_path / kind).mkdir()
        write_volume(tmp_path / kind / "a.nii.gz", Volume(array, np.eye(4)))
        (tmp_path / kind / ".DS_Store").write_bytes(b"x")
    (tmp_path / "images/._a.nii.gz").write_bytes(b"x")
    note = f"1 dot file is left out: {tmp_path / 'images/._a.nii.gz'}"
    assert load_dataset(tmp_path).notes == (note,)
    assert find_scans(tmp_path / "images").notes == (note,)
    (tmp_path / "images/._a.nii.gz").unlink()
    assert load_dataset(tmp_path).notes == ()
