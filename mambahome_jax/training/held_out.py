"""What a training ends with: label maps of the cases held out, their scores, and a report of them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from mambahome_jax.config import DataProperties
from mambahome_jax.datasets.base import Split
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.datasets.prepared import Prepared, PreparedCase
from mambahome_jax.errors import DatasetError, MambaHomeError
from mambahome_jax.evaluation.evaluate import make_summary, provenance_of, score_case
from mambahome_jax.evaluation.metrics import dice
from mambahome_jax.evaluation.pairs import Pair
from mambahome_jax.evaluation.results import Score, results_table, write_metrics
from mambahome_jax.flags import EvaluateConfig, ReportConfig
from mambahome_jax.imaging.geometry import orientation_of, reorient, same_grid
from mambahome_jax.imaging.volume import Volume, read_grid, replace_values, write_volume
from mambahome_jax.inference.batch import CASE_ERRORS, failure_reason
from mambahome_jax.inference.ensemble import TrainingRecord, apply_network
from mambahome_jax.inference.postprocess import keep_largest
from mambahome_jax.inference.tiled import Replica
from mambahome_jax.patches.store import Store
from mambahome_jax.reporting.report import write_report
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import earlier_json, write_json
from mambahome_jax.support.output_folder import open_output
from mambahome_jax.support.processes import usable_cores
from mambahome_jax.training.distributed import gather, is_first
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.validation import ValidationSettings, predict_case, read_case
from mambahome_jax.weights.checkpoint import read_checkpoint_params

if TYPE_CHECKING:
    from mambahome_jax.training.train import TrainingRun

FOLDER, SUMMARY = "validation", "summary.json"
Largest = dict[str, dict[str, float]]  # structure -> case -> Dice of the largest connected part


def forget_scores(output: Path) -> None:
    """Remove the scores that an earlier run wrote to a folder: they are of another network."""
    with contextlib.suppress(OSError):  # what stands in the way is told when there are scores to write
        for path in (output / SUMMARY, output / "metrics.csv", output / "report.html", *output.glob("*.nii.gz")):
            path.unlink(missing_ok=True)


def score_held_out(
    folder: Path,
    setup: Setup,
    run: TrainingRun,
    graphdef: nnx.GraphDef,
    device: jax.Device,
) -> None:
    """Predict the cases held out by the best network of a run in `folder`, score them, and show and report the scores.

    What came of it is in `run`: held_out, failures, and signal where one ended it. Several processes share the cases.
    """
    settings = ValidationSettings.of(setup, setup.held_out, run.display.say)
    scored = run.best is not None and run.best["val_dice"] is not None
    name, step = ("best", run.best["step"]) if run.best is not None and scored else ("last", run.step)
    checkpoint = {"name": name, "step": step, "chosen_on": list(setup.val_cases) if scored else []}
    output = folder / FOLDER
    # No process reads the checkpoint before all of them have written their part of it.
    run.held_out = gather(_scored_before(output, checkpoint, settings.cases))[0]
    try:
        if run.held_out is None:
            open_output(output)
            run.display.say(f"Segmenting the {counted(len(settings.cases), 'case')} held out by checkpoints/{name}")
            params = jax.device_put(read_checkpoint_params(folder / "checkpoints" / name), device)
            network = Replica(device, partial(apply_network, graphdef, params))
            scores, largest, failures, left = HeldOutCases(output, setup, settings, network, run).score()
            if run.signal is not None:
                return
            config = EvaluateConfig(output, setup.validated.root / "labels", output)
            done = len({row.case for row in scores})
            run.held_out = make_summary(config, scores, done, sorted(failures.items()), _names(setup)) | {
                "provenance": _provenance(scores, checkpoint, setup, run.settings),
                "checkpoint": checkpoint,
                "note": _note(checkpoint, settings.cases),
                "not_segmented": left,
                **({"largest_part": largest} if setup.flags.folds is not None else {}),
            }
            if is_first() and (scores or setup.flags.folds is not None):
                names, values = _names(setup), _reference_values(setup)
                pair = partial(pair_of, output, setup.validated, names=names, values=values)
                with run.timeline.doing("report"):
                    write_scores(output, setup.validated, scores, run.held_out, pair)
    except MambaHomeError as error:
        run.failures[FOLDER] = str(error)
        run.display.say(f"No held-out scores: {error}")
        return
    show(output, run.held_out, run.display)


def show(output: Path, summary: Mapping[str, Any], display: Any) -> None:
    """Print the table of the scores, and what has to be known to read it."""
    if summary["cases"]:
        display.console.print(results_table(summary, display.console.width))
        display.say(f"Held-out scores of checkpoints/{summary['checkpoint']['name']}, with the report, in {output}")
    if summary["note"]:
        display.say(f"Note: {summary['note']}")
    for failure in summary["failures"]:
        display.say(f"Not scored: {failure['case']}: {failure['reason']}")
    if summary["not_segmented"]:
        missing = counted(len(summary["not_segmented"]), "held-out case", "were")
        display.say(f"The time was over before {missing} segmented")


@dataclass(frozen=True)
class HeldOutCases:
    """The cases of a run to segment and to score, and what for."""

    output: Path
    setup: Setup
    settings: ValidationSettings
    network: Replica
    run: TrainingRun

    def score(self) -> tuple[list[Score], Largest, dict[str, str], list[str]]:
        """Scores, those of the largest parts, failures, and the cases for which no time was left; failures go to the
        run too, and a signal."""
        store, waiting = Store(self.setup.validated.store), deque[tuple[str, Future[tuple[list[Score], dict]]]]()
        scores: list[Score] = []
        largest: Largest = {}
        failures: dict[str, str] = {}
        share = self.settings.cases[jax.process_index() :: jax.process_count()]
        left: Sequence[str] = ()
        workers = usable_cores()

        def collect(most: int) -> None:
            while len(waiting) > most:
                case, result = waiting.popleft()
                try:
                    rows, parts = result.result()
                    scores.extend(rows)
                    for name, value in parts.items():
                        largest.setdefault(name, {})[case] = value
                except CASE_ERRORS as error:
                    failures[case] = failure_reason(error)

        with ThreadPoolExecutor(workers) as writers:
            for number, case in enumerate(share):
                self.run.display.state("Held-out", f"case {number + 1}/{len(share)}")
                if self.run.stop.noticed() or self._late():
                    left = share[number:]
                    break
                try:
                    image, reference = read_case(store, case, self.settings)
                    labels = predict_case(self.network, image, store.entry(case), self.settings)
                except CASE_ERRORS as error:
                    failures[case] = failure_reason(error)
                    continue
                del image
                waiting.append((case, writers.submit(self._finish, case, labels, reference, store)))
                collect(workers)
            collect(0)
        self.run.stop.agree(at_once=True)
        self.run.signal = self.run.stop.requested()
        rows = [asdict(row) for row in scores]
        mine = {"scores": rows, "largest": largest, "failures": failures, "left": list(left)}
        shares = gather(mine)
        failures = {case: reason for each in shares for case, reason in each["failures"].items()}
        self.run.failures.update(failures)
        scores = [Score(**row) for each in shares for row in each["scores"]]
        scores.sort(key=lambda row: (row.case, row.label))
        largest = {
            name: {case: value for each in shares for case, value in each["largest"].get(name, {}).items()}
            for name in dict.fromkeys(name for each in shares for name in each["largest"])
        }
        return scores, largest, failures, [case for each in shares for case in each["left"]]

    def _late(self) -> bool:
        """Whether another case and the report no longer fit into the time."""
        budget = self.run.schedule.budget
        included = budget.limited and budget.has_scores
        return included and budget.left() < budget.held_out_seconds(1 / len(self.settings.cases))

    def _finish(
        self, case: str, labels: np.ndarray, reference: np.ndarray, store: Store
    ) -> tuple[list[Score], dict[str, float]]:
        """Write the label map of a case, and score it; in a cross-validation also the largest part of each structure,
        by Dice."""
        stored = dict(self.setup.properties.values)
        affine, names = np.array(store.entry(case).affine), _names(self.setup)
        ours, truth = (replace_values(each, stored) if stored else each for each in (labels, reference))
        entry = next(entry for entry in self.setup.validated.cases if entry.id == case)
        result = on_own_grid(Volume(ours, affine), self.setup.validated.image_path(entry))
        write_volume(self.output / f"{case}.nii.gz", result, names=names, warn=False)
        values = _reference_values(self.setup)
        pair = pair_of(self.output, self.setup.validated, entry, names=names, values=values)
        scores = score_case(pair, Volume(ours, affine), Volume(truth, affine))
        if self.setup.flags.folds is None:
            return scores, {}
        parts = dice(keep_largest(ours), truth, [row.label for row in scores])
        return scores, {row.structure: float(value) for row, value in zip(scores, parts, strict=True)}


def on_own_grid(labels: Volume, image: Path) -> Volume:
    """Labels of a store's case on the grid of its image's file; as they are where there is no such file any more."""
    try:
        grid = read_grid(image)
    except DatasetError:
        return labels
    labels = reorient(labels, orientation_of(grid.affine))
    if not same_grid(Volume(grid.array, grid.affine), labels):
        return labels
    return Volume(labels.array, grid.affine, grid.header)


def _scored_before(output: Path, checkpoint: Mapping[str, Any], cases: Sequence[str]) -> dict[str, Any] | None:
    """The summary of an earlier end of this run, where it is of the same checkpoint and all cases."""
    summary = earlier_json(output / SUMMARY)
    whole = summary.get("checkpoint") == checkpoint and summary.get("cases") == len(cases)
    return summary if whole and all((output / f"{case}.nii.gz").is_file() for case in cases) else None


def _names(setup: Setup) -> dict[int, str]:
    """Value in the label maps that are written -> structure."""
    stored = dict(setup.properties.values)
    return {stored.get(value, value): name for value, name in setup.structures.items()}


def _reference_values(setup: Setup) -> dict[int, int]:
    """Value in the references -> value in the label maps that are written."""
    stored = dict(setup.properties.values)
    own = setup.val_values or {value: value for value in setup.structures}
    return {old: stored.get(new, new) for old, new in own.items()}


def pair_of(
    output: Path, prepared: Prepared, case: PreparedCase, *, names: Mapping[int, str], values: Mapping[int, int]
) -> Pair:
    """The label map of a case in `output` and its reference, whose `values` become those of the label map.

    names: value in the label map -> structure.
    """
    labelled = None if case.labelled is None else tuple(values[old] for old in case.labelled if old in values)
    reference = prepared.label_path(case) or output
    return Pair(case.id, output / f"{case.id}.nii.gz", reference, names, reference_values=values, labelled=labelled)


def _provenance(
    scores: Sequence[Score], checkpoint: Mapping[str, Any], setup: Setup, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the network saw of the cases, with what it saw before this run by the record of its weights."""
    record = TrainingRecord.of(DataProperties.from_json(settings["data"]))
    contents = dict(zip(setup.held_out, setup.properties.held_out or (), strict=False))
    cases = sorted({row.case for row in scores})
    splits: dict[str, Split] = {}
    for case in cases:
        split = "test" if record is None else record.split_of(contents.get(case, ()))
        if case in setup.trained_on:
            split = "train"
        if split != "train" and case in checkpoint["chosen_on"]:
            split = "val"
        elif split == "val":  # validated on for the curves alone
            split = "test"
        if split is not None:
            splits[case] = split
    return provenance_of(cases, splits)


def _note(checkpoint: Mapping[str, Any], cases: Sequence[str]) -> str:
    """What to say of scores on cases that helped to choose the network."""
    if not checkpoint["chosen_on"]:
        return ""
    which = "these cases" if len(checkpoint["chosen_on"]) == len(cases) else f"{len(checkpoint['chosen_on'])} of these"
    return f"`best` was chosen by its Dice on {which}, so the scores are a little too good for unseen cases"


def write_scores(
    output: Path,
    prepared: Prepared,
    scores: Sequence[Score],
    summary: Mapping[str, Any],
    pair: Callable[[PreparedCase], Pair],
) -> None:
    """Write metrics.csv, summary.json and report.html, the latter with pictures of the cases that have files.

    Raises OutputError.
    """
    write_metrics(output / "metrics.csv", scores)
    write_json(output / SUMMARY, summary, "--output_dir")
    if not scores:
        return
    scored = {row.case for row in scores}
    cases = [case for case in prepared.cases if case.id in scored]
    files = {case.id: (prepared.image_path(case), prepared.label_path(case)) for case in cases}
    drawn = [case for case in cases if all(path is not None and path.exists() for path in files[case.id])]
    pairs = {case.id: pair(case) for case in drawn}
    scans = {case.id: Scan(case.id, files[case.id][0], case.modality) for case in drawn}
    write_report(ReportConfig(evaluation=output), files=(pairs, scans) if drawn else None)
