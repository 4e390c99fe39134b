"""<case>/*ct*.nii.gz with <case>/*labels*.nii.gz: what the published training script reads."""

import re
from pathlib import Path

from mambahome_jax.datasets.base import Case, Dataset, optional_description, scan_files
from mambahome_jax.datasets.files import listing, of_one_kind, plain
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.paths import own_name

NAME = "published"
COVERS: tuple[str, ...] = ()
LOOKS_FOR = "<case>/*ct*.nii.gz with <case>/*labels*.nii.gz (the published training layout)"

# A word of its own, as in p1_ct, CT01, scanCT, CTA or cbct, not the letters of subject, actrec or control.
_CT = (
    r"(?<![a-zA-Z])(?i:(?:cb|ce|nc|ld|hr|pet)?ct(?:as?|p|scans?|images?|img|vol|volumes?)?)(?![a-zA-Z])"
    r"|(?<![A-Z])CT(?![A-Z])"
)
_IMAGE = re.compile(_CT)
_ROLE = re.compile(rf"[-_. ]*({_CT}|(?i:combined_labels|labels))[-_. ]*")


def detect(folder: Path) -> bool:
    """Whether any direct subfolder, but one of images or labels alone, holds a *ct*.nii.gz or *labels*.nii.gz."""
    cases = [path for path in _subfolders(folder) if not of_one_kind(path.name)]
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
    for subfolder in _subfolders(folder):
        images, labels = _files(subfolder)
        if len(images) == 1 and len(labels) == 1:
            cases.append(Case(subfolder.name, next(iter(images.values())), next(iter(labels.values())), None, "ct"))
            continue
        image_keys, label_keys = _by_key(images), _by_key(labels)
        for key in sorted(image_keys | label_keys):
            case = f"{subfolder.name}_{key}" if key else subfolder.name
            found = (image_keys.get(key, []), label_keys.get(key, []))
            if [len(paths) for paths in found] == [1, 1]:
                cases.append(Case(case, found[0][0], found[1][0], None, "ct"))
            else:
                names = ", ".join(path.name for paths in found for path in paths)
                reason = f"{subfolder.name}/ holds {names}; expected one *ct*.nii.gz and one *labels*.nii.gz"
                skipped.append((case, reason))
    if not cases:
        reason = f" ({skipped[0][1]})" if skipped else ""
        raise DatasetError(f"no scan with its labels{reason}", file=folder, expected=LOOKS_FOR)
    return Dataset(own_name(folder), ("CT",), optional_description(folder)[0], tuple(cases), tuple(skipped))


def _subfolders(folder: Path) -> list[Path]:
    return list(listing(folder)[0].values())


def _files(subfolder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label maps of one subfolder, by stem."""
    files = scan_files(subfolder)
    labels = {stem: path for stem, path in files.items() if "labels" in stem.lower()}
    images = {stem: path for stem, path in files.items() if _IMAGE.search(stem) and stem not in labels}
    return images, labels


def _by_key(files: dict[str, Path]) -> dict[str, list[Path]]:
    """Files by what is left of their name without its role."""
    keys: dict[str, list[Path]] = {}
    for stem, path in files.items():
        keys.setdefault(_ROLE.sub("", stem), []).append(path)
    return keys
