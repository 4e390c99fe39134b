"""Who is trained on and who is held out: splits_final.json of nnU-Net, folds of patients, what a split leaves out."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from mambahome_jax.datasets.base import SPLIT_WORDS, Case, Dataset, Split
from mambahome_jax.datasets.files import CHANNEL, listed
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, usable_cases
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import json_form, not_read, parse_json
from mambahome_jax.support.paths import one_form

FILE, OLD_FILE = "splits_final.json", "splits_final.pkl"
_EXPECTED = '[{"train": [case, ...], "val": [case, ...]}, ...]'
_ACTION = "Correct it, or move it elsewhere."

C = TypeVar("C", Case, PreparedCase)


def with_split(dataset: Dataset, folder: Path, *, own: bool = False) -> Dataset:
    """The dataset with the split of folder/splits_final.json, else with its own; its notes say what does not fit.

    own: its own split counts whatever the folder holds. Where some cases are marked to train on, those in no list are
    not. Cases of the test part stay there. Raises DatasetError: a file that cannot be used.
    """
    file = folder / FILE
    notes: tuple[str, ...] = ()
    if file.is_file() and not own:
        cases, notes = _marked(dataset.cases, file, [case for case, _ in dataset.skipped])
    else:
        if file.is_file():
            notes = (f"{FILE} is not read, as the table says the split",)
        elif (folder / OLD_FILE).is_file():
            notes = (f"{OLD_FILE} is of nnU-Net 1 and is not read; write its split as {FILE}",)
        cases = dataset.cases
        if any(case.split == "train" for case in cases):
            cases = tuple(replace(case, in_split=case.split is not None) for case in cases)
    outside = outside_note([case.id for case in cases if not case.in_split and case.has_label])
    return replace(dataset, cases=cases, notes=(*dataset.notes, *notes, *outside))


def with_split_file(prepared: Prepared) -> tuple[Prepared, tuple[str, ...]]:
    """A preprocessed dataset with the split of a splits_final.json in its folder, and notes; itself without one."""
    file = prepared.root / FILE
    if not file.is_file():
        return prepared, ()
    cases, notes = _marked(prepared.cases, file)
    return replace(prepared, cases=cases), notes


def held_out_folds(
    prepared: Prepared, folds: int, seed: int, traits: Mapping[str, Collection[str]]
) -> tuple[tuple[str, ...], ...]:
    """Ids of the cases that each fold holds out: those of the dataset's own folds, else by `divide`.

    Each case that a training may use is in one fold; marks "val" do not count. traits: see `divide`.
    Raises ConfigError: fewer than 2 folds, more than patients, another number than the dataset's own.
    """
    cases = usable_cases(prepared)
    if folds < 2:
        raise ConfigError(f"--folds {folds}; expected 2 or more")
    own = sorted({case.fold for case in cases if case.fold is not None})
    if own and all(case.fold is not None for case in cases):
        if len(own) != folds:
            action = f"Pass --folds {len(own)}, or move {FILE} elsewhere and preprocess again"
            found = f"the dataset's own folds that hold out cases are {', '.join(map(str, own))}"
            raise ConfigError(f"--folds {folds}, but {found}. {action}")
        parts = [[case.id for case in cases if case.fold == fold] for fold in own]
    else:
        patients = {case.id: case.patient for case in cases}
        if folds > (most := len({*patients.values()})):
            found = f"expected at most {most}, the number of patients" if most > 1 else "expected 2 patients or more"
            raise ConfigError(f"--folds {folds}; {found} with labels")
        parts = divide(patients, folds, seed, traits)
    return tuple(map(tuple, parts))


def in_fold(prepared: Prepared, held_out: Collection[str]) -> Prepared:
    """The dataset as a fold trains on it, its cases marked."""
    usable = {case.id for case in usable_cases(prepared)}
    marks: dict[bool, Split] = {True: "val", False: "train"}
    cases = [replace(case, split=marks[case.id in held_out]) if case.id in usable else case for case in prepared.cases]
    return replace(prepared, cases=tuple(cases))


def divide(
    patients: Mapping[str, str], folds: int, seed: int, traits: Mapping[str, Collection[str]]
) -> list[list[str]]:
    """Divide cases into folds of about equal size, the cases of a patient together, none empty.

    Each trait is spread evenly, the rarest first: iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011),
    by patients. patients: case -> patient, at least as many patients as folds. traits: case -> what occurs in it, such
    as the names of its structures. Same seed, same folds.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case, patient in patients.items():
        # The empty one is of all cases: it comes last, and evens out the sizes.
        counts[patient].update({"", *traits.get(case, ())})
    names = sorted(counts)
    waiting = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    filled: list[Counter[str]] = [Counter() for _ in range(folds)]
    fold_of: dict[str, int] = {}
    while waiting:
        having = Counter(trait for patient in waiting for trait in counts[patient])
        rarest = min(having, key=lambda trait: (having[trait], trait == "", trait))
        for patient in sorted((p for p in waiting if rarest in counts[p]), key=lambda p: -counts[p][rarest]):
            empty = [fold for fold in range(folds) if not filled[fold]]
            choices = empty if len(empty) == len(waiting) else range(folds)
            chosen = min(choices, key=lambda fold: (filled[fold][rarest], filled[fold][""], fold))
            filled[chosen].update(counts[patient])
            fold_of[patient] = chosen
            waiting.remove(patient)
    return [[case for case, patient in patients.items() if fold_of[patient] == fold] for fold in range(folds)]


def outside_note(cases: Sequence[str]) -> tuple[str, ...]:
    """A note that names the cases which a split leaves out; empty without any."""
    text = f"cases in no list of the dataset's split, not trained on ({len(cases)}): {listed(cases)}"
    return (text,) if cases else ()


def outside_split(prepared: Prepared) -> list[str]:
    """Ids of the labelled cases that the dataset's split names in no list."""
    return [case.id for case in prepared.cases if not case.in_split and case.label is not None]


def _marked(cases: Iterable[C], file: Path, skipped: Iterable[str] = ()) -> tuple[tuple[C, ...], tuple[str, ...]]:
    """Mark the cases, but those of the test part, with their split by a split file; and notes."""
    cases = tuple(cases)
    split, fold, notes = _fit(file, [*(case.id for case in cases if case.split != "test"), *skipped])
    return tuple(
        case
        if case.split == "test"
        else replace(case, split=split.get(case.id), in_split=case.id in split, fold=fold.get(case.id))
        for case in cases
    ), notes


def _fit(file: Path, known: Iterable[str]) -> tuple[dict[str, Split], dict[str, int], tuple[str, ...]]:
    """{case: split} by the first fold of a split file for the `known` ids, {case: fold that holds it out} where its
    folds are a cross-validation, and notes on what does not fit."""
    case_of = {one_form(case): case for case in known}
    for name, case in list(case_of.items()):
        if (match := CHANNEL.fullmatch(name)) and match[2] == "0000":
            case_of.setdefault(match[1], case)
    content = _read(file)
    splits, twices, unknowns = zip(*(_fit_fold(lists, case_of) for lists in content), strict=True)
    split, twice, unknown, folds = splits[0], twices[0], unknowns[0], len(content)
    if not split:
        found = f"no id is that of a case here, such as {unknown[0]}"
        raise DatasetError(found, file=file, expected=f"ids such as {next(iter(case_of), '')}", action=_ACTION)
    held_out = _held_out_once(splits)
    train, val = (sum(word == part for word in split.values()) for part in ("train", "val"))
    first = f", the first of {folds} folds" if folds > 1 else ""
    notes = [f"split of {file.name}{first}: {counted(train, 'case')} to train on, {val} to validate on"]
    if folds > 1 and not held_out:
        notes.append(f"the folds of {file.name} do not hold out each case once, so --folds divides the cases itself")
    if unknown:
        notes.append(f"ids of {file.name} that are of no case here to train on ({len(unknown)}): {listed(unknown)}")
    if twice:
        notes.append(f"cases in two lists of {file.name}, not trained on ({len(twice)}): {listed(twice)}")
    if not val:
        notes.append(f"{file.name} names no case here to validate on, so --hold_out chooses among those to train on")
    return split, held_out, tuple(notes)


def _fit_fold(
    lists: Mapping[Split, Sequence[str]], case_of: Mapping[str, str]
) -> tuple[dict[str, Split], list[str], list[str]]:
    """{case: split} of a fold, the cases in two of its lists, and its ids that are of no case."""
    split: dict[str, Split] = {}
    twice, unknown = [], []
    for part in ("train", "val", "test"):
        for text in lists.get(part, ()):
            # Written as it is, as a path, with a suffix or with the number of a channel.
            text = one_form(text.strip())
            stem = scan_stem(Path(PurePosixPath(text.replace("\\", "/")).name))
            names = (text, stem, stem[:-5] if CHANNEL.fullmatch(stem) else stem)
            case = next((case_of[name] for name in names if name in case_of), "")
            if not case:
                unknown.append(text)
                continue
            if split.setdefault(case, part) != part:
                twice.append(case)
            split[case] = part
    if split and "train" not in lists:
        split |= {case: "train" for case in case_of.values() if case not in split}
    return split, twice, unknown


def _held_out_once(splits: Sequence[Mapping[str, Split]]) -> dict[str, int]:
    """{case: the fold that holds it out}; empty unless each case is held out once and trained on in all other folds.

    Cases that all folds keep for testing count for none.
    """
    held_out = {case: fold for fold, split in enumerate(splits) for case, part in split.items() if part == "val"}
    for case in {case for split in splits for case in split}:
        parts = [split.get(case) for split in splits]
        if parts.count("test") == len(splits):
            continue
        if (parts.count("val"), parts.count("train")) != (1, len(splits) - 1):
            return {}
    return held_out if len(splits) > 1 else {}


def _read(file: Path) -> list[dict[Split, list[str]]]:
    """The lists of each fold. A single fold, and folds by name, are taken too."""
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise not_read(file, error) from error
    except ValueError as error:
        raise DatasetError(f"not valid JSON ({error})", file=file, expected=_EXPECTED, action=_ACTION) from error
    if isinstance(content, dict):
        content = list(content.values()) if all(isinstance(v, dict) for v in content.values()) else [content]
    if not isinstance(content, list) or not content:
        raise _damaged("no fold" if content == [] else json_form(content), file)
    return [_lists(fold, file) for fold in content]


def _lists(fold: object, file: Path) -> dict[Split, list[str]]:
    if not isinstance(fold, Mapping):
        raise _damaged(f"a fold that is {json_form(fold)}", file)
    lists = {SPLIT_WORDS[word]: ids for key, ids in fold.items() if (word := str(key).lower()) in SPLIT_WORDS}
    for part, ids in lists.items():
        wrong = [entry for entry in ids if not isinstance(entry, str)] if isinstance(ids, list) else [ids]
        if wrong:
            raise _damaged(f"{part} holds {wrong[0]!r}", file)
    if not any(lists.values()):
        raise _damaged(f"a fold of empty lists: {', '.join(map(str, fold)) or 'none'}", file)
    return lists


def _damaged(problem: str, file: Path) -> DatasetError:
    return DatasetError(f"damaged ({problem})", file=file, expected=_EXPECTED, action=_ACTION)
