"""The split that comes with a dataset: splits_final.json of nnU-Net, and what a split leaves out."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mambahome_jax.datasets.base import Case, Dataset, Split
from mambahome_jax.datasets.files import CHANNEL, listed
from mambahome_jax.datasets.prepared import Prepared, PreparedCase
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.files import parse_json
from mambahome_jax.support.paths import one_form

FILE, OLD_FILE = "splits_final.json", "splits_final.pkl"
EXPECTED = '[{"train": [case, ...], "val": [case, ...]}, ...]'
_ACTION = "Correct it, or move it elsewhere."
# What tables and split files call the three parts.
WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "va"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}

C = TypeVar("C", Case, PreparedCase)


def with_split(dataset: Dataset, folder: Path, *, own: bool = False) -> Dataset:
    """The dataset with the split of folder/splits_final.json, else with its own; its notes say what does not fit.

    own: its own split counts whatever the folder holds. Where some cases are marked to train on, those in no list are
    not. Cases of the test part stay there. Raises DatasetError: see `fit_split`.
    """
    file = folder / FILE
    if file.is_file() and not own:
        known = [case.id for case in dataset.cases if case.split != "test"]
        split, notes = fit_split(file, [*known, *(case for case, _ in dataset.skipped)])
        cases = tuple(marked(case, split) for case in dataset.cases)
    else:
        unread = f"{OLD_FILE} is of nnU-Net 1 and is not read; write its split as {FILE}"
        notes = (unread,) if (folder / OLD_FILE).is_file() else ()
        notes = (f"{FILE} is not read, as the table says the split",) if file.is_file() else notes
        listed_ones = any(case.split == "train" for case in dataset.cases)
        cases = tuple(
            dataclasses.replace(case, in_split=case.split is not None) if listed_ones else case
            for case in dataset.cases
        )
    names = [case.id for case in cases if not case.in_split and case.has_label]
    return dataclasses.replace(dataset, cases=cases, notes=(*dataset.notes, *notes, *outside_note(names)))


def marked(case: C, split: Mapping[str, Split]) -> C:
    """A case with its split by a split file; one of the test part as it is."""
    if case.split == "test":
        return case
    return dataclasses.replace(case, split=split.get(case.id), in_split=case.id in split)


def outside_note(cases: Sequence[str]) -> tuple[str, ...]:
    """A note that names the cases which a split leaves out; empty without any."""
    text = f"cases in no list of the dataset's split, not trained on ({len(cases)}): {listed(cases)}"
    return (text,) if cases else ()


def outside_split(prepared: Prepared) -> list[str]:
    """Ids of the labelled cases that the dataset's split names in no list."""
    return [case.id for case in prepared.cases if not case.in_split and case.label is not None]


def with_split_file(prepared: Prepared) -> tuple[Prepared, tuple[str, ...]]:
    """A preprocessed dataset with the split of a splits_final.json in its folder, and notes; itself without one.

    Raises DatasetError: see `fit_split`.
    """
    file = prepared.root / FILE
    if not file.is_file():
        return prepared, ()
    split, notes = fit_split(file, [case.id for case in prepared.cases if case.split != "test"])
    return dataclasses.replace(prepared, cases=tuple(marked(case, split) for case in prepared.cases)), notes


def fit_split(file: Path, known: Iterable[str]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """{case: split} by the first fold of a split file, and notes on what of it does not fit.

    known: ids of the cases that it may name. Ids may have a suffix, a channel's number or a folder.
    Raises DatasetError: no id fits; see `read_split_file`.
    """
    names = _names(known)
    lists, folds = read_split_file(file)
    split: dict[str, Split] = {}
    twice, unknown = [], []
    for part in ("train", "val", "test"):
        for text in lists.get(part, ()):
            case = _case_of(text, names)
            if case is None:
                unknown.append(text)
                continue
            if case in split and split[case] != part:
                twice.append(case)
            split[case] = part
    if not split:
        found, expected = f"no id is that of a case here, such as {unknown[0]}", f"ids such as {next(iter(names), '')}"
        raise DatasetError(found, file=file, expected=expected, action=_ACTION)
    if "train" not in lists:
        split |= {case: "train" for case in names.values() if case not in split}
    counts = [sum(found == part for found in split.values()) for part in ("train", "val")]
    first = f", the first of {folds} folds" if folds > 1 else ""
    notes = [f"split of {file.name}{first}: {counts[0]} cases to train on, {counts[1]} to validate on"]
    if unknown:
        notes.append(f"ids of {file.name} that are of no case here to train on ({len(unknown)}): {listed(unknown)}")
    if twice:
        notes.append(f"cases in two lists of {file.name}, not trained on ({len(twice)}): {listed(twice)}")
    if not counts[1]:
        notes.append(f"{file.name} names no case here to validate on, so --hold_out chooses among those to train on")
    return split, tuple(notes)


def read_split_file(file: Path) -> tuple[dict[Split, list[str]], int]:
    """The lists of the first fold, and the number of folds. A single fold, and folds by name, are taken too.

    Raises DatasetError: not readable, not JSON, no fold, a list of something else than ids.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=file) from error
    except ValueError as error:
        raise DatasetError(f"not valid JSON ({error})", file=file, expected=EXPECTED, action=_ACTION) from error
    if isinstance(content, dict):
        content = list(content.values()) if all(isinstance(v, dict) for v in content.values()) else [content]
    if not isinstance(content, list) or not content:
        raise _damaged("no fold" if content == [] else f"a JSON {type(content).__name__}", file)
    return _lists(content[0], file), len(content)


def _lists(fold: Any, file: Path) -> dict[Split, list[str]]:
    if not isinstance(fold, Mapping):
        raise _damaged(f"a fold that is a JSON {type(fold).__name__}", file)
    lists = {WORDS[str(key).lower()]: ids for key, ids in fold.items() if str(key).lower() in WORDS}
    for part, ids in lists.items():
        wrong = [entry for entry in ids if not isinstance(entry, str)] if isinstance(ids, list) else [ids]
        if wrong:
            raise _damaged(f"{part} holds {wrong[0]!r}", file)
    if not any(lists.values()):
        raise _damaged(f"a fold of empty lists: {', '.join(map(str, fold)) or 'none'}", file)
    return lists


def _damaged(what: str, file: Path) -> DatasetError:
    return DatasetError(f"damaged ({what})", file=file, expected=EXPECTED, action=_ACTION)


def _names(known: Iterable[str]) -> dict[str, str]:
    """Case by its id, and by that without the number of its channel where nothing else is called so."""
    names = {one_form(case): case for case in known}
    for name, case in list(names.items()):
        channel = CHANNEL.fullmatch(name)
        if channel and channel[2] == "0000":
            names.setdefault(channel[1], case)
    return names


def _case_of(text: str, names: Mapping[str, str]) -> str | None:
    """The case that an id means, which may be written as a path, with a suffix or with the number of a channel."""
    text = one_form(text.strip())
    stem = scan_stem(Path(PurePosixPath(text.replace("\\", "/")).name))
    channel = CHANNEL.fullmatch(stem)
    candidates = (text, stem, *([channel[1]] if channel else []))
    return next((names[name] for name in candidates if name in names), None)
