"""What is wrong with a dataset, or worth a look: facts of single cases in, findings out. Reads no file."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import Dataset, Split
from mambahome_jax.datasets.label_map import near_duplicates, stray_values
from mambahome_jax.datasets.structures import describe_numbering, numbering
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import orientation_of
from mambahome_jax.imaging.header import grid_shift
from mambahome_jax.imaging.plausibility import AXES, Remark, guessed_modality
from mambahome_jax.support.console import counted

Severity = Literal["error", "warning", "note"]

SCANS = "scans"  # layout of a folder that holds scans and no labels
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_SHIFT_VOXELS = 1e-3  # below that, two grids differ by the rounding of float32 headers
_FORM_VOXELS = 0.1  # what preprocessing accepts between an image and its label map
_SHEAR = 1e-3  # cosine between two axes; float32 headers stay below 1e-6
_OBLIQUE_DEGREES = 1.0
_OUTLIER_FACTOR = 3.0
_OUTLIER_DEVIATIONS = 5.0
_FEWEST_TO_COMPARE = 5
_RARE_SHARE = 0.05
_NAMED = 5
_REPLACE = "Put a file of the expected form in its place, or leave the case out."


@dataclass(frozen=True)
class Finding:
    """One fault or remark. case, file: empty where it is about the dataset as a whole.

    severity: error, preprocessing would refuse the case; warning, worth a look; note, nothing to fix.
    """

    severity: Severity
    kind: str
    case: str
    file: str
    found: str
    expected: str = ""
    action: str = ""


@dataclass(frozen=True)
class CaseFacts:
    """Facts of one case; what could not be read, or was not asked for, is None.

    shape, spacing (mm): of the axes R-L, A-P and S-I, whatever the file's order. orientation: of the file's axes.
    digest: equal for equal images, "" where unknown or worthless. percentiles: (channel, percentile), see
    `examine.PERCENTILES`; foreground likewise of the labelled voxels. volumes_ml, label_voxels: of each label value
    that occurs. odd: what would be odd about the intensities, were the scan of that modality. thumbnail: see
    `thumbnail_of`.
    """

    id: str
    patient: str
    split: Split | None
    modality: Modality | None
    image: str
    labelled: bool
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str = ""
    digest: str = ""
    percentiles: tuple[tuple[float, ...], ...] | None = None
    foreground: tuple[tuple[float, ...], ...] | None = None
    volumes_ml: Mapping[int, float] | None = None
    label_voxels: Mapping[int, int] | None = None
    findings: tuple[Finding, ...] = ()
    odd: Mapping[Modality, Remark] = field(default_factory=dict)
    thumbnail: np.ndarray | None = field(default=None, compare=False)

    @property
    def usable(self) -> bool:
        """Whether preprocessing would take the case."""
        return all(finding.severity != "error" for finding in self.findings)

    def finding(self, severity: Severity, kind: str, found: str, expected: str = "", action: str = "") -> Finding:
        """Make a finding about the image of this case."""
        return Finding(severity, kind, self.id, self.image, found, expected, action)


def error_finding(case: str, kind: str, error: DatasetError) -> Finding:
    """Tell what a reader refused, in its own words."""
    file = str(error.file) if error.file is not None else ""
    return Finding("error", kind, case, file, error.fault, error.expected or "", error.action or _REPLACE)


def affine_findings(case: str, file: str, affine: np.ndarray) -> Iterator[Finding]:
    """Look for axes that are not at right angles, or turned against the patient's. affine (4, 4), voxel to RAS mm."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes - np.eye(3))
    turned = float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0), 0, 1))).max())
    if cosines.max() > _SHEAR:
        angle = 90 - np.degrees(np.arccos(min(cosines.max(), 1.0)))
        action = "Resampling removes the shear; other programs refuse such a file. Correct its header if it is wrong."
        found = f"axes that are {angle:.2g} degrees off a right angle"
        yield Finding("warning", "affine", case, file, found, "orthonormal axes", action)
    elif turned > _OBLIQUE_DEGREES:
        action = "Nothing: the array keeps its axes, and results return to the scan's own grid."
        found = f"oblique: axes turned by {turned:.1f} degrees against the patient's"
        yield Finding("note", "oblique", case, file, found, "", action)


def form_findings(
    case: str, file: str, shape: tuple[int, ...], sform: np.ndarray | None, qform: np.ndarray | None, pixdim: np.ndarray
) -> Iterator[Finding]:
    """Look for a header whose ways to state the geometry disagree, or which states none. pixdim (3,) mm."""
    found = expected = action = ""
    if sform is None and qform is None:
        found, expected = "neither sform nor qform", "a position in the world"
        action = "Make sure that left is left: the axes were taken as R, A, S from the first voxel on."
    elif sform is not None and qform is not None:
        voxels, mm = grid_shift(sform, qform, shape)
        if voxels > _FORM_VOXELS:
            found = f"sform and qform lie up to {mm:.3g} mm ({voxels:.3g} voxels) apart"
            expected = "the same place from both"
            action = "The sform is used; programs that prefer the qform place it elsewhere. Correct the wrong one."
    elif sform is not None:
        spacing = np.linalg.norm(sform[:3, :3], axis=0)
        if not np.allclose(spacing, pixdim, rtol=0.01):
            found = f"pixdim {by(pixdim)} mm, but spacing {by(spacing)} mm in the sform"
            expected = "the same spacing from both"
            action = "The sform is used; programs that read pixdim see other sizes. Correct the wrong one."
    if found:
        yield Finding("warning", "header", case, file, found, expected, action)


def shift_findings(case: str, file: str, voxels: float, mm: float) -> Iterator[Finding]:
    """Tell of a label map that lies beside its image, but near enough to be taken as on the same grid."""
    if _SHIFT_VOXELS < voxels <= _FORM_VOXELS:
        found = f"lies up to {mm:.2g} mm ({voxels:.2g} voxels) off the image's grid"
        yield Finding("note", "shift", case, file, found, "", "Nothing: it is taken as on the image's grid.")


def turned_finding(case: str, file: str, affine: np.ndarray, image_affine: np.ndarray) -> Finding:
    """Tell of a label map on its image's grid whose voxels are stored in another order."""
    found = f"voxels stored as {orientation_of(affine)}, the image's as {orientation_of(image_affine)}"
    return Finding("note", "orientation", case, file, found, "", "Nothing: they are matched by where they lie.")


def label_findings(case: str, file: str, counts: Mapping[int, int]) -> Iterator[Finding]:
    """Look for a label map without structure or without background. counts: voxels of each value."""
    if not any(value != 0 for value in counts):
        action = "Leave the case out, unless it truly shows none of the structures."
        yield Finding("warning", "label", case, file, "every voxel is background", "a labelled structure", action)
    elif 0 not in counts:
        action = "Is 0 the background in this label map?"
        yield Finding("warning", "label", case, file, "no voxel is background", "background 0", action)


def dataset_findings(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Find what shows only when all cases are seen together, and name what the layout itself left out."""
    scans = dataset.layout == SCANS
    # The reason of a single scan says what to do.
    kind, action = ("unreadable", "") if scans else ("missing", "Add what is missing, or remove the rest of the case.")
    return [
        *(Finding("error", kind, case, "", reason, "", action) for case, reason in dataset.skipped),
        *(Finding("note", "dataset", "", "", note) for note in dataset.notes),
        *(() if scans else _unlabelled(facts)),
        *_intensities(facts),
        *_outliers(facts),
        *_orientations(facts),
        *_duplicates(facts),
        *_leaks(facts),
        *_numbering(dataset, facts),
        *_strays(dataset, facts),
        *_rare_structures(dataset, facts),
    ]


def _unlabelled(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    wanted = [fact for fact in facts if fact.split != "test"]
    without = [fact for fact in wanted if not fact.labelled]
    action = "Add the label map; without it the case is not trained on."
    if without and len(without) == len(wanted):
        found = f"none of {counted(len(wanted), 'case')} has a label map"
        yield Finding("warning", "missing", "", "", found, "label maps to train on", action)
        return
    for fact in without:
        yield fact.finding("warning", "missing", "no label map", "", action)


def _intensities(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Find scans that cannot be of their modality; without a name, of the one that most of them look like."""
    rows = [row for fact in facts if fact.modality is None for row in fact.percentiles or ()]
    guess = guessed_modality([(row[0], row[-1]) for row in rows])
    for fact in facts:
        if remark := fact.odd.get(fact.modality or guess):
            yield fact.finding("warning", "intensity", remark.found, remark.expected, remark.action)


def _outliers(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Find spacings and shapes far from the median of their modality: by a factor, and by the spread of the others."""
    groups: dict[Modality | None, list[CaseFacts]] = defaultdict(list)
    for fact in facts:
        if fact.shape is not None and fact.spacing is not None:
            groups[fact.modality].append(fact)
    action = "Look at it: a localiser, another series, or a wrong unit in the header?"
    for group in groups.values():
        if len(group) < _FEWEST_TO_COMPARE:
            continue
        for kind, unit in (("spacing", " mm"), ("shape", " voxels")):
            values = np.array([getattr(fact, kind)[:3] for fact in group], float)
            median = np.median(values, axis=0)
            distance = np.abs(np.log(values / median))
            spread = 1.4826 * np.median(distance, axis=0)
            out = distance > np.maximum(np.log(_OUTLIER_FACTOR), _OUTLIER_DEVIATIONS * spread)
            for index in np.flatnonzero(out.any(axis=1)):
                axes = ", ".join(name for name, far in zip(AXES, out[index], strict=True) if far)
                found = f"{kind} {by(values[index])}{unit}, far off along {axes}"
                yield group[index].finding("warning", kind, found, f"near {by(median)}{unit}, the median", action)


def _orientations(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    known = [fact for fact in facts if fact.orientation]
    counts = Counter(fact.orientation for fact in known)
    usual = max(sorted(counts), key=lambda name: counts[name], default="")
    action = "Nothing: preprocessing brings all to one orientation by their affines."
    for fact in known:
        if fact.orientation != usual:
            mirrored = ", of the other handedness" if _handedness(fact.orientation) != _handedness(usual) else ""
            found = f"stored as {fact.orientation}{mirrored}; {counts[usual]} of {len(known)} scans are {usual}"
            yield fact.finding("note", "orientation", found, "", action)


def _duplicates(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    first: dict[str, CaseFacts] = {}
    for fact in facts:
        if fact.digest and (other := first.setdefault(fact.digest, fact)) is not fact:
            yield _duplicate(fact, other, "the same image as")
    by_id = {fact.id: fact for fact in facts}
    seen = {fact.id: fact.thumbnail for fact in facts if fact.thumbnail is not None and fact.shape is not None}
    for name, twin in near_duplicates(seen, {name: by_id[name].shape or () for name in seen}):
        fact, other = by_id[name], by_id[twin]
        if not fact.digest or fact.digest != other.digest:
            yield _duplicate(fact, other, "but for rounding, scaling or the order of axes the same image as")


def _duplicate(fact: CaseFacts, other: CaseFacts, same: str) -> Finding:
    found, kind = f"{same} {other.id}", "duplicate"
    if fact.split != other.split:
        found += f", which is in {other.split or 'no split'} and this one in {fact.split or 'no split'}"
        kind = "leak"
    return fact.finding("warning", kind, found, "each image once", "Remove one of them.")


def _leaks(facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    splits: dict[str, dict[Split, list[CaseFacts]]] = defaultdict(lambda: defaultdict(list))
    for fact in facts:
        if fact.split is not None:
            splits[fact.patient][fact.split].append(fact)
    action = "Move all scans of the patient to one split; the scores would be too good."
    for patient, by_split in splits.items():
        if len(by_split) > 1:
            where = "; ".join(f"{split}: {_some([fact.id for fact in cases])}" for split, cases in by_split.items())
            last = list(by_split.values())[-1][0]
            yield last.finding("warning", "leak", f"patient {patient} in {where}", "each patient in one split", action)


def _numbering(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    """Tell of stored label values that are not 1, 2, 3, ..., as preprocessing numbers them."""
    values = dataset.values
    if not dataset.labels:
        values = numbering(value for fact in facts if fact.usable for value in fact.label_voxels or ())
    if values:
        yield Finding("note", "label", "", "", describe_numbering(values))


def _strays(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    known = {fact.id: fact.label_voxels for fact in facts if fact.usable and fact.label_voxels is not None}
    files = {case.id: str(case.label_files[0]) for case in dataset.cases if case.has_label}
    action = "Look at it: if it is a slip, correct the label map; a structure of so few voxels cannot be learnt."
    for stray in stray_values(known):
        stored, name = dataset.values.get(stray.value, stray.value), dataset.labels.get(stray.value)
        title = f"label value {stored}" + (f" ({name})" if name else "")
        expected = f"a structure of more than {len(stray.voxels)} of {len(known)} label maps"
        for case, voxels in stray.voxels.items():
            found = f"{title} in {counted(voxels, 'voxel')}"
            yield Finding("warning", "label value", case, files[case], found, expected, action)


def _rare_structures(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    labelled = {case.id: case.labelled for case in dataset.cases}
    maps = [fact for fact in facts if fact.volumes_ml is not None]
    for value, name in dataset.labels.items():
        # Where a case's own dataset never labels a structure, its absence says nothing.
        seen = [fact for fact in maps if value in (labelled.get(fact.id) or dataset.labels)]
        if not seen:
            continue
        having = [fact for fact in seen if value in (fact.volumes_ml or {})]
        title = f"label {value} ({name})"
        if not having:
            action = "It cannot be learnt: correct the label table, or leave it out."
            found, expected = f"{title} occurs in none of {counted(len(seen), 'label map')}", "each structure in some"
            yield Finding("warning", "structure", "", "", found, expected, action)
            continue
        if len(having) <= _RARE_SHARE * len(seen):
            where = _some([fact.id for fact in having])
            found = f"{title} occurs in {len(having)} of {len(seen)} label maps: {where}"
            action = "Expect little of it, and make sure that each split has some."
            yield Finding("note", "structure", "", "", found, "", action)
        of_modality = Counter(str(fact.modality) for fact in seen)
        for modality in sorted(of_modality.keys() - {str(fact.modality) for fact in having}):
            found = f"{title} occurs in none of the {of_modality[modality]} label maps of modality {modality}"
            action = "Leave it out of the mean score of that modality."
            yield Finding("note", "structure", "", "", found, "", action)


def _handedness(orientation: str) -> bool:
    """Tell whether axes that run along three letters such as RAS form a right-handed system."""
    matrix = np.zeros((3, 3))
    for axis, letter in enumerate(orientation):
        row = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        matrix[row, axis] = 1 if letter in "RAS" else -1
    return bool(np.linalg.det(matrix) > 0)


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


def by(values: Iterable[float]) -> str:
    """Say sizes along axes: 0.8 x 0.8 x 3."""
    return " x ".join(f"{value:.4g}" for value in values)
