"""Which cases are of one patient."""

import csv
import json

import pytest

from mambahome_jax.datasets.patients import patients_of, split_notes
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import join_datasets
from mambahome_jax.errors import DatasetError
from tests.datasets.test_layouts import touch


@pytest.mark.parametrize(
    "groups",
    [
        {"patient001": ["patient001_frame01", "patient001_frame12"], "patient002": ["patient002_frame01"]},
        {"sub-01": ["sub-01_ses-1", "sub-01_ses-2"], "sub-02": ["sub-02_ses-1"]},
        {"sub-01": ["sub-01_ses-1_run-1", "sub-01_ses-1_run-2", "sub-01_T2w"], "sub-02": ["sub-02_ses-1_run-1"]},
        {"case_003": ["case_003_t1", "case_003_t2"], "case_004": ["case_004_t1", "case_004_flair"]},
        {"P12": ["P12-a", "P12-b"], "P13": ["P13-a"]},
        {"P12": ["P12a", "P12b"], "P13": ["P13a"]},
        {"001": ["001_01", "001_02"], "002": ["002_01", "002_02"]},
        # PANORAMA's names in another layout; PI-CAI; ISBI 2015; BraTS 2023; UPENN-GBM.
        {"100000": ["100000_00001", "100000_00002"], "100001": ["100001_00001"], "100002": ["100002_00001"]},
        {"10012": ["10012_1000012", "10012_1000013"], "10014": ["10014_1000014"], "10015": ["10015_1000015"]},
        {f"training{p:02}": [f"training{p:02}_{t:02}" for t in range(1, 5 + (p == 3))] for p in range(1, 6)},
        {"BraTS-GLI-00005": ["BraTS-GLI-00005-000", "BraTS-GLI-00005-001"], "BraTS-GLI-00006": ["BraTS-GLI-00006-000"]},
        {"UPENN-GBM-00001": ["UPENN-GBM-00001_11", "UPENN-GBM-00001_21"], "UPENN-GBM-00002": ["UPENN-GBM-00002_11"]},
        # VerSe, OASIS, IXI, M&Ms, LUMIERE, ADNI and ATLAS, whose first number is that of a site.
        {"sub-verse500": ["sub-verse500_dir-ax", "sub-verse500_dir-sag"], "sub-verse004": ["sub-verse004"]},
        {"OAS1_0001": ["OAS1_0001_MR1", "OAS1_0001_MR2"], "OAS1_0002": ["OAS1_0002_MR1"]},
        {"IXI002-Guys-0828": ["IXI002-Guys-0828-T1", "IXI002-Guys-0828-T2"], "IXI012-HH-1211": ["IXI012-HH-1211-T1"]},
        {"A0S9V9": ["A0S9V9_ED", "A0S9V9_ES"], "B2L0L2": ["B2L0L2_ED", "B2L0L2_ES"]},
        {"Patient-001": ["Patient-001_week-000-1", "Patient-001_week-000-2"], "Patient-002": ["Patient-002_week-044"]},
        {
            "002_S_0295": ["002_S_0295_bl", "002_S_0295_m06"],
            "002_S_0413": ["002_S_0413_bl"],
            "003_S_0907": ["003_S_0907_bl"],
        },
        {"sub-r001s001": ["sub-r001s001_ses-1", "sub-r001s001_ses-2"], "sub-r002s001": ["sub-r002s001_ses-1"]},
        {"1": ["1_T1DUAL_InPhase", "1_T2SPIR"], "2": ["2_T1DUAL_InPhase", "2_T2SPIR"]},  # CHAOS
        {"020": ["020_t2", "020_adc"], "021": ["021_t2"], "Utrecht_0": ["Utrecht_0"], "Utrecht_2": ["Utrecht_2"]},
        {f"{c}{c}{n}{c}": [f"{c}{c}{n}{c}_{v}" for v in (1, 2)] for n, c in enumerate("bcdfgh", 1)},  # codes
        # Dates tell scans apart; a site before the patient does not count, a study common to all neither.
        {"17": ["17_20240101", "17_2024-03-01"], "18": ["18_20240101"]},
        {"site1_003": ["site1_003_t1", "site1_003_t2"], "site2_003": ["site2_003_t1", "site2_003_t2"]},
        {"study7_p01": ["study7_p01_pre", "study7_p01_post"], "study7_p02": ["study7_p02_pre"]},
        {"hip_07": ["hip_07_left", "hip_07_right"], "hip_08": ["hip_08_left"]},
        {"P1": ["P1_10012020", "P1_24-03-2021"], "P2": ["P2_11012020", "P2_25022020"]},
        # Names like no other, and few patients with many scans each.
        {"case_01": ["case_01_a", "case_01_b"], "case_02": ["case_02_a"], "PatX7": ["PatX7_a", "PatX7_b"]},
        {"patient001": ["patient001_frame01", "patient001_frame12"], "other_scan": ["other_scan"]},
        {f"patient{p}": [f"patient{p}_{n:03}" for n in range(9)] for p in (1, 2, 3)},
        {f"sub-{p}": [f"sub-{p}_vol{n}" for n in range(9)] for p in (1, 2)},
        {"TCGA-02-0006": ["TCGA-02-0006_a", "TCGA-02-0006_b"], "TCGA-02-0009": ["TCGA-02-0009_a"]},
    ],
    ids=lambda groups: next(iter(groups)),
)
def test_patients_are_read_off_names(groups):
    names = [name for group in groups.values() for name in group]
    assert patients_of(names) == {name: patient for patient, group in groups.items() for name in group}


NUMBERS = range(1, 9)


@pytest.mark.parametrize(
    "names",
    [
        [f"{stem}{n:0{digits}}" for n in NUMBERS]
        for stem, digits in [
            *(("hippocampus_", 3), ("la_", 4), ("BraTS20_Training_", 3), ("liver_", 0), ("img", 4), ("FLARE22_Tr_", 4)),
            *(("amos_", 4), ("s", 4), ("BDMAP_", 8), ("case_", 5), ("volume-", 0), ("train_", 3), ("LIDC-IDRI-", 4)),
            *(
                ("word_", 4),
                ("prostate_", 2),
                ("UCSF-PDGM-", 4),
                ("0522c", 4),
                ("scan_", 4),
                ("", 3),
                ("mr_train_10", 2),
            ),
            *(("1.2.840.113619.2.55.3.", 6), ("20240101_", 3), ("phantom_", 3), ("patient", 3)),
        ]
    ]
    + [
        ["20240101_001", "20240101_002", "20240102_001", "20240102_002"],
        [
            "550e8400-e29b-41d4-a716-446655440000",
            "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "6ba7b811-9dad-11d1-80b4-00c04fd4",
        ],
        ["3fabcdee", "3cdabeef", "a1b2c3d4", "12ab34cd", "12cd34ab"],
        # Sites with their cases, parts of a data set, cohorts.
        [f"site{site}_{n:03}" for site in ("A1", "B2") for n in NUMBERS],
        [f"site{site}_{n:03}" for site in ("A1", "A2") for n in NUMBERS],
        [f"center-{site}_{n}" for site in range(1, 12) for n in (1, 2)],
        [f"A{site}_{n:03}" for site in (1, 2) for n in NUMBERS],
        [f"hospital2_patient{n:03}" for n in NUMBERS] + ["hospital3_patient001", "hospital3_patient002"],
        [f"LCTSC-{part}-S{site}-{n:03}" for part in ("Train", "Test") for site in (1, 2, 3) for n in NUMBERS],
        [f"FLARE22_{part}_{n:04}" for part in ("Tr", "Ts") for n in NUMBERS],
        [f"Amsterdam_GE3T_{n}" for n in NUMBERS]
        + [f"{city}_{n}" for city in ("Utrecht", "Singapore") for n in NUMBERS],
        ["TCGA-02-0006", "TCGA-02-0009", "TCGA-06-0122", "TCGA-06-0130"],
        ["LUNG1-001", "LUNG1-002", "R01-001", "R01-002"],
        ["002_S_0295", "002_S_0413", "003_S_0907", "003_S_1021"],
        ["ADNI_002_S_0295", "ADNI_002_S_0413", "ADNI_003_S_0907"],
        ["TCGA-02-0006", "TCGA-02-0009", "TCGA-06-0122"],
        [f"A1_pre_{n:03}" for n in NUMBERS] + ["other_2"],
        # A sequence in front tells no patients apart, and one patient alone is no group.
        ["t1_001", "t1_002", "t2_001", "t2_002"],
        ["frame01_ab", "frame01_cd", "frame02_ab"],
        ["patient001_frame01", "patient001_frame12", "patient001_frame20"],
        [],
    ],
    ids=lambda names: names[0] if names else "none",
)
def test_other_names_are_patients_of_their_own(names):
    assert patients_of(names) == {name: name for name in names}


def acdc(folder):
    """Six patients with two phases each, in the plain layout."""
    names = [f"patient{p:03}_frame{f:02}" for p in range(1, 7) for f in (1, 10 + p)]
    touch(folder, *(f"{part}/{name}.nii.gz" for part in ("images", "labels") for name in names))
    return names


def test_layouts_have_patients_and_say_so_in_a_line(tmp_path):
    names = acdc(tmp_path)
    dataset = load_dataset(tmp_path)
    assert {case.id: case.patient for case in dataset.cases} == {name: name[:10] for name in names}
    assert dataset.patients == "names"
    (note,) = dataset.notes
    assert note.startswith("6 patients in 12 cases, such as patient001 of patient001_frame01 and patient001_frame11")
    assert "by their names; a table patients.csv (id,patient) in the folder wins" in note


def test_a_table_of_patients_wins_over_names(tmp_path):
    names = acdc(tmp_path)
    rows = [("file", "Subject"), *((f"images/{name}_0000.nii.gz", f"s{n % 4}") for n, name in enumerate(names[:-1]))]
    with (tmp_path / "patients.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    dataset = load_dataset(tmp_path)
    assert [case.patient for case in dataset.cases[:-1]] == [f"s{n % 4}" for n in range(len(names) - 1)]
    assert (dataset.patients, dataset.cases[-1].patient) == ("given", names[-1])
    assert (
        dataset.notes[0].startswith("5 patients in 12 cases, such as s0 of ") and "by patients.csv" in dataset.notes[0]
    )
    assert dataset.notes[1] == f"patients.csv names no patient of 1 case: {names[-1]}"


def test_participants_of_bids_are_patients(tmp_path):
    names = ["ab_x1", "ab_x2", "abc_x1", "de_x1"]
    touch(tmp_path, *(f"{part}/{name}.nii.gz" for part in ("images", "labels") for name in names))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nab\t3\nabc\t4\nde\t5\n")
    assert [case.patient for case in load_dataset(tmp_path).cases] == ["ab", "ab", "abc", "de"]


def test_tables_that_cannot_be_used_are_named(tmp_path):
    names = acdc(tmp_path)
    (tmp_path / "patients.csv").write_text("id,age\n")
    with pytest.raises(DatasetError, match=r"patients\.csv: columns 'id,age'; expected columns id .* and patient"):
        load_dataset(tmp_path)
    (tmp_path / "patients.csv").write_text(f"id,patient\n{names[0]},a\n{names[0]}.nii.gz,b\n")
    with pytest.raises(DatasetError, match=r"patient001_frame01 is of patient a and of b; expected one patient a case"):
        load_dataset(tmp_path)


def test_patients_of_a_csv_file_win_even_where_each_case_has_its_own(tmp_path):
    names = acdc(tmp_path)
    lines = ["image,label,patient", *(f"images/{name}.nii.gz,labels/{name}.nii.gz,{name}" for name in names)]
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    dataset = load_dataset(tmp_path / "cases.csv")
    assert [case.patient for case in dataset.cases] == names and dataset.patients == "given" and not dataset.notes
    (tmp_path / "cases.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    assert {case.patient for case in load_dataset(tmp_path / "cases.csv").cases} == {name[:10] for name in names}


def prepared(folder, names, patients, source="names", split=None):
    cases = tuple(
        PreparedCase(name, f"images/{name}.nii.gz", f"labels/{name}.nii.gz", split, "mr", (9, 9, 9), (1, 1, 1), name, p)
        for name, p in zip(names, patients, strict=True)
    )
    return Prepared(folder, "x", None, "RAS", ("image",), {1: "a"}, cases, patients=source)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hold_out", [2, 3, 5])
def test_no_split_parts_the_cases_of_a_patient(tmp_path, seed, hold_out):
    names = acdc(tmp_path / "in")
    patients = [case.patient for case in load_dataset(tmp_path / "in").cases]
    write_prepared(prepared(tmp_path, names, patients))
    (tmp_path / "store").mkdir()
    again = read_prepared(tmp_path)
    assert again.patients == "names" and json.loads((tmp_path / "dataset.json").read_text())["patients"] == "names"
    train, val = split_cases(again, seed, hold_out)
    assert val and not {name[:10] for name in train} & {name[:10] for name in val}
    (note,) = split_notes({case.id: case.patient for case in again.cases}, True, train, val)
    assert note == "6 patients in 12 cases; all cases of a patient are on one side of the split"
    assert load_dataset(tmp_path).patients == "names" and load_dataset(tmp_path).cases[0].patient == "patient001"


def test_patients_on_both_sides_are_said(tmp_path):
    names = acdc(tmp_path)
    patients = {name: name[:10] for name in names}
    (note,) = split_notes(patients, True, names[::2], names[1::2])
    assert note.startswith("6 patients are on both sides, so scores are too good (as the dataset splits them): ")
    assert "patient001 (patient001_frame01 and patient001_frame11)" in note
    (note,) = split_notes({name: name for name in names}, False, names[::2], names[1::2])
    assert "an earlier version preprocessed them" in note and "Run preprocess again" in note
    assert split_notes({name: name for name in names}, False, names[:6], names[6:]) == ()


def test_patients_of_joined_datasets_stay_apart(tmp_path):
    for folder in ("one", "two"):
        acdc(tmp_path / folder)
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": {"1": "heart"}}))
    joined = join_datasets([load_dataset(tmp_path / folder) for folder in ("one", "two")])
    assert len({case.patient for case in joined.cases}) == 12 and joined.patients == "names"


def test_patients_in_other_layouts(tmp_path):
    names = ["P12-a", "P12-b", "P13-a"]
    raw = touch(tmp_path / "raw", *(f"imagesTr/{name}_000{c}.nii.gz" for name in names for c in (0, 1)))
    touch(raw, *(f"labelsTr/{name}.nii.gz" for name in names))
    table = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(table))
    assert [case.patient for case in load_dataset(raw).cases] == ["P12", "P12", "P13"]
    msd = touch(tmp_path / "msd", *(f"{part}Tr/{name}.nii.gz" for part in ("images", "labels") for name in names))
    (msd / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {"1": "a"}}))
    assert [case.patient for case in load_dataset(msd).cases] == ["P12", "P12", "P13"]
    (msd / "patients.tsv").write_text("case\tpatient\nP12-a_0000.nii.gz\tx\nP12-b\ty\nP13-a\ty\n")
    assert [case.patient for case in load_dataset(msd).cases] == ["x", "y", "y"]
    rows = [f"{name}_000{c}.nii.gz,{patient}" for name, patient in zip(names, "xyy", strict=True) for c in (0, 1)]
    (raw / "patients.csv").write_text("\n".join(["file,patient", *rows]))
    assert [case.patient for case in load_dataset(raw).cases] == ["x", "y", "y"]
    (raw / "patients.csv").write_text("id,patient\nother,x\n")
    assert load_dataset(raw).notes[-1] == "patients.csv is not used, as it names none of the cases, such as P12-a"
    published = touch(tmp_path / "ct", *(f"{name}/{name}_{part}.nii.gz" for name in names for part in ("ct", "labels")))
    assert [case.patient for case in load_dataset(published).cases] == ["P12", "P12", "P13"]
