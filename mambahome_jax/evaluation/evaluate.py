"""Label maps against references: the scores of a case, and of two folders into metrics.csv and summary.json."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from mambahome_jax.datasets.base import Split
from mambahome_jax.datasets.files import counterparts, twins_note
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError
from mambahome_jax.evaluation.metrics import compare
from mambahome_jax.evaluation.pairs import Pair, find_pairs, left_out_of, named_pairs, read_pair, splits_of
from mambahome_jax.evaluation.results import (
    Evaluation,
    Score,
    compare_runs,
    describe,
    read_evaluation,
    summarise,
    write_metrics,
)
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.imaging.header import require_scale
from mambahome_jax.imaging.plausibility import resembles_image
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.support.console import Say, Track, counted, shown, silent, untracked
from mambahome_jax.support.files import write_json
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import locked, open_output
from mambahome_jax.support.paths import real_path
from mambahome_jax.support.processes import isolated_reads, run_jobs, usable_cores

if TYPE_CHECKING:
    from mambahome_jax.keywords import EvaluateFlags

# Starting a process takes about as long as a handful of small cases; files below this many bytes are small.
SMALL_BYTES = 20_000_000
DEFINITIONS = {
    "mean": "mean over structures of each structure's mean over cases; nan and inf are left out",
    "dice": "2TP / (P + R); nan where the reference is empty",
    "hd95": "mm; larger of both directions' 95th percentiles of surface distance; nan where one mask is empty",
    "assd": "mm; mean of both directions' surface distances together; inf where one mask is empty, nan where both are",
    "volume_difference_ml": "prediction minus reference",
    "nsd": "share of surface voxels within the tolerance; 0 where one mask is empty, nan where both are",
}
DEFINITIONS_BY_AREA = {
    "hd95": "mm; larger of both directions' distances that 95 % of the area is within; inf where a mask is empty",
    "assd": "mm; mean of both directions' distances by area; inf where one mask is empty, nan where both are",
    "nsd": "share of the surfaces' area within the tolerance; 0 where one mask is empty, nan where both are",
}


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found and wrote.

    scores: of each case and structure. summary, comparison: the contents of summary.json and, where another run was
    given, comparison.json. failures: (case, reason) of what was not scored.
    """

    scores: tuple[Score, ...]
    summary: Mapping[str, Any]
    comparison: Mapping[str, Any] | None
    failures: tuple[tuple[str, str], ...]
    output_dir: Path

    @property
    def files(self) -> tuple[Path, ...]:
        names = ("metrics.csv", "summary.json", *(["comparison.json"] if self.comparison is not None else []))
        return tuple(self.output_dir / name for name in names)

    @property
    def exit_code(self) -> int:
        """0 all cases scored, 1 some have no counterpart or cannot be scored, 2 none could be scored."""
        return 2 if self.summary["cases"] == 0 else int(bool(self.failures))


@shows_keywords(EvaluateConfig)
def evaluate(*, progress: bool = False, **flags: "Unpack[EvaluateFlags]") -> Evaluated:
    """Score label maps against references, as `mambahome evaluate` does, silently; keywords are its flags.

    Raises:
        DatasetError: no pairs, no names where they were asked for, no evaluation at compare.
        ConfigError, OutputError.
    """
    return evaluate_folders(from_keywords(EvaluateConfig, flags), *shown(progress, "Evaluating"))


@isolated_reads()
def evaluate_folders(
    config: EvaluateConfig,
    say: Say = silent,
    track: Track = untracked,
    show: Callable[[Evaluated], None] = lambda _: None,
) -> Evaluated:
    """Score config.predictions against config.references; see `evaluate`.

    Args:
        say, track: of support.console.
        show: takes the result before anything of it is written.
    """
    require_scale(config.spacing_scale)
    if not config.tolerance_mm >= 0:
        raise ConfigError(f"--tolerance_mm {config.tolerance_mm}; expected 0 or more")
    if config.num_workers is not None and config.num_workers < 0:
        raise ConfigError(f"--num_workers {config.num_workers}; expected 0 or more")
    pairs, alone = find_pairs(config.predictions, config.references)
    pairs, names, values, source = named_pairs(pairs, config.predictions, config.references, config.labels)
    options = {name: getattr(config, name) for name in ("tolerance_mm", "surface", "spacing_scale")}
    pairs = [replace(pair, **options) for pair in pairs]
    if values is not None:
        text = ", ".join(f"{old} is {new} ({names.get(new, f'label_{new}')})" for old, new in values.items())
        say(f"The references name other values than the predictions; compared by name: {text}")
    for note in twins_note(path for pair in pairs for path in (pair.prediction, pair.reference)):
        say(f"Note: {note}")
    for label, held in pairs[0].regions.items():
        say(f"{names.get(label, label)} is a region, scored as the values {' '.join(map(str, held))} together")
    if pairs[0].ignored is not None:
        say(f'Voxels of the references\' label "ignore" ({pairs[0].ignored}) are left out of the scores')
    say(f"Names of the structures: {source or 'none found (--labels FILE gives them)'}")
    splits, skipped = splits_of(config.predictions, pairs), left_out_of(config.predictions)
    left_out = [case for case, _ in alone if case in skipped]
    alone = [(case, reason) for case, reason in alone if case not in skipped]
    other = _other_run(config, {pair.case for pair in pairs})
    with locked(config.output_dir, "evaluate"):
        open_output(config.output_dir, ["metrics.csv", "summary.json", *(["comparison.json"] if other else [])])
        scores, failed = _score(pairs, config.num_workers, track)
        failures = tuple(alone + failed)
        summary = make_summary(config, scores, len(pairs) - len(failed), failures, names, values)
        unscored = {case for case, _ in failed}
        summary["regions"] = {str(label): held for label, held in pairs[0].regions.items()}
        summary["provenance"] = provenance_of(
            [pair.case for pair in pairs if pair.case not in unscored], splits, left_out
        )
        comparison = compare_runs(scores, other.scores) | {"other": str(config.compare)} if other else None
        result = Evaluated(tuple(scores), summary, comparison, failures, config.output_dir)
        # Scores that took hours are not lost to a disk that filled up meanwhile.
        show(result)
        write_metrics(config.output_dir / "metrics.csv", scores)
        write_json(config.output_dir / "summary.json", summary, "--output_dir")
        if comparison is not None:
            write_json(config.output_dir / "comparison.json", comparison, "--output_dir")
        else:
            # One of an earlier evaluation does not belong to these scores.
            with contextlib.suppress(OSError):
                (config.output_dir / "comparison.json").unlink(missing_ok=True)
    return result


def make_summary(
    config: EvaluateConfig,
    scores: Sequence[Score],
    cases: int,
    failures: Iterable[tuple[str, str]],
    names: Mapping[int, str],
    values: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """The content of summary.json. cases: how many were scored; values: of the references -> of the predictions."""
    return summarise(scores) | {
        "statistics": describe(scores),
        "cases": cases,
        "failures": [{"case": case, "reason": reason} for case, reason in failures],
        "tolerance_mm": config.tolerance_mm,
        "spacing_scale": config.spacing_scale,
        "labels": {str(value): name for value, name in names.items()},
        "reference_values": None if values is None else {str(old): new for old, new in values.items()},
        "predictions": str(config.predictions),
        "references": str(config.references),
        "surface": config.surface,
        "definitions": DEFINITIONS | (DEFINITIONS_BY_AREA if config.surface == "area" else {}),
    }


def provenance_of(cases: Sequence[str], splits: Mapping[str, Split], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Count the cases by their part in the training, and name those that were trained on, as summary.json does.

    left_out: cases that infer passed over because of their part.
    """
    parts = [splits.get(case) for case in cases]
    words: dict[Split | None, str] = {
        "train": "trained on",
        "val": "validated on in training",
        "test": "unseen",
        None: "not known",
    }
    seen, held_out, unseen, unknown = (parts.count(part) for part in words)
    others = ", ".join(
        f"{parts.count(part)} {text}" for part, text in words.items() if part != "train" and part in parts
    )
    end = "; scores on those tell nothing of unseen ones" if seen else ""
    text = f"Of {counted(len(cases), 'case')}, {counted(seen, '', 'were')} trained on"
    text += (f" ({others})" if others else "") + end
    if unknown == len(cases):
        text = f"Nothing says which of the {counted(len(cases), 'case')} the network was trained on"
    if left_out:
        text += f". Not among them: {len(left_out)} that infer left out by --split"
    return {
        "summary": text,
        "trained_on": seen,
        "validated_on": held_out,
        "unseen": unseen,
        "unknown": unknown,
        "trained_on_cases": [case for case in cases if splits.get(case) == "train"],
        "left_out": list(left_out),
    }


def _other_run(config: EvaluateConfig, cases: set[str]) -> Evaluation | None:
    """Read the evaluation to compare with, before the work; None where none was asked for.

    Raises DatasetError: no evaluation, or none of `cases` in it. ConfigError: NSD at another tolerance, other
    definitions of distance, or the evaluation would be overwritten.
    """
    if config.compare is None:
        return None
    if real_path(config.compare) == real_path(config.output_dir):
        raise ConfigError(f"--compare {config.compare} is the --output_dir itself. Name another --output_dir")
    other = read_evaluation(config.compare)
    for flag, default, found in (
        ("tolerance_mm", config.tolerance_mm, "NSD was taken at {} mm there; expected {:g} mm"),
        ("surface", "voxels", "distances were taken of {} there; expected {}"),
    ):
        there, here = other.summary.get(flag, default), getattr(config, flag)
        if there != here:
            action = f"Pass --{flag} {there}, or evaluate the other run again"
            raise ConfigError(f"--compare {config.compare}: {found.format(there, here)}. {action}")
    theirs = sorted({row.case for row in other.scores})
    ours = counterparts(theirs, cases)
    if not ours:
        expected = f"some of the cases of --predictions, such as {min(cases)}"
        action = "Name the evaluation of the same cases."
        raise DatasetError(f"other cases, such as {theirs[0]}", file=config.compare, expected=expected, action=action)
    return replace(other, scores=[replace(row, case=ours.get(row.case, row.case)) for row in other.scores])


def _score(pairs: list[Pair], num_workers: int | None, track: Track) -> tuple[list[Score], list[tuple[str, str]]]:
    workers = min(usable_cores() if num_workers is None else num_workers, len(pairs))
    small = sum(pair.reference.stat().st_size for pair in pairs) < SMALL_BYTES
    scores: list[Score] = []
    failed: list[tuple[str, str]] = []
    results = run_jobs(evaluate_case, pairs, max(workers, 1), threads=workers <= 1 or small)
    for pair, result in track(results, len(pairs)):
        if not isinstance(result, BaseException):
            scores += result
        elif isinstance(result, MambaHomeError | OSError | MemoryError):
            failed.append((pair.case, str(result) or type(result).__name__))
        else:
            raise result
    return sorted(scores, key=lambda row: (row.case, row.label)), sorted(failed)


def evaluate_case(pair: Pair) -> list[Score]:
    """Score every structure that is named, or found in either label map.

    Raises DatasetError: a file cannot be read, is no label map (an image too), or the two are not on the same grid.
    """
    prediction, reference = read_pair(pair)
    ours, theirs = _values(prediction), _values(reference)
    for volume, values, file in ((prediction, ours, pair.prediction), (reference, theirs, pair.reference)):
        unnamed = {*values}.difference({0, *pair.names}, *pair.regions.values())
        if unnamed and resembles_image(volume.array, len(unnamed)):
            found = f"{len(unnamed)} values without a name, which change from voxel to voxel"
            action = "Is this an image? If it is a label map, name its structures by --labels FILE."
            raise DatasetError(found, file=file, expected="a label map", action=action)
    return score_case(pair, prediction, reference)


def score_case(pair: Pair, prediction: Volume, reference: Volume) -> list[Score]:
    """Score label maps that were read: every structure that is named, or found in either of them."""
    held = {value for values in pair.regions.values() for value in values}
    labels = sorted({*pair.names} | ({*_values(prediction), *_values(reference)} - {0, *held}))
    labels = [label for label in labels if pair.labelled is None or label in pair.labelled]
    if not labels:
        return []
    voxel_ml = abs(float(np.linalg.det(reference.affine[:3, :3]))) / 1000
    arrays, spacing, surface = (prediction.array, reference.array), reference.spacing, pair.surface
    plain = [label for label in labels if label not in pair.regions]
    comparisons = dict(zip(plain, compare(*arrays, plain, spacing, surface=surface) if plain else (), strict=True))
    for label in labels:
        if label in pair.regions:
            ours, theirs = (np.isin(array, pair.regions[label]) for array in arrays)
            (comparisons[label],) = compare(ours, theirs, 1, spacing, surface=surface)
    return [
        Score(
            case=pair.case,
            label=label,
            structure=pair.names.get(label, f"label_{label}"),
            dice=both.dice(),
            hd95=both.hausdorff(95),
            assd=both.mean_distance(),
            nsd=both.surface_dice(pair.tolerance_mm),
            volume_ml=both.predicted * voxel_ml,
            reference_volume_ml=both.reference * voxel_ml,
        )
        for label, both in sorted(comparisons.items())
    ]


def _values(volume: Volume) -> list[int]:
    present = np.zeros(int(volume.array.max()) + 1, bool)
    present[volume.array] = True
    return [int(value) for value in np.flatnonzero(present)]
