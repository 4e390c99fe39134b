"""report: an evaluation as one HTML page, with the worst cases in pictures."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mambahome_jax.commands.evaluate import find_pairs
from mambahome_jax.config import Modality
from mambahome_jax.datasets.files import counterparts
from mambahome_jax.datasets.find_scans import Scan, find_scans
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.evaluation.evaluate import Pair, read_pair
from mambahome_jax.evaluation.files import Evaluation, read_evaluation
from mambahome_jax.evaluation.label_tables import judged_values, labelled_values
from mambahome_jax.evaluation.scores import METRICS
from mambahome_jax.flags import ReportConfig
from mambahome_jax.imaging.formats import scan_stem
from mambahome_jax.imaging.geometry import resample_to, same_grid
from mambahome_jax.imaging.intensity import display_range
from mambahome_jax.imaging.pictures import Panel, draw_planes
from mambahome_jax.imaging.volume import Volume, read_volume
from mambahome_jax.report.page import Report, Shown, render_report, worst_first
from mambahome_jax.report.provenance import run_rows, without_folders
from mambahome_jax.support.console import progress_bar, say
from mambahome_jax.support.files import read_json, write_text


def run(config: ReportConfig) -> int:
    """Write the page about config.evaluation; returns the exit code: 0 all done, 1 a picture could not be made.

    Raises ConfigError (flags that do not fit), DatasetError (no evaluation, folders without the files) and OutputError.
    """
    console = Console()
    _check(config)
    output = config.output or config.evaluation / "report.html"
    if output.is_dir():
        raise OutputError(f"{output}: cannot be written: a folder has its name. Name another --output")
    evaluation = read_evaluation(config.evaluation)
    comparison = _comparison(config.evaluation / "comparison.json")
    made = _run_of(config.predictions)
    folders = _folders(config, evaluation)
    shown = _pictures(config, evaluation, made, console) if config.predictions and config.references else []
    hidden = [dataclasses.replace(entry, remark=without_folders(entry.remark, folders)) for entry in shown]
    report = Report(
        evaluation,
        shown=hidden or [Shown(case) for case in worst_first(evaluation.scores)[: config.worst]],
        run=run_rows(made),
        failures=_failures(evaluation.summary, folders),
        comparison=comparison,
    )
    write_text(output, render_report(report), "--output", parents=True)
    say(console, f"Written: {output}, {output.stat().st_size / 1e6:.1f} MB, needs no other file")
    return int(any(entry.remark for entry in shown))


def _check(config: ReportConfig) -> None:
    if (config.predictions is None) != (config.references is None):
        given, missing = ("predictions", "references") if config.predictions else ("references", "predictions")
        raise ConfigError(f"--{given} without --{missing}; expected both. Pictures show one against the other")
    if config.images is not None and config.predictions is None:
        raise ConfigError("--images without --predictions and --references; expected all three for pictures")
    if config.worst < 0:
        raise ConfigError(f"--worst {config.worst}; expected 0 or more")
    if config.window is not None and not config.window[0] < config.window[1]:
        low, high = config.window
        raise ConfigError(f"--window {low:g} {high:g}; expected the value shown as black, then a larger one for white")


def _run_of(predictions: Path | None) -> Mapping[str, Any]:
    """run.json in the folder of the predictions, or of a single one; {} where there is none."""
    if predictions is None:
        return {}
    file = (predictions.parent if predictions.is_file() else predictions) / "run.json"
    return read_json(file) if file.is_file() else {}


def _pictures(config: ReportConfig, evaluation: Evaluation, made: Mapping[str, Any], console: Console) -> list[Shown]:
    """The worst cases; one that cannot be drawn carries a remark that names the reason."""
    pairs = _pairs(config, evaluation.summary)
    scans = {scan.case: scan for scan in find_scans(config.images).scans} if config.images else {}
    settings = made.get("settings")
    modality = settings.get("modality") if isinstance(settings, Mapping) else None
    shown = []
    cases = worst_first(evaluation.scores)[: config.worst]
    pair_of = counterparts(cases, pairs)
    # Where each channel has a file, the first is shown, as of channels in one file.
    first = {case: f"{case}_0000" for case in cases if f"{case}_0000" in scans}
    scan_of = first | counterparts(cases, scans)
    with progress_bar(console, "Drawing") as progress:
        for case in progress.track(cases):
            try:
                if case not in pair_of:
                    raise DatasetError("not in both folders", case=case, expected="the folders that were evaluated")
                if config.images and case not in scan_of:
                    raise DatasetError("no scan of this name", case=case, file=config.images)
                shown.append(
                    Shown(
                        case, _draw(pairs[pair_of[case]], scans.get(scan_of.get(case, case)), config.window, modality)
                    )
                )
            except (MambaHomeError, OSError, MemoryError) as error:
                reason = str(error) or type(error).__name__
                say(console, f"No picture of {case}: {reason}")
                shown.append(Shown(case, remark=reason))
    return shown


def _pairs(config: ReportConfig, summary: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs of the two folders by case, with the values that `evaluate` compared. Raises DatasetError."""
    assert config.predictions is not None and config.references is not None
    pairs, _ = find_pairs(config.predictions, config.references, {})
    labelled = labelled_values(config.references)
    noted, scale = summary.get("reference_values"), summary.get("spacing_scale")
    try:
        values = {int(old): int(new) for old, new in noted.items()} if noted else None
    except (AttributeError, TypeError, ValueError) as error:
        expected = '"reference_values": {"6": 1, ...} or null'
        file = config.evaluation / "summary.json"
        raise DatasetError(
            f"reference_values: {error}", file=file, expected=expected, action="Evaluate again."
        ) from error
    return {
        pair.case: dataclasses.replace(
            pair,
            reference_values=values,
            labelled=judged_values(labelled.get(scan_stem(pair.reference)), values),
            spacing_scale=scale if isinstance(scale, int | float) else None,
        )
        for pair in pairs
    }


def _comparison(file: Path) -> Mapping[str, Any] | None:
    """comparison.json, None where there is none. Raises DatasetError: it is not what `evaluate` writes."""
    if not file.is_file():
        return None
    content = read_json(file)
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or not set(METRICS) <= set(metrics):
        expected = f"metrics {', '.join(METRICS)}"
        raise DatasetError("no comparison of two runs", file=file, expected=expected, action="Evaluate again.")
    return content


def _draw(pair: Pair, scan: Scan | None, window: tuple[float, float] | None, modality: Modality | None) -> list[Panel]:
    prediction, reference = read_pair(pair)
    image = None
    if scan is not None:
        scan_volume = read_volume(scan.path, series=scan.series, spacing_scale=pair.spacing_scale)
        image = _on_grid(scan_volume, reference)
        first = image.array[..., 0] if image.array.ndim == 4 else image.array
        window = window or display_range(first, scan.modality or modality)
    return draw_planes(prediction, reference, image, window or (0.0, 1.0), pair.labelled)


def _on_grid(image: Volume, reference: Volume) -> Volume:
    """The scan where the reference's voxels are; predictions may lie on a resampled grid."""
    if same_grid(reference, image):
        return image
    return resample_to(image, reference.affine, reference.shape)


def _folders(config: ReportConfig, evaluation: Evaluation) -> list[Path]:
    """Every folder that a message may name."""
    given = [config.evaluation, config.predictions, config.references, config.images]
    noted = [evaluation.summary.get(key) for key in ("predictions", "references")]
    return [Path(folder) for folder in (*given, *noted) if isinstance(folder, str | Path) and folder]


def _failures(summary: Mapping[str, Any], folders: Iterable[Path]) -> list[tuple[str, str]]:
    found = summary.get("failures")
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    folders = list(folders)
    return [(str(entry.get("case", "")), without_folders(str(entry.get("reason", "")), folders)) for entry in entries]
