"""Which cases are of one patient: by a table, by the layout, or by the names of the cases.

Scans of one patient resemble each other: a split that separates them gives scores that are too good.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, PatientSource
from mambahome_jax.datasets.files import CHANNEL, counterparts, listed, read_table
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import suffix_of
from mambahome_jax.support.console import counted
from mambahome_jax.support.paths import one_form

TABLES = ("patients.csv", "patients.tsv", "participants.tsv")
_CASE_COLUMNS = ("id", "case", "case_id", "image", "file", "filename", "name", "scan")
_PATIENT_COLUMNS = ("patient", "patient_id", "participant_id", "participant", "subject", "subject_id")

# A DICOM UID is one name, a date is nobody's number. The number of a patient of TCGA or ADNI begins with a site's.
_YEAR, _DAY = r"(?:19|20)\d\d", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = (
    rf"(?:{_YEAR}(?P<dash>[-_.]?)(?:0[1-9]|1[0-2])(?P=dash){_DAY}|{_DAY}(?P<sign>[-_.]?){_DAY}(?P=sign){_YEAR})(?!\d)"
)
_WITH_SITE = r"TCGA-\w\w-\w{4}(?![^-_. ])|(?<!\d)\d{3}_S_\d{4}(?!\d)"
_TOKEN = re.compile(rf"(?P<date>(?<!\d){_DATE})|{_WITH_SITE}|\d+(?:\.\d+){{3,}}|[^-_. ]+")
_GLUED = re.compile(r"([A-Za-z]*\d+)([A-Za-z]+\d*)")  # patient001frame01, 12a
_ONE_NUMBER = re.compile(r"\D*\d+")
_HASH = re.compile(r"[0-9a-f]{8,}", re.IGNORECASE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What tells scans of one patient apart: when, in which state of body or contrast, by which sequence, of which side.
_SCANS = _words(
    "ses session visit vis time timepoint tp day week wk month mo year yr baseline base bl followup follow fu pre "
    "post before after prior current early late study exam frame fr phase ph ed es systole diastole systolic diastolic "
    "art arterial ven venous portal pv pvp delayed delay native nc ncct cect contrast unenhanced inhale exhale insp "
    "exp inspiration expiration rest stress echo t1 t2 t1w t2w t1ce t1c t1gd t1n t2f flair adc dwi dti pd pdw swi bold "
    "mr mri ct cbct pet us ax axial cor coronal sag sagittal sa la sax lax cine lge run rec acq series ser repeat "
    "retest dir split left right lt rt lh rh"
)
# Such words in front of a number: it is that of a scan, not of a patient.
_NUMBERED_SCANS = _words("ses session visit timepoint tp time frame phase day week month year run echo")
_NO_NUMBERS = _words("t1 t2 t1w t2w t1ce t1c t1gd t1n t2f 2ch 3ch 4ch 2d 3d 4d")
_SITES = _words(
    "site center centre ctr hospital hosp inst institution institute clinic cohort study dataset data ds task batch "
    "fold part group grp vendor scanner set subset collection lab release source src domain split trial project"
)
_PATIENTS = _words("patient pat pt subj subject sub participant person volunteer donor")
_PERSONS = _PATIENTS | {"case", "specimen", "id"}


@dataclass(frozen=True)
class _Token:
    """A part of a name: its text in lower case, where it ends in the name, and whether it is a date."""

    text: str
    end: int
    date: bool = False

    @property
    def word(self) -> str:
        return self.text.rstrip("0123456789")


def with_patients(dataset: Dataset, folder: Path) -> Dataset:
    """The dataset with the patient of each case, and a note that says so where a patient has several cases.

    A table in the folder (TABLES) comes first, then what the layout says, then the names of the cases.
    Raises DatasetError: a table that cannot be used.
    """
    ids = [case.id for case in dataset.cases]
    file = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    table = _read(file, ids) if file else {}
    patients = {case.id: case.patient for case in dataset.cases}
    source: PatientSource = "given"
    notes = []
    if file and table:
        patients, reason = table, f"by {file.name}"
        if missing := [name for name in ids if name not in table]:
            count = f"{len(missing)} case{'s' * (len(missing) != 1)}"
            notes = [f"{file.name} names no patient of {count}: {listed(missing)}"]
    elif dataset.patients is not None or any(case.patient != case.id for case in dataset.cases):
        source = dataset.patients or "given"
        reason = "as the dataset says" if dataset.patients == "given" else "by their names"
    else:
        patients, source = patients_of(ids), "names"
        reason = "by their names; a table patients.csv (id,patient) in the folder wins"
    if file and not table:
        notes.append(f"{file.name} is not used, as it names none of the cases, such as {min(ids, default='')}")
    cases = tuple(replace(case, patient=patients.get(case.id, case.id)) for case in dataset.cases)
    return replace(dataset, cases=cases, patients=source, notes=(*dataset.notes, *_note(cases, reason), *notes))


def split_notes(
    patients: Mapping[str, str], known: bool, train: Collection[str], val: Collection[str]
) -> tuple[str, ...]:
    """What to say of the patients in a split: how many there are, and which of them are on both sides.

    patients: {case: patient}. known: False for a folder of an earlier version, which made each case a patient of its
    own; the names of the cases are looked at then. train, val: ids of the cases on either side.
    """
    patients = patients if known else patients_of(patients)
    sides: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, ids in enumerate((train, val)):
        for case in ids:
            if case in patients:
                sides[patients[case]][side].append(case)
    split = {patient: ids for patient, ids in sides.items() if all(ids)}
    count = sum(len(a) + len(b) for a, b in sides.values())
    if split:
        examples = listed((f"{patient} ({a[0]} and {b[0]})" for patient, (a, b) in split.items()), 3)
        why = "as the dataset splits them" if known else "an earlier version preprocessed them, each case by itself"
        action = "" if known else ". Run preprocess again: it keeps the cases and writes their patients down"
        those = counted(len(split), "patient", "are")
        return (f"{those} on both sides, so scores are too good ({why}): {examples}{action}",)
    if known and len(sides) < count:
        return (
            f"{counted(len(sides), 'patient')} in {count} cases; all cases of a patient are on one side of the split",
        )
    return ()


def _note(cases: Sequence[Case], source: str) -> tuple[str, ...]:
    """One line where patients have several cases; empty else."""
    groups: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        groups[case.patient].append(case.id)
    patient, ids = next(((patient, ids) for patient, ids in groups.items() if len(ids) > 1), ("", []))
    example = f"such as {patient} of {' and '.join(ids[:2])}"
    text = (
        f"{counted(len(groups), 'patient')} in {len(cases)} cases, {example}, {source}; no split made here parts them"
    )
    return (text,) if ids else ()


def _read(file: Path, ids: Sequence[str]) -> dict[str, str]:
    """{case: patient} of a table; cases by their names, with or without a file's ending, or by that of the patient."""
    expected = "columns id (of the case) and patient; in participants.tsv participant_id"
    table = read_table(file, expected)
    patient_column = next((name for name in _PATIENT_COLUMNS if name in table.columns), None)
    case_column = next((name for name in _CASE_COLUMNS if name in table.columns), None)
    if patient_column is None:
        action = "Correct the first line, or rename the file if it is about something else."
        raise DatasetError(f"columns {table.head!r}", file=file, expected=expected, action=action)
    known = [one_form(row[patient_column]) for _, row in table.rows]
    if case_column is None:
        # A row a participant, as in BIDS: the names of the cases begin with it.
        return {name: patient for name in ids if (patient := _beginning(name, known))}
    files = [one_form(Path(row[case_column].replace("\\", "/")).name) for _, row in table.rows]
    stems = [file.removesuffix(suffix_of(file)) for file in files]
    # A row may be of a file of each channel.
    known_ids = set(ids)
    by_channel = {stem: match[1] for stem in stems if (match := CHANNEL.fullmatch(stem)) and match[1] in known_ids}
    case_of = by_channel | counterparts(stems, ids)
    patients: dict[str, str] = {}
    for stem, patient in zip(stems, known, strict=True):
        name = case_of.get(stem)
        if patient and name is not None and patients.setdefault(name, patient) != patient:
            problem = f"{name} is of patient {patients[name]} and of {patient}"
            raise DatasetError(problem, file=file, expected="one patient a case")
    return patients


def _beginning(name: str, participants: Collection[str]) -> str:
    """The longest participant that a name begins with, up to a mark between its parts."""
    matches = [p for p in participants if p and name.startswith(p) and not name[len(p) : len(p) + 1].isalnum()]
    return max(matches, key=len, default="")


def patients_of(names: Collection[str]) -> dict[str, str]:
    """The patient of each case, {name: patient}, read off the names; the name itself where it has no such part.

    A patient is the shortest beginning that several names share, as patient001 of patient001_frame01 or sub-01 of
    sub-01_ses-2. It ends where a part of the name ends, holds a number that is no date's, site's or sequence's, and
    leaves at least two groups. What may as well be a site with its cases (A1_001 to A1_050) is none.
    """
    patients = {name: name for name in names}
    if all(map(_ONE_NUMBER.fullmatch, names)):
        return patients
    tokens = {name: _tokens(name) for name in names}
    remaining = set(names)
    for length in range(1, max(map(len, tokens.values()), default=0) + 1):
        groups: dict[str, list[str]] = defaultdict(list)
        for name in filter(remaining.__contains__, names):
            parts = tokens[name]
            if len(parts) >= length and _has_patient_number(parts[:length]):
                groups[name[: parts[length - 1].end].lower()].append(name)
        for family in _families(groups):
            if _are_patients(family, tokens, length):
                for group in family.values():
                    patients |= dict.fromkeys(group, group[0][: tokens[group[0]][length - 1].end])
                    remaining -= set(group)
    return patients


def _tokens(name: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(name):
        text = match[0]
        glued = None if text.lower() in _NO_NUMBERS or _HASH.fullmatch(text) else _GLUED.fullmatch(text)
        if glued:
            tokens.append(_Token(glued[1].lower(), match.start() + len(glued[1])))
        tokens.append(_Token((glued[2] if glued else text).lower(), match.end(), match["date"] is not None))
    return tokens


def _has_patient_number(tokens: Sequence[_Token]) -> bool:
    """Whether some number in these parts may be a patient's."""
    for number, token in enumerate(tokens):
        digits = any(character.isdigit() for character in token.text)
        if not digits or token.date or token.text in _NO_NUMBERS:
            continue
        before = tokens[number - 1].text if number and not token.word else token.word
        # siteA1: a letter may stand between the word and the number.
        site = before in _SITES or token.word[:-1] in _SITES
        if not site and before not in _NUMBERED_SCANS:
            return True
    return False


def _form(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _families(groups: Mapping[str, list[str]]) -> list[dict[str, list[str]]]:
    """Put beginnings together that differ in their numbers alone, as P12 and P13; all others are one family."""
    families: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for beginning, group in groups.items():
        families[_form(beginning)][beginning] = group
    single = [family for family in families.values() if len(family) == 1]
    rest = {beginning: group for family in single for beginning, group in family.items()}
    return [family for family in families.values() if len(family) > 1] + [rest]


def _are_patients(groups: Mapping[str, Sequence[str]], tokens: Mapping[str, Sequence[_Token]], length: int) -> bool:
    """Whether beginnings of `length` parts, {beginning: names}, are patients and not sites, batches or parts."""
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return False
    rests = [[tokens[name][length:] for name in group] for group in several]
    scans = all(_tells_scans(rest) for group in rests for rest in group)
    if len(groups) == 1:
        # A name like no other: of a patient unless it is that of all, or further numbers may be those of patients.
        return scans and len(several[0]) < len(tokens) and not any(map(_has_patient_number, rests[0]))
    if len({"".join(filter(str.isdigit, beginning)) for beginning in groups}) < 2:
        return False
    if scans or all(_names_patient(tokens[group[0]][:length]) for group in several):
        return True
    if any(_tells_persons(rest) for group in rests for rest in group):
        return False
    heads = [{rest[0].text if rest else "" for rest in group} for group in rests]
    largest = max(map(len, heads))
    # All go on alike, so that the patient's part is longer; or there are more cases in one than groups, as of sites.
    if largest == 1 or len(groups) < largest:
        return False
    every = [head for group in heads for head in group]
    total = sum(map(len, groups.values()))
    if all(map(str.isdigit, every)) and len(set(every)) == len(every) and 2 * len(groups) <= total:
        # Each number occurs once: it is that of the case, as in TCGA-02-0006.
        return False
    # Other letters for each, as of sites (LUNG1, R01), unless they are codes of many patients.
    return len(set(map(_form, groups))) == 1 or len(groups) >= 3 * largest


def _tells_scans(rest: Sequence[_Token]) -> bool:
    """Whether what follows a beginning tells scans of one patient apart: nothing, a known word, a date, a letter."""
    if not rest:
        return True
    first = rest[0]
    letter = len(rest) == 1 and len(first.text) == 1 and first.text.isalpha()
    return first.date or letter or first.text in _SCANS or first.word in _SCANS


def _names_patient(beginning: Sequence[_Token]) -> bool:
    """Whether a beginning ends in the word patient, or one that means it, and a number."""
    last = beginning[-1]
    words = (last.word, beginning[-2].text if not last.word and len(beginning) > 1 else "")
    return not last.date and last.text[-1].isdigit() and not _PATIENTS.isdisjoint(words)


def _tells_persons(rest: Sequence[_Token]) -> bool:
    """Whether what follows a beginning is a person with a number, so that the beginning is a site or a part."""
    if not rest:
        return False
    number = rest[0].text[len(rest[0].word) :] or (rest[1].text if len(rest) > 1 else "")
    return number.isdigit() and (rest[0].word in _PERSONS or (rest[0].word in ("s", "p") and len(number) > 2))
