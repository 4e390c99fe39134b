"""What a folder holds, down to its last level: every scan under a name of its own, all else with a reason."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mambahome_jax.datasets import scans
from mambahome_jax.datasets.files import fault_of_name, listing
from mambahome_jax.datasets.find_scans import find_scans
from mambahome_jax.datasets.scans import search
from mambahome_jax.errors import DatasetError
from tests.imaging.dicom_files import RTSTRUCT, write_slice
from tests.imaging.test_dicom_series import series, without_preamble

ZEROS = np.zeros((4, 5), np.int16)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names_in(folder, **options):
    return {found.name: found.path.relative_to(folder).as_posix() for found in search(folder, **options).scans}


def test_series_at_every_level_are_scans_named_after_their_folders(tmp_path):
    series(tmp_path / "anna")
    series(tmp_path / "bert/series7")
    series(tmp_path / "cleo/20240101/CT")
    series(tmp_path / "cleo/20240301/CT")
    series(tmp_path / "dora", name="I{}")
    for path in (tmp_path / "dora").iterdir():
        without_preamble(path)
    touch(tmp_path, "emil/scan.nii.gz", "emil/deeper/scan.mha", "_fritz.nii", "gina.nrrd")
    assert names_in(tmp_path) == {
        **{"anna": "anna", "bert_series7": "bert/series7", "dora": "dora", "gina": "gina.nrrd"},
        **{"cleo_20240101_CT": "cleo/20240101/CT", "cleo_20240301_CT": "cleo/20240301/CT"},
        **{"emil_scan": "emil/scan.nii.gz", "emil_deeper_scan": "emil/deeper/scan.mha", "_fritz": "_fritz.nii"},
    }
    assert search(tmp_path).failures == ()


def test_series_of_one_folder_are_told_apart_by_number_or_uid(tmp_path):
    for uid, name in (("1.2.30.1", "a{}"), ("1.2.31.1", "b{}")):
        series(tmp_path / "uids", uid, name)
    assert [(found.name, found.series, found.one_of_several) for found in search(tmp_path).scans] == [
        ("uids_30.1", "1.2.30.1", True),
        ("uids_31.1", "1.2.31.1", True),
    ]
    for number, uid, name in (("2", "1.2.30.1", "a{}"), ("301", "1.2.31.1", "b{}")):
        for path in series(tmp_path / "numbers", uid, name).glob(name.format("*")):
            content = path.read_bytes().replace(
                b" \0\x11\0IS\2\0" + b"7 ", b" \0\x11\0IS\4\0" + number.encode().ljust(4)
            )
            path.write_bytes(content)
    assert set(names_in(tmp_path)) == {"uids_30.1", "uids_31.1", "numbers_2", "numbers_301"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("x.mgz", "FreeSurfer"),
        ("x.img", "Analyze or NIfTI pair"),
        ("x.nii.zst", "zstd -d x.nii.zst"),
        ("x.NHDR", "NRRD with its voxels"),
        ("x.PAR", "PAR/REC"),
        ("x.mnc", "MINC"),
        ("x+orig.HEAD", "AFNI"),
        ("x.tif", "TIFF"),
        ("x.gipl.gz", "GIPL"),
    ],
)
@pytest.mark.parametrize("below", ["", "p1/"])
def test_formats_that_are_not_read_are_named_with_what_to_do(tmp_path, file, words, below):
    touch(tmp_path, "a.nii.gz", below + file)
    ((name, reason),) = search(tmp_path).failures
    assert name.startswith(f"{below.replace('/', '_')}x") and reason.startswith(f"{tmp_path / below / file}: ")
    assert words in reason and "Convert it" in reason
    assert list(names_in(tmp_path)) == ["a"]


def test_slices_with_the_ending_of_another_format_are_slices(tmp_path):
    series(tmp_path / "p1", name="I{}.img")
    series(tmp_path / "p2", name="I{}.raw")
    touch(tmp_path, "p3/a.img", "p3/a.hdr", "p3/b.raw")
    found = search(tmp_path)
    assert [one.name for one in found.scans] == ["p1", "p2"] and [name for name, _ in found.failures] == ["p3_a"]
    with pytest.raises(DatasetError, match=r"I0\.img: a DICOM file; .*name the folder of the slices"):
        find_scans(tmp_path / "p1/I0.img")


def test_halves_of_one_image_are_named_once(tmp_path):
    touch(tmp_path, "a.img", "a.hdr", "b.PAR", "b.REC", "c.hdr", "d+orig.HEAD", "d+orig.BRIK.gz")
    assert [name for name, _ in search(tmp_path).failures] == ["a", "b", "c", "d+orig"]


def test_files_under_another_name_are_known_by_their_content(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    for name in ("a.nii", "b.nii.gz"):
        nib.save(image, tmp_path / name)
    (tmp_path / "a.nii").rename(tmp_path / "scan1")
    (tmp_path / "b.nii.gz").rename(tmp_path / "scan2.download")
    (tmp_path / "scan3").write_bytes(b"NRRD0004\ntype: short\n")
    reasons = dict(search(tmp_path).failures)
    assert "scan1: NIfTI by its content, but not by its name. Rename it to scan1.nii" in reasons["scan1"]
    assert "Rename it to scan2.download.nii.gz" in reasons["scan2.download"] and "NRRD" in reasons["scan3"]


def test_what_is_no_scan_is_passed_over(tmp_path):
    series(tmp_path / "p1")
    touch(tmp_path, "p1/DICOMDIR", "p1/notes.txt", "p1/p1.json", "list.csv", "README", ".DS_Store", "._a.nii.gz")
    touch(tmp_path, "__MACOSX/a.nii.gz", ".hidden/b.nii.gz", "p1/thumb.png", "p1/d.raw")
    found = search(tmp_path)
    assert list(names_in(tmp_path)) == ["p1"] and found.failures == () and found.notes == ()
    write_slice(tmp_path / "p2/RS1", ZEROS, sop_class=RTSTRUCT, series="1.2.9")
    touch(tmp_path, "labels/p1.nii.gz", "p1/segmentations/liver.nii.gz", "results/run.json", "results/p1.nii.gz")
    touch(tmp_path, "mine/p1.nii.gz")
    found = search(tmp_path, leave=(tmp_path / "mine",))
    assert [one.name for one in found.scans] == ["p1"] and found.failures == ()
    said = " ".join(found.notes)
    assert "p2/RS1" in said and "labels" in said and "p1/segmentations" in said and "results" in said


def test_names_never_collide(tmp_path):
    touch(tmp_path, "a_b/c.nii.gz", "a/b_c.nii.gz", "x/s.nii.gz", "x/s.mha", "y.nii.gz", "y/1.dcm")
    touch(tmp_path, f"{'d' * 120}/{'e' * 120}/f.nii.gz", f"{'d' * 120}/{'e' * 120}/g.nii.gz")
    found = search(tmp_path)
    names = [one.name for one in found.scans]
    assert {"a_b__c", "a__b_c"} <= set(names) and len(names) == len(set(names)) == 4
    assert all(fault_of_name(name) == "" for name in names)
    assert [name for name, _ in found.failures] == ["y", "x__s"]
    assert "s.mha and s.nii.gz would have one name" in found.failures[1][1]


def test_links_in_a_circle_and_folders_too_deep(tmp_path):
    touch(tmp_path, "p/a.nii.gz", "1/2/3/4/5/6/7/8/9/10/b.nii.gz")
    (tmp_path / "p/again").symlink_to(tmp_path)
    found = search(tmp_path)
    assert list(names_in(tmp_path)) == ["p_a"]
    ((_, reason),) = found.failures
    assert "more than 8 folders down" in reason and str(tmp_path / "1/2/3") in reason


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii.gz", "p/b.nii.gz", "q/c.nii.gz")
    scandir = os.scandir

    def refusing(folder):
        if str(folder).endswith("p"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    ((name, reason),) = search(tmp_path).failures
    assert name == "p" and reason == f"{tmp_path / 'p'}: cannot be read: Permission denied"
    assert list(names_in(tmp_path)) == ["a", "q_c"]


def test_a_dataset_names_its_cases_and_what_it_does_not_know_is_a_scan_too(tmp_path):
    touch(tmp_path, "p1/ct.nii.gz", "p1/labels.nii.gz", "p2/ct.nii.gz", "p4/labels.nii.gz")
    series(tmp_path / "p3")
    found = find_scans(tmp_path)
    assert {scan.case: scan.path.name for scan in found.scans} == {"p1": "ct.nii.gz", "p2_ct": "ct.nii.gz", "p3": "p3"}
    assert found.failures == [] and "p4_labels" in " ".join(found.notes)


def test_series_of_a_case_are_called_as_its_label_map_is(tmp_path):
    series(tmp_path / "images/p1/20240101/CT")
    series(series(tmp_path / "images/p2"), "1.2.5", "B{}")
    series(tmp_path / "images/p3")
    series(tmp_path / "images/p4/a", "1.2.6")
    series(tmp_path / "images/p4/b", "1.2.7")
    series(tmp_path / "images/p6/a", "1.2.8")
    touch(tmp_path, *(f"labels/p{number}.nii.gz" for number in range(1, 6)))
    expected = {"p1", "p2_4", "p2_5", "p3", "p4_a", "p4_b", "p6"}
    for folder in (tmp_path, tmp_path / "images"):
        scans = {scan.case: scan for scan in find_scans(folder).scans}
        assert set(scans) == expected
        assert scans["p1"].path == tmp_path / "images/p1/20240101/CT"
    (one,) = [scan for scan in find_scans(tmp_path, ["1.2.5"]).scans if scan.path.name == "p2"]
    assert one.series == ("1.2.5",)
    (tmp_path / "images").rename(tmp_path / "scans")
    (tmp_path / "cases.csv").write_text("id,image,label\none,scans/p1,labels/p1.nii.gz\ntwo,scans/p2,\n")
    found = find_scans(tmp_path)
    assert {scan.case for scan in found.scans} == {"one", "two_4", "two_5"} and found.failures == []
    (one,) = [scan for scan in find_scans(tmp_path, ["1.2.5"]).scans if scan.case != "one"]
    assert one.case == "two_5"


def test_label_maps_of_a_dataset_below_its_scans_are_no_scans(tmp_path):
    touch(tmp_path, "100000_00001_0000.nii.gz", "100000_00002_0000.nii.gz", "more/x.nii.gz")
    touch(tmp_path, *(f"panorama_labels/{kind}_labels/100000_00001.nii.gz" for kind in ("manual", "automatic")))
    found = find_scans(tmp_path)
    assert [scan.case for scan in found.scans] == ["100000_00001_0000", "100000_00002_0000", "more_x"]
    assert found.failures == [] and "manual_labels_100000_00001" in " ".join(found.notes)


def test_of_two_forms_of_a_file_a_dataset_has_chosen_one(tmp_path):
    touch(tmp_path, *(f"sub-001/anat/sub-001_{end}" for end in ("T2w.nii.gz", "T2w.nii", "dseg.nii.gz")))
    found = find_scans(tmp_path)
    assert [scan.path.name for scan in found.scans] == ["sub-001_T2w.nii.gz"] and found.failures == []
    assert "sub-001_T2w.nii.gz is used, sub-001_T2w.nii is not" in " ".join(found.notes)


def test_what_lies_beside_the_folder_of_the_scans_is_named(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "imagesTr/b.nii.gz", "new/c.nii.gz", "new/d.mgz")
    touch(tmp_path, "mine/a.nii.gz", "earlier/a.nii.gz", "earlier/run.json")
    found = find_scans(tmp_path, leave=(tmp_path / "mine",))
    assert [scan.case for scan in found.scans] == ["a"]
    assert {failure["id"] for failure in found.failures} == {"new", "d"}
    assert "the scans of imagesTr are not taken" in " ".join(found.notes)


def test_single_files_that_are_no_scan_say_what_they_are(tmp_path):
    write_slice(tmp_path / "IM1", ZEROS)
    touch(tmp_path, "a.mgz", "b.txt")
    for name, words in (
        ("IM1", "a DICOM file; expected"),
        ("a.mgz", "nibabel.load"),
        ("b.txt", "not a scan by its name"),
    ):
        with pytest.raises(DatasetError, match=words) as caught:
            find_scans(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_folder_is_listed_once_and_no_scan_is_opened(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{number}.nii.gz" for number in range(50)), "p/a.mha", "p/b.json", "p/c.mgz")
    listed = []
    monkeypatch.setattr(scans, "listing", lambda folder: listed.append(folder) or listing(folder))
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("a file is opened"))
    assert len(search(tmp_path).scans) == 51
    assert listed == [tmp_path, tmp_path / "p"]


def test_what_is_drawn_on_a_scan_beside_it_is_no_scan(tmp_path):
    """By its name, where the scan itself is there; infer would segment it, and check take a dataset for scans alone."""
    touch(tmp_path, "a.nii.gz", "a_seg.nii.gz", "a b-Label.mha", "a b.nrrd", "anna/T1.nii.gz", "anna/mask.nii.gz")
    touch(tmp_path, "bert/mask.nii.gz", "c_t1.nii.gz", "c_seg.nii.gz", "d_seg.nii.gz", "bigmask.nii.gz")
    stems = {"a", "a b", "anna_T1", "bert_mask", "c_t1", "d_seg", "bigmask"}
    assert names_in(tmp_path).keys() == stems
    (note,) = search(tmp_path).notes
    assert note.startswith("passed over, 4 label maps by their names") and "list image and label of each case" in note
