"""The split that comes with a dataset: splits_final.json of nnU-Net, and what a split leaves out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mambahome_jax.datasets.base import SPLIT_WORDS, Case, Dataset, Split
from mambahome_jax.datasets.files import CHANNEL, listed
from mambahome_jax.datasets.prepared import Prepared, PreparedCase
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.support.files import parse_json
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
    split, notes = _fit(file, [*(case.id for case in cases if case.split != "test"), *skipped])
    return tuple(
        case if case.split == "test" else replace(case, split=split.get(case.id), in_split=case.id in split)
        for case in cases
    ), notes


def _fit(file: Path, known: Iterable[str]) -> tuple[dict[str, Split], tuple[str, ...]]:
    """{case: split} by the first fold of a split file for the `known` ids, and notes on what of it does not fit."""
    case_of = {one_form(case): case for case in known}
    for name, case in list(case_of.items()):
        if (match := CHANNEL.fullmatch(name)) and match[2] == "0000":
            case_of.setdefault(match[1], case)
    lists, folds = _read(file)
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
    if not split:
        found = f"no id is that of a case here, such as {unknown[0]}"
        raise DatasetError(found, file=file, expected=f"ids such as {next(iter(case_of), '')}", action=_ACTION)
    if "train" not in lists:
        split |= {case: "train" for case in case_of.values() if case not in split}
    train, val = (sum(word == part for word in split.values()) for part in ("train", "val"))
    first = f", the first of {folds} folds" if folds > 1 else ""
    notes = [f"split of {file.name}{first}: {train} cases to train on, {val} to validate on"]
    if unknown:
        notes.append(f"ids of {file.name} that are of no case here to train on ({len(unknown)}): {listed(unknown)}")
    if twice:
        notes.append(f"cases in two lists of {file.name}, not trained on ({len(twice)}): {listed(twice)}")
    if not val:
        notes.append(f"{file.name} names no case here to validate on, so --hold_out chooses among those to train on")
    return split, tuple(notes)


def _read(file: Path) -> tuple[dict[Split, list[str]], int]:
    """The lists of the first fold, and the number of folds. A single fold, and folds by name, are taken too."""
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=file) from error
    except ValueError as error:
        raise DatasetError(f"not valid JSON ({error})", file=file, expected=_EXPECTED, action=_ACTION) from error
    if isinstance(content, dict):
        content = list(content.values()) if all(isinstance(v, dict) for v in content.values()) else [content]
    if not isinstance(content, list) or not content:
        raise _damaged("no fold" if content == [] else f"a JSON {type(content).__name__}", file)
    fold = content[0]
    if not isinstance(fold, Mapping):
        raise _damaged(f"a fold that is a JSON {type(fold).__name__}", file)
    lists = {SPLIT_WORDS[word]: ids for key, ids in fold.items() if (word := str(key).lower()) in SPLIT_WORDS}
    for part, ids in lists.items():
        wrong = [entry for entry in ids if not isinstance(entry, str)] if isinstance(ids, list) else [ids]
        if wrong:
            raise _damaged(f"{part} holds {wrong[0]!r}", file)
    if not any(lists.values()):
        raise _damaged(f"a fold of empty lists: {', '.join(map(str, fold)) or 'none'}", file)
    return lists, len(content)


def _damaged(problem: str, file: Path) -> DatasetError:
    return DatasetError(f"damaged ({problem})", file=file, expected=_EXPECTED, action=_ACTION)
