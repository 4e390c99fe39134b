"""An evaluation as one HTML page: what is on it, with the worst cases in pictures and how the predictions were made."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Unpack

from mambahome_jax.config import Modality
from mambahome_jax.datasets.files import counterparts
from mambahome_jax.datasets.find_scans import Scan, find_scans
from mambahome_jax.errors import ConfigError, DatasetError, MambaHomeError, OutputError
from mambahome_jax.evaluation.pairs import Pair, find_pairs, judged_pairs, read_pair
from mambahome_jax.evaluation.results import METRICS, Evaluation, read_evaluation
from mambahome_jax.flags import ReportConfig
from mambahome_jax.imaging.geometry import resample_to, same_grid
from mambahome_jax.imaging.pictures import Panel, display_range, draw_planes
from mambahome_jax.imaging.volume import read_volume
from mambahome_jax.reporting.page import Report, Shown, render_report, worst_first
from mambahome_jax.support.console import Say, Track, shown, silent, untracked
from mambahome_jax.support.files import read_json, write_text
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.processes import isolated_reads

if TYPE_CHECKING:
    from mambahome_jax.keywords import ReportFlags

# Of run.json: what is said of the run, in this order; cases and failures are counted, and all else stays out.
_PLAIN = ("command", "device", "seconds")
_TABLES = ("configuration", "settings", "versions")
_ABSOLUTE = re.compile(r"(?<![\w.<])(?:[A-Za-z]:[\\/]|\\\\|/)(?:[^\s\\/:;,'\"]+[\\/])*([^\s\\/:;,'\"]+)[\\/]?")


@dataclass(frozen=True)
class Reported:
    """What `report` wrote. failures: (case, reason) of pictures that could not be made."""

    path: Path
    shown: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]

    @property
    def exit_code(self) -> int:
        """0 all done, 1 a picture could not be made."""
        return int(bool(self.failures))


@shows_keywords(ReportConfig)
def report(*, progress: bool = False, **flags: "Unpack[ReportFlags]") -> Reported:
    """Write the page about an evaluation, as `mambahome report` does, silently; keywords are its flags.

    Raises:
        ConfigError: flags that do not fit together.
        DatasetError: no evaluation, folders without the files.
        OutputError.
    """
    return write_report(from_keywords(ReportConfig, flags), *shown(progress, "Drawing"))


@isolated_reads()
def write_report(
    config: ReportConfig,
    say: Say = silent,
    track: Track = untracked,
    files: tuple[Mapping[str, Pair], Mapping[str, Scan]] | None = None,
) -> Reported:
    """Write the page about config.evaluation; see `report`.

    Args:
        say, track: of support.console.
        files: label maps and scan of each case for the pictures, instead of the folders of `config`.
    """
    _check(config)
    output = config.output or config.evaluation / "report.html"
    if output.is_dir():
        raise OutputError(f"{output}: cannot be written: a folder has its name. Name another --output")
    evaluation = read_evaluation(config.evaluation)
    comparison = _comparison(config.evaluation / "comparison.json")
    run = _run_of(config.predictions)
    shown = [Shown(case) for case in worst_first(evaluation.scores)[: config.worst]]
    if files is None and config.predictions and config.references:
        scans = {scan.case: scan for scan in find_scans(config.images).scans} if config.images else {}
        files = _pairs(config, evaluation.summary), scans
    if files is not None:
        shown = _pictures(config, evaluation, run, *files, say, track)
    given = [config.evaluation, config.predictions, config.references, config.images]
    noted = [evaluation.summary.get(key) for key in ("predictions", "references")]
    folders = [Path(folder) for folder in (*given, *noted) if isinstance(folder, str | Path) and folder]
    page = Report(
        evaluation,
        shown=[replace(entry, remark=without_folders(entry.remark, folders)) for entry in shown],
        run=run_rows(run),
        failures=[(case, without_folders(reason, folders)) for case, reason in _not_scored(evaluation.summary)],
        comparison=comparison,
    )
    write_text(output, render_report(page), "--output", parents=True)
    failures = tuple((entry.case, entry.remark) for entry in shown if entry.remark)
    return Reported(output, tuple(entry.case for entry in shown), failures)


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
    """Read run.json in the folder of the predictions, or of a single one; {} where there is none."""
    if predictions is None:
        return {}
    file = (predictions.parent if predictions.is_file() else predictions) / "run.json"
    return read_json(file) if file.is_file() else {}


def _comparison(file: Path) -> Mapping[str, Any] | None:
    """Read comparison.json, None where there is none. Raises DatasetError: it is not what `evaluate` writes."""
    if not file.is_file():
        return None
    content = read_json(file)
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or not set(METRICS) <= set(metrics):
        expected = f"metrics {', '.join(METRICS)}"
        raise DatasetError("no comparison of two runs", file=file, expected=expected, action="Evaluate again.")
    return content


def _not_scored(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    failures = summary.get("failures")
    entries = [entry for entry in failures if isinstance(entry, Mapping)] if isinstance(failures, list) else []
    return [(str(entry.get("case", "")), str(entry.get("reason", ""))) for entry in entries]


def _pictures(
    config: ReportConfig,
    evaluation: Evaluation,
    run: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    scans: Mapping[str, Scan],
    say: Say,
    track: Track,
) -> list[Shown]:
    """Draw the worst cases; one that cannot be drawn carries a remark that names the reason."""
    settings = run.get("settings")
    modality = settings.get("modality") if isinstance(settings, Mapping) else None
    cases = worst_first(evaluation.scores)[: config.worst]
    pair_of = counterparts(cases, pairs)
    # Where each channel has a file, the first is shown, as of channels in one file.
    first = {case: f"{case}_0000" for case in cases if f"{case}_0000" in scans}
    scan_of = first | counterparts(cases, scans)
    shown = []
    for case in track(cases, len(cases)):
        try:
            if case not in pair_of:
                raise DatasetError("not in both folders", case=case, expected="the folders that were evaluated")
            if config.images and case not in scan_of:
                raise DatasetError("no scan of this name", case=case, file=config.images)
            scan = scans.get(scan_of.get(case, case))
            shown.append(Shown(case, _draw(pairs[pair_of[case]], scan, config.window, modality)))
        except (MambaHomeError, OSError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            say(f"No picture of {case}: {reason}")
            shown.append(Shown(case, remark=reason))
    return shown


def _pairs(config: ReportConfig, summary: Mapping[str, Any]) -> dict[str, Pair]:
    """Find the pairs of the two folders by case, with the values that `evaluate` compared. Raises DatasetError."""
    assert config.predictions is not None and config.references is not None
    pairs, _ = find_pairs(config.predictions, config.references)
    noted, scale = summary.get("reference_values"), summary.get("spacing_scale")
    try:
        values = {int(old): int(new) for old, new in noted.items()} if noted else None
    except (AttributeError, TypeError, ValueError) as error:
        found, expected = f"reference_values: {error}", '"reference_values": {"6": 1, ...} or null'
        file = config.evaluation / "summary.json"
        raise DatasetError(found, file=file, expected=expected, action="Evaluate again.") from error
    scale = scale if isinstance(scale, int | float) else None
    return {pair.case: replace(pair, spacing_scale=scale) for pair in judged_pairs(pairs, config.references, values)}


def _draw(pair: Pair, scan: Scan | None, window: tuple[float, float] | None, modality: Modality | None) -> list[Panel]:
    prediction, reference = read_pair(pair)
    image = None
    if scan is not None:
        image = read_volume(scan.path, series=scan.series, spacing_scale=pair.spacing_scale)
        # Predictions may lie on a resampled grid.
        if not same_grid(reference, image):
            image = resample_to(image, reference.affine, reference.shape)
        first = image.array[..., 0] if image.array.ndim == 4 else image.array
        window = window or display_range(first, scan.modality or modality)
    return draw_planes(prediction, reference, image, window or (0.0, 1.0), pair.labelled)


def run_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, value) lines about a run, without folders: of paths the last name only."""
    rows = [(key, str(run[key])) for key in _PLAIN if key in run]
    for table in _TABLES:
        content = run.get(table)
        for key, value in content.items() if isinstance(content, Mapping) else ():
            if value is not None:
                rows.append((f"{table}: {key}", _last_name(_text(value))))
    return rows + [(key, str(len(run[key]))) for key in ("cases", "failures") if isinstance(run.get(key), list)]


def without_folders(text: str, folders: Iterable[str | Path] = ()) -> str:
    """Put the last name in place of each path of a message: of files in and beside `folders`, and what looks absolute.

    folders: absolute or as they were given; their names may hold spaces, which otherwise end a path.
    """
    homes = {home for folder in map(Path, folders) for path in (folder, folder.absolute()) for home in _homes(path)}
    for home in sorted(homes, key=len, reverse=True):
        text = text.replace(home, "")
    return _ABSOLUTE.sub(lambda match: match[1], text)


def _homes(path: Path) -> list[str]:
    """An absolute path and all above it but the root, as they begin the path of a file below them."""
    return [f"{home}{os.sep}" for home in (path, *path.parents) if home.is_absolute() and home.name]


def _last_name(text: str) -> str:
    """Of what may be a path, with the separators of either system."""
    return PurePosixPath(PureWindowsPath(text).as_posix()).name or text if "/" in text or "\\" in text else text


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(entry) for entry in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else _last_name(str(value))
