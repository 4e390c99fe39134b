"""Every layout that can be read. A new one is a module with the members of `DatasetLayout`, and an entry in LAYOUTS."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from mambahome_jax.datasets import prepared
from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.files import (
    dot_files_note,
    fault_of_name,
    listed,
    listing,
    outside_of,
    printable,
    twins_note,
)
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
from mambahome_jax.support.console import counted
from mambahome_jax.support.paths import local_path, one_form, own_name


class DatasetLayout(Protocol):
    """What a module of a layout has.

    NAME: for --dataset. LOOKS_FOR: one line for people. COVERS: names of layouts of which this one is a special case,
    so that it wins where both are found. detect: whether the path looks so; quick, opens no scan. load: lists cases.
    """

    NAME: str
    LOOKS_FOR: str
    COVERS: tuple[str, ...]

    def detect(self, folder: Path, /) -> bool: ...

    def load(self, folder: Path, /) -> Dataset: ...


LAYOUTS: dict[str, DatasetLayout] = {
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

    name: the layout to read it in, instead of finding out. Raises ConfigError: no layout of that name. DatasetError:
    missing or empty folder, an unknown layout, several layouts at once, and what the layout's own load() finds.
    """
    folder = local_path(folder)
    if name is not None and name not in LAYOUTS:
        raise ConfigError(f"--dataset {name}: no such layout; expected one of {', '.join(LAYOUTS)}")
    expected = "one of:\n" + "\n".join(f"  - {key}: {layout.LOOKS_FOR}" for key, layout in LAYOUTS.items())
    if not folder.exists():
        folders, files = listing(folder.parent)
        near = get_close_matches(folder.name, [*folders, *files], 1)
        action = f"Did you mean {folder.with_name(near[0])}?" if near else "Check the path."
        raise DatasetError("no such folder", file=folder, action=action)
    if not folder.is_dir() and not table.detect(folder):
        raise DatasetError("a file, not a folder", file=folder, expected=expected)
    if name is not None:
        return _load(name, folder)
    # Of an archive that was unpacked into a folder of its own, or two, that folder is meant.
    place = folder
    above: list[Path] = []
    for _ in range(3):
        names = detect_layouts(place)
        if len(names) > 1:
            looks = "\n".join(f"  - {key}: {LAYOUTS[key].LOOKS_FOR}" for key in names)
            action = f"Say which it is with --dataset {' or --dataset '.join(names)}."
            raise DatasetError(f"several layouts at once:\n{looks}\n", file=place, expected="one", action=action)
        if names:
            return _load(names[0], place, above)
        above.append(place)
        below = list(listing(place)[0].values())
        if len(below) != 1:
            break
        place = below[0]
    folders, files = listing(folder)
    names = sorted([*folders, *files])
    problem = f"unknown layout (it holds {listed(names, 6)})" if names else "the folder is empty"
    action = f"Say which it is with --dataset NAME ({', '.join(LAYOUTS)}), or list the files in a CSV file."
    raise DatasetError(problem, file=folder, expected=f"{expected}\n", action=action)


def detect_layouts(folder: Path) -> list[str]:
    """Names of the layouts that a folder has, without those of which another one found is a special case."""
    names = [name for name, layout in LAYOUTS.items() if layout.detect(folder)]
    covered = {other for name in names for other in LAYOUTS[name].COVERS}
    return [name for name in names if name not in covered]


def _load(name: str, folder: Path, above: Sequence[Path] = ()) -> Dataset:
    """Load a dataset: each id once and fit to be a file's name, what is of no case noted, splits and patients known.

    above: folders that hold nothing but the next one and files, from the one that was named.
    """
    dataset = LAYOUTS[name].load(folder)
    home = folder if folder.is_dir() else folder.parent
    cases: dict[str, Case] = {}
    skipped = list(dataset.skipped)
    for case in dataset.cases:
        case = replace(case, id=one_form(case.id), patient=one_form(case.patient))
        fault = fault_of_name(case.id)
        if fault:
            skipped.append((printable(case.id), f"{str(case.image)!r}: {fault}"))
        elif case.id in cases:
            reason = f"{case.image}: a second case of this id; the first is {cases[case.id].image}"
            skipped.append((case.id, reason))
        else:
            cases[case.id] = case
    used = [path for case in cases.values() for path in (*case.image_files, *case.label_files)]
    notes = list(dataset.notes)
    # A folder that preprocess.py wrote may name the files of another one, as it says itself.
    if name != prepared.NAME and (outside := outside_of(home, used)):
        notes.append(f"{counted(len(outside), 'file', 'lie')} outside of {own_name(home)}: {listed(outside)}")
    notes += (*twins_note(used), *dot_files_note(used))
    if name not in LISTED:
        expected = LAYOUTS[name].LOOKS_FOR
        known = [case for case, _ in skipped]
        missed, noted = unseen(home, dataset.cases, known, expected, unlisted=name != decathlon.NAME)
        files = (path for place in above for path in listing(place)[1].values())
        missed += [misplaced(path, expected) for path in files if kind_in(path) in ("scan", "foreign")]
        skipped += [(printable(case), reason) for case, reason in missed]
        notes += [f"of no case, and left out: {listed(noted)}"] if noted else []
    dataset = replace(dataset, cases=tuple(cases.values()), skipped=tuple(skipped), notes=tuple(notes), layout=name)
    # A folder that preprocess.py wrote says of each case what its split is, unless somebody put a file there.
    split = _holding((SPLIT_FILE,), home, above)
    if name != prepared.NAME or (split / SPLIT_FILE).is_file():
        own = name == table.NAME and any(case.split for case in dataset.cases)
        dataset = with_split(dataset, split, own=own)
    return with_patients(dataset, _holding(TABLES, home, above))


def _holding(names: Sequence[str], home: Path, above: Sequence[Path]) -> Path:
    """The folder that holds one of these files: the dataset's own, or the one above that an archive was unpacked in."""
    places = (home, *reversed(above))
    return next((place for place in places if any((place / name).is_file() for name in names)), home)
