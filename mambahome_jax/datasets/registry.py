"""Every layout that can be read. A new one is a module with the members of `Layout`, and its name in LAYOUTS."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from mambahome_jax.datasets import prepared
from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.files import fault_of_name, listed, listing, outside_of, twins_note
from mambahome_jax.datasets.layouts import (
    abdomenatlas,
    amos,
    decathlon,
    feta,
    images_labels,
    mvseg,
    nnunet_raw,
    panorama,
    published,
    table,
    totalsegmentator_mri,
)
from mambahome_jax.datasets.patients import TABLES, with_patients
from mambahome_jax.datasets.scans import misplaced, unseen
from mambahome_jax.datasets.splits import FILE as SPLIT_FILE
from mambahome_jax.datasets.splits import with_split
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.formats import kind_in
from mambahome_jax.support.paths import local_path, one_form, own_name


class Layout(Protocol):
    """What a module of a layout has.

    NAME: for --dataset. LOOKS_FOR: one line for people. COVERS: names of layouts of which this one is a special case,
    so that it wins where both are found. detect: whether the path looks so; quick, opens no scan. load: lists cases.
    """

    NAME: str
    LOOKS_FOR: str
    COVERS: tuple[str, ...]

    def detect(self, folder: Path, /) -> bool: ...

    def load(self, folder: Path, /) -> Dataset: ...


LAYOUTS: dict[str, Layout] = {
    layout.NAME: layout
    for layout in (
        *(prepared, abdomenatlas, totalsegmentator_mri, panorama, amos, feta, mvseg),
        *(nnunet_raw, decathlon, table, images_labels, published),
    )
}


# Layouts whose own list says what is a case.
LISTED = (table.NAME, prepared.NAME)


def load_dataset(folder: str | Path, name: str | None = None) -> Dataset:
    """Find out the layout of a folder and list its cases; only names and dataset.json are read, no scan.

    name: the layout to read it in, instead of finding out. Where an archive was unpacked into a folder of its own, that
    folder is found.
    Raises ConfigError: no layout of that name. DatasetError: missing or empty folder, a file, an unknown layout (with
    what was looked for), several layouts at once, and what the layout's own load() finds.
    """
    folder = local_path(folder)
    if name is not None and name not in LAYOUTS:
        raise ConfigError(f"--dataset {name}: no such layout; expected one of {', '.join(LAYOUTS)}")
    if not folder.exists():
        raise DatasetError("no such folder", file=folder, expected=_expected())
    if not folder.is_dir() and not table.detect(folder):
        raise DatasetError("a file, not a folder", file=folder, expected=_expected())
    if name is not None:
        return _load(name, folder)
    candidates = _candidates(folder)
    for number, candidate in enumerate(candidates):
        found = detect_layouts(candidate)
        if len(found) > 1:
            looked = "\n".join(f"  - {key}: {LAYOUTS[key].LOOKS_FOR}" for key in found)
            action = f"Say which it is with --dataset {' or --dataset '.join(found)}."
            raise DatasetError(f"several layouts at once:\n{looked}\n", file=candidate, expected="one", action=action)
        if found:
            return _load(found[0], candidate, candidates[:number])
    folders, files = listing(folder)
    names = sorted([*folders, *files])
    what = f"unknown layout (it holds {listed(names, 6)})" if names else "the folder is empty"
    action = f"Say which it is with --dataset NAME ({', '.join(LAYOUTS)}), or list the files in a CSV file."
    raise DatasetError(what, file=folder, expected=_expected() + "\n", action=action)


def detect_layouts(folder: Path) -> list[str]:
    """Names of the layouts that a folder has, without those of which another one found is a special case."""
    found = [name for name, layout in LAYOUTS.items() if layout.detect(folder)]
    covered = {name for other in found for name in LAYOUTS[other].COVERS}
    return [name for name in found if name not in covered]


def _load(name: str, folder: Path, above: Sequence[Path] = ()) -> Dataset:
    """The dataset, each id once and fit to be a file's name; a second form of a file, and files elsewhere, noted;
    each case with its split and patient.

    above: folders that hold nothing but the next one and files, from the one that was named.
    """
    dataset = LAYOUTS[name].load(folder)
    first: dict[str, Case] = {}
    again = []
    for case in map(_composed, dataset.cases):
        fault = fault_of_name(case.id)
        if fault:
            again.append((repr(case.id)[1:-1], f"{str(case.image)!r}: {fault}"))
        elif first.setdefault(case.id, case) is not case:
            again.append((case.id, f"{case.image}: a second case of this id; the first is {first[case.id].image}"))
    used = [path for case in first.values() for path in (*case.image_files, *case.label_files)]
    home = folder if folder.is_dir() else folder.parent
    # A folder that preprocess.py wrote may name the files of another one, as it says itself.
    outside = outside_of(home, used) if name != prepared.NAME else []
    home_name = own_name(home)
    elsewhere = (f"{len(outside)} files lie outside of {home_name}: {listed(outside)}",) if outside else ()
    missed, beside = ([], []) if name in LISTED else _missed(name, home, dataset, again, above)
    dataset = dataclasses.replace(
        dataset,
        cases=tuple(first.values()),
        skipped=(*dataset.skipped, *again, *missed),
        notes=(*dataset.notes, *elsewhere, *twins_note(used), *beside),
        layout=name,
    )
    # A folder that preprocess.py wrote says of each case what its split is, unless somebody put a file there.
    split = _holding((SPLIT_FILE,), home, above)
    told = name == prepared.NAME and not (split / SPLIT_FILE).is_file()
    own = name == table.NAME and any(case.split for case in dataset.cases)
    return with_patients(dataset if told else with_split(dataset, split, own=own), _holding(TABLES, home, above))


def _holding(names: Sequence[str], home: Path, above: Sequence[Path]) -> Path:
    """The folder that holds one of these files: the dataset's own, or the one above that an archive was unpacked in."""
    places = (home, *reversed(above))
    return next((place for place in places if any((place / name).is_file() for name in names)), home)


def _missed(
    name: str, home: Path, dataset: Dataset, again: Iterable[tuple[str, str]], above: Sequence[Path]
) -> tuple[list[tuple[str, str]], list[str]]:
    """What could be a case and is none, (id, reason), and a note on what lies beside the cases."""
    known = [case for case, _ in (*dataset.skipped, *again)]
    expected, unlisted = LAYOUTS[name].LOOKS_FOR, name != decathlon.NAME
    missed, beside = unseen(home, dataset.cases, known, expected, unlisted=unlisted)
    files = (path for place in above for path in listing(place)[1].values())
    missed += [misplaced(path, expected) for path in files if kind_in(path) in ("scan", "foreign")]
    named = [(repr(case)[1:-1] if fault_of_name(case) else case, reason) for case, reason in missed]
    return named, [f"of no case, and left out: {listed(beside)}"] if beside else []


def _composed(case: Case) -> Case:
    """The case with its id composed, whatever the layout read it from; the same case where it is."""
    if case.id.isascii() and case.patient.isascii():
        return case
    return dataclasses.replace(case, id=one_form(case.id), patient=one_form(case.patient))


def _candidates(folder: Path) -> list[Path]:
    """The folder, and the one folder that an archive made in it, twice at most."""
    candidates = [folder]
    for _ in range(2):
        below = list(listing(candidates[-1])[0].values())
        if len(below) != 1:
            break
        candidates.append(below[0])
    return candidates


def _expected() -> str:
    return "one of:\n" + "\n".join(f"  - {name}: {layout.LOOKS_FOR}" for name, layout in LAYOUTS.items())
