"""<case>/*ct*.nii.gz with <case>/*labels*.nii.gz: what the published training script reads."""

import re
from collections import defaultdict
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, dataset_of, optional_description
from mambahome_jax.datasets.files import listing, of_one_kind, plain, scan_files

NAME = "published"
LOOKS_FOR = "<case>/*ct*.nii.gz with <case>/*labels*.nii.gz (the published training layout)"
COVERS: tuple[str, ...] = ()

# A word of its own, as in p1_ct, CT01, scanCT, CTA or cbct, not the letters of subject, actrec or control.
_CT = (
    r"(?<![a-zA-Z])(?i:(?:cb|ce|nc|ld|hr|pet)?ct(?:as?|p|scans?|images?|img|vol|volumes?)?)(?![a-zA-Z])"
    r"|(?<![A-Z])CT(?![A-Z])"
)
_IMAGE = re.compile(_CT)
_ROLE = re.compile(rf"[-_. ]*({_CT}|(?i:combined_labels|labels))[-_. ]*")


def detect(folder: Path) -> bool:
    """Whether any direct subfolder, but one of images or labels alone, holds a *ct*.nii.gz or *labels*.nii.gz."""
    cases = [path for name, path in listing(folder)[0].items() if not of_one_kind(name)]
    return any(images or labels for images, labels in map(_files, cases)) and not plain(folder)


def load(folder: Path) -> Dataset:
    """One case a subfolder, named after it; where a subfolder holds several pairs, <subfolder>_<rest of the name>.

    The published script pairs by sorted order over the whole dataset, which shifts all pairs after one missing file;
    here a pair lies in one subfolder. The letters ct count as a word of a name only (p1_ct, CT01, CTA). An image
    without labels, or labels without an image, is skipped. The files say "ct", so the modality is CT unless the user
    says otherwise.
    Raises DatasetError: no complete pair at all.
    """
    cases, skipped = [], []
    for home in listing(folder)[0].values():
        images, labels = _files(home)
        single = len(images) == 1 and len(labels) == 1
        pairs: dict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
        for side, files in enumerate((images, labels)):
            for stem, path in files.items():
                pairs["" if single else _ROLE.sub("", stem)][side].append(path)
        for key, (scans, maps) in sorted(pairs.items()):
            case = f"{home.name}_{key}" if key else home.name
            if len(scans) == len(maps) == 1:
                cases.append(Case(case, scans[0], maps[0], None, "ct"))
            else:
                names = ", ".join(path.name for path in scans + maps)
                expected = "expected one *ct*.nii.gz and one *labels*.nii.gz"
                skipped.append((case, f"{home.name}/ holds {names}; {expected}"))
    structures, _ = optional_description(folder)
    absent = "no scan with its labels"
    return dataset_of(cases, skipped, folder, LOOKS_FOR, absent, channels=("CT",), labels=structures)


def _files(home: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label maps of one subfolder, by stem."""
    files = scan_files(home)
    labels = {stem: path for stem, path in files.items() if "labels" in stem.lower()}
    images = {stem: path for stem, path in files.items() if _IMAGE.search(stem) and stem not in labels}
    return images, labels
