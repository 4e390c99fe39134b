"""What lies in a dataset's folders and could be a scan, but is of no case, with the reason."""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mambahome_jax.datasets.base import Case
from mambahome_jax.datasets.files import listed, of_one_kind
from mambahome_jax.datasets.scans import is_output, of_labels, search
from mambahome_jax.imaging.dicom_series import is_scan, sort_out
from mambahome_jax.imaging.formats import content_of, foreign_stem, kind_in, reason_of, without_second_halves
from mambahome_jax.support.files import SCAN_SUFFIXES, hidden, scan_stem


def unseen(
    root: Path, cases: Collection[Case], known: Collection[str], expected: str, *, unlisted: bool = True
) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, reason) of what should be a case, and paths of what lies beside cases that have all that they need.

    Looks beside the files of the cases, with one listing a folder; only files whose names say nothing are opened. In a
    folder of many images whatever could be another one should be a case; where each case has a folder, every folder.
    known: ids that are accounted for. expected: of the layout, for people. unlisted: False where the layout itself says
    which readable files it leaves out.
    """
    used: dict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for case in cases:
        images.update({_add(path, used) for path in case.image_files})
        for path in case.label_files:
            _add(path, used)
    look = _Look(used, expected)
    for folder in used:
        home = Path(folder)
        if folder in images:
            look.beside_images(home, images[folder] > 1 or of_one_kind(home.name), known if unlisted else None)
        else:
            look.beside_labels(home)
    look.unused_parts(root, known if unlisted else None)
    look.around(root, known)
    return look.skipped, look.beside


def misplaced(path: Path, expected: str) -> tuple[str, str]:
    """(name, reason) of a scan that lies beside the folders of a dataset."""
    name = foreign_stem(path) if kind_in(path) == "foreign" else scan_stem(path)
    return name, f"{path}: of no case, as it lies beside their folders; expected {expected}"


def _add(path: Path, used: dict[str, set[str]]) -> str:
    """Add a file to those of its folder; returns the folder. Strings, as paths of 100,000 files take seconds."""
    folder, name = os.path.split(path)
    folder = folder or "."
    used[folder].add(name)
    return folder


@dataclass
class _Look:
    """used: names of the files of cases by folder. skipped, beside: what `unseen` gives."""

    used: Mapping[str, set[str]]
    expected: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.above: set[str] = set()
        for folder in self.used:
            while folder not in self.above:
                self.above.add(folder)
                folder = os.path.dirname(folder)  # noqa: PTH120

    def unused(self, folder: Path) -> list[Path]:
        """Visible files and folders that are of no case."""
        home = str(folder)
        try:
            names = set(os.listdir(home)) - self.used.get(home, set())  # noqa: PTH208
        except OSError:
            # Said by what reads the folder.
            return []
        paths = (folder / name for name in sorted(names) if not hidden(name))
        return [path for path in paths if str(path) not in self.above]

    def beside_images(self, home: Path, many: bool, known: Collection[str] | None) -> None:
        """known: ids that the layout skips; None where it names all readable files that it leaves out."""
        foreign, others = [], []
        for path in self.unused(home):
            kind = kind_in(path)
            if kind == "foreign":
                foreign.append(path)
            elif kind == "scan":
                stem = scan_stem(path)
                # Another form of a case's file is noted elsewhere.
                if known is None or self._form_of_used(path, stem) or _of_any(stem, known):
                    continue
                if many:
                    self.skipped.append((stem, f"{path}: of no case by its name; expected {self.expected}"))
                else:
                    self.beside.append(str(path))
            elif kind != "other":
                others.append(path)
        self.foreign(foreign)
        folders = [path for path in others if path.is_dir()]
        self._unnamed(home, [path for path in others if path not in folders and path.is_file()])
        for path in folders:
            if not of_labels(path.name):
                self._folder(path, many)

    def beside_labels(self, home: Path) -> None:
        """Other formats and DICOM beside label maps; what else lies there is of no scan."""
        paths = {path: kind_in(path) for path in self.unused(home)}
        self.foreign(path for path, kind in paths.items() if kind == "foreign")
        others = [path for path, kind in paths.items() if kind in ("slice", "unknown")]
        contents = sort_out(path for path in others if path.is_file())
        slices = [*contents.beside, *(path for one in contents.series for path in one.paths)]
        for folder in others if of_one_kind(home.name) else ():
            if folder.is_dir() and is_scan(folder):
                slices.append(folder)
            elif folder.is_dir() and (found := search(folder).scans):
                names = listed((one.path.name for one in found), 3)
                self.skipped.append((folder.name, f"{folder}: label maps of no case ({names}). Move them to {home}"))
        reason = "DICOM, which is not read as a label map. Convert it to a file, for example .nii.gz"
        self.skipped += [(path.stem, f"{path}: {reason}") for path in slices]

    def unused_parts(self, root: Path, known: Collection[str] | None) -> None:
        """Folders of images alone in which no file is of a case."""
        for path in self.unused(root) if root.is_dir() else ():
            if path.is_dir() and of_one_kind(path.name):
                if path.name.lower().startswith("images"):
                    self.beside_images(path, True, known)
                else:
                    self.beside_labels(path)

    def foreign(self, paths: Iterable[Path]) -> None:
        """Files of formats that are not read."""
        for path in without_second_halves(list(paths)):
            if self._form_of_used(path, foreign_stem(path)):
                self.beside.append(str(path))
            else:
                self.skipped.append((foreign_stem(path), reason_of(path)))

    def around(self, root: Path, known: Collection[str]) -> None:
        """Folders of the dataset that hold no file of a case, and scans beside its folders."""
        for path in self.unused(root) if root.is_dir() else ():
            name = path.name
            # Cases of a folder of several are called <folder>_<rest>.
            if any(one == name or one.startswith(f"{name}_") for one in known):
                if path.is_dir() and name in known:
                    self.skipped += [(f"{name}_{other}", reason) for other, reason in search(path).failures]
            elif str(root) not in self.used and path.is_file() and kind_in(path) in ("scan", "foreign"):
                self.skipped.append(misplaced(path, self.expected))
            elif path.is_dir() and not of_labels(name) and not of_one_kind(name):
                self._folder(path)

    def _folder(self, path: Path, case: bool = True) -> None:
        """case: False within the folder of a case, which may hold other scans of its patient."""
        if is_output(path):
            return
        found = search(path)
        if not case:
            self.beside += [f"{path}/"] if found.scans or found.failures else []
            return
        if found.scans:
            names = listed((one.path.name for one in found.scans), 3)
            self.skipped.append((path.name, f"{path}: scans of no case ({names}); expected {self.expected}"))
        self.skipped += [(f"{path.name}_{name}", reason) for name, reason in found.failures]

    def _unnamed(self, home: Path, paths: list[Path]) -> None:
        """Files whose names do not tell what they are."""
        contents = sort_out(paths)
        slices = [path for one in contents.series for path in one.paths]
        if slices:
            reason = f"{home}: {len(slices)} DICOM slices lie among other files, {slices[0].name} the first"
            self.skipped.append((home.name, f"{reason}. Move those of each scan to a folder of its own"))
        self.skipped += [(path.name, reason) for path, reason in contents.unreadable]
        for path in contents.others:
            if content := content_of(path):
                self.skipped.append((path.name, reason_of(path, content)))

    def _form_of_used(self, path: Path, stem: str) -> bool:
        used = self.used.get(str(path.parent), set())
        return any(stem + ending in used for ending in (*SCAN_SUFFIXES, ""))


def _of_any(stem: str, ids: Collection[str]) -> bool:
    """Whether a file belongs to one of the cases by its name."""
    return any(stem == one or stem.startswith(f"{one}_") for one in ids)
