"""Results in infer's output folder: where each lies, what made it, which ones may be kept, and how one is written."""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from mambahome_jax.datasets.base import Split
from mambahome_jax.datasets.files import listed, parts
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.flags import InferConfig
from mambahome_jax.imaging import dicomseg
from mambahome_jax.imaging.dicom import contents_of
from mambahome_jax.imaging.geometry import same_grid
from mambahome_jax.imaging.pictures import write_preview
from mambahome_jax.imaging.volume import Volume, read_grid, read_labels, write_volume
from mambahome_jax.inference.postprocess import postprocess, volumes_ml, whole_probabilities, write_probabilities
from mambahome_jax.inference.segment import Segmenter
from mambahome_jax.support.files import earlier_json, jsonable, parse_json, record_of, renewed
from mambahome_jax.support.paths import as_on_disk, one_form

DICOM_SEG = "dcm"  # --output_format
REPORT, VOLUMES = "run.json", "volumes.csv"

Entry = dict[str, Any]  # of a case in run.json
Origin = Literal["same", "weights", "scan", "changed", "unknown"]
# Flags on which the labels do not depend.
_WITHOUT_EFFECT = {
    *("data_path", "output_dir", "split", "save_probabilities", "previews", "skip_existing"),
    *("num_workers", "num_devices", "sw_batch_size", "gpu", "series"),
}
_NAMED = 20
_AGAIN = {
    "weights": "Segmented again, as other weights made their results: {}",
    "scan": "Segmented again, as their scans changed since: {}",
}
_KEPT = {
    "changed": "Note: kept, but changed by somebody else after they were made: {}",
    "unknown": "Note: kept, but nothing says which weights and scans they were made of: {}",
}
# Of an entry of run.json, what is noted before there is one.
_NOTED = ("id", "output", "split", "networks", "made_from", "remarks")
# Notes of what made each result, should the run not come to write its report.
_NOTES = ".results.jsonl"


class Segmented(NamedTuple):
    """A scan that was segmented: what is to be written of it.

    labels: on the scan's grid, before `postprocess`. remarks: of what was found on the way. probabilities: on the
    network's grid, with its affine. begun: when, see time.perf_counter.
    """

    scan: Scan
    volume: Volume
    labels: Volume
    remarks: tuple[str, ...]
    probabilities: tuple[np.ndarray, np.ndarray] | None
    begun: float


@dataclass(frozen=True, eq=False)
class ResultFiles:
    """The results of a run, those of earlier ones included.

    weights: a digest of each network. earlier: entries of run.json by case, each with its "configuration".
    origins: of the results that --skip_existing would keep. sources: what the files of each scan were when it was read.
    splits: {"split": its part in the training} of each scan, {} where that is not known; with "networks", where some of
    them alone segment it.
    """

    config: InferConfig
    weights: tuple[str, ...] = ()
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    splits: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, config: InferConfig, weights: tuple[str, ...], scans: Iterable[Scan]) -> "ResultFiles":
        """Look at what the output folder has."""
        results = cls(config, weights, _read_earlier(config.output_dir))
        for scan in scans if config.skip_existing else ():
            if results.existing(scan).exists():
                results.origins[scan.case] = results._origin(scan)
        return results

    def path(self, scan: Scan) -> Path:
        """Where the label map of a scan goes."""
        return self.config.output_dir / f"{scan.case}.{self.config.output_format}"

    def existing(self, scan: Scan) -> Path:
        """Where the label map of a scan is: `path`, or under the other name that earlier versions gave it."""
        path = self.path(scan)
        other = path.with_name(f"{scan.other_name}.{self.config.output_format}")
        return other if scan.other_name and not path.exists() and other.exists() else as_on_disk(path)

    def source(self, scan: Scan) -> str | list[str]:
        """The file of a scan, or those of its channels, as seen from --data_path, which run.json has as given."""
        home = self.config.data_path if self.config.data_path.is_dir() else self.config.data_path.parent
        names = [
            str(path.relative_to(home)) if path.is_relative_to(home) else path.name
            for path in scan.channels or (scan.path,)
        ]
        return names if scan.channels else names[0]

    def note_source(self, scan: Scan) -> None:
        """Note what the files of a scan are, before they are read."""
        self.sources[scan.case] = record_of(_files_of(scan))

    def kept(self, scan: Scan, segmenter: Segmenter) -> Entry | None:
        """The entry of a result that may stay: whole, on the scan's grid, of these weights and this scan; else None."""
        path, config = self.existing(scan), self.config
        if not config.skip_existing or self.origins.get(scan.case) in _AGAIN or not path.is_file():
            return None
        if config.save_probabilities and not whole_probabilities(self._probabilities(scan)):
            return None
        try:
            if config.output_format == DICOM_SEG:
                # This looks itself whether it is of these slices.
                labels = grid = dicomseg.read(path, scan.path, segmenter.names, scan.series)
            else:
                labels = read_labels(path, spacing_scale=config.spacing_scale)
                grid = read_grid(scan.path, series=scan.series, spacing_scale=config.spacing_scale)
        except DatasetError:
            return None
        if not same_grid(grid, labels):
            return None
        volumes = volumes_ml(labels, segmenter.networks.label_names, segmenter.regions)
        return {"id": scan.case, "input": self.source(scan), "output": path.name, "kept": True, "volume_ml": volumes}

    def known_split(self, scan: Scan) -> Any:
        """What an earlier run found out of the part of a scan, with these weights; None where it did not."""
        entry = self.earlier.get(scan.case, {}) if self.origins.get(scan.case) == "same" else {}
        return entry.get("split") if entry.get("split") in get_args(Split) else None

    def save_result(self, done: Segmented, segmenter: Segmenter) -> Entry:
        """Write a label map, its preview and what there is of probabilities; return its entry of run.json.

        A preview that fails is a remark. Raises OutputError: another part cannot be written.
        """
        config, scan, names, path = self.config, done.scan, segmenter.names, self.path(done.scan)
        labels = postprocess(done.labels, segmenter.only, segmenter.largest, segmenter.regions)
        if done.probabilities is not None:
            write_probabilities(self._probabilities(scan), *done.probabilities, segmenter.networks.class_names)
        modality = scan.modality or segmenter.settings.normalisation.modality
        structures_ml = volumes_ml(labels, names, segmenter.regions)
        odd = segmenter.remark(done.volume, modality, structures_ml)
        remarks = [*([] if odd is None else [odd]), *done.remarks]
        preview: Path | None = config.output_dir / "previews" / f"{scan.case}.png" if config.previews else None
        try:
            if preview is not None:
                write_preview(preview, done.volume, labels, names, modality, scan.case)
        except OutputError as error:
            remarks.append(f"without preview: {error}")
            preview = None
        # Last: a case with a label map is done, and one that was killed before is not kept as whole without the rest.
        if config.output_format == DICOM_SEG:
            dicomseg.write(path, labels, scan.path, names, scan.series)
        else:
            note = write_volume(path, labels, names=names, warn=False)
            remarks += [] if note is None else [f"{path.name}: {note} (--output_format nrrd)"]
        made_from = {
            "weights": list(self.weights),
            "scan": self.sources.pop(scan.case, None),
            "result": record_of([path]),
        }
        return {
            "id": scan.case,
            "input": self.source(scan),
            **self.splits.pop(scan.case, {}),
            "modality": modality,
            "output": path.name,
            "preview": None if preview is None else str(preview.relative_to(config.output_dir)),
            "shape": list(labels.shape),
            "seconds": round(time.perf_counter() - done.begun, 3),
            "volume_ml": structures_ml,
            "made_from": made_from,
        } | ({"remarks": remarks} if remarks else {})

    def note_made(self, entry: Entry, configuration: Mapping[str, Any]) -> None:
        """Note what made a result, for a next run, should this one not come to write its report."""
        known = {key: entry[key] for key in _NOTED if key in entry}
        row = json.dumps(known | {"configuration": configuration})
        with contextlib.suppress(OSError), (self.config.output_dir / _NOTES).open("a", encoding="utf-8") as file:
            file.write(row + "\n")

    def forget_notes(self) -> None:
        """Remove the notes, as run.json says it all."""
        with contextlib.suppress(OSError):
            (self.config.output_dir / _NOTES).unlink(missing_ok=True)

    def lines_again(self) -> list[str]:
        """Lines about results that are made again."""
        return self._lines(_AGAIN, self.origins)

    def account_for(self, kept: Sequence[Entry]) -> list[str]:
        """Complete the entries of kept results by what made them.

        Returns lines about those of which something is known against keeping them, or nothing for it.
        """
        configuration: dict[str, Any] = jsonable(vars(self.config))
        changed: dict[str, set[str]] = {}
        for entry in kept:
            known = self.earlier.get(entry["id"])
            if known is None or not _is_of(known, entry["output"]):
                continue
            entry |= {key: known[key] for key in ("configuration", "made_from", "networks", "remarks") if key in known}
            # The same weights are the same wherever they lie.
            ignored = _WITHOUT_EFFECT | ({"model_path"} if self.origins.get(entry["id"]) == "same" else set())
            before = known["configuration"]
            compared = configuration.keys() & before.keys() - ignored
            if flags := {name for name in compared if before[name] != configuration[name]}:
                changed[entry["id"]] = flags
        # What is odd about a scan is so in every run.
        lines = [f"Note: {entry['id']}: {remark}" for entry in kept for remark in entry.get("remarks", ())]
        lines += self._lines(_KEPT, [entry["id"] for entry in kept])
        if changed:
            named = ", ".join(f"--{name}" for name in configuration if name in set().union(*changed.values()))
            names = listed(changed, _NAMED)
            lines.append(f"Note: some of those that are kept were made by another {named}: {names}")
        return lines

    def _probabilities(self, scan: Scan) -> Path:
        return self.config.output_dir / f"{scan.case}.npz"

    def _lines(self, texts: Mapping[str, str], cases: Iterable[str]) -> list[str]:
        named: dict[str, list[str]] = {origin: [] for origin in texts}
        for case in cases:
            if (origin := self.origins.get(case)) in texts:
                named[str(origin)].append(case)
        return [texts[origin].format(listed(names, _NAMED)) for origin, names in named.items() if names]

    def _origin(self, scan: Scan) -> Origin:
        """Whether a result was made of these weights and this scan, or what speaks against it.

        "changed": somebody wrote the file since, maybe corrected it by hand. "unknown": by another program or version.
        """
        result, entry = self.existing(scan), self.earlier.get(scan.case, self.earlier.get(scan.other_name))
        known = (entry or {}).get("made_from")
        if entry is None or not _is_of(entry, result.name):
            return "unknown"
        if not isinstance(known, Mapping) or not known.get("scan") or not known.get("result"):
            return "unknown"
        try:
            if renewed(known["result"], [result]) is None:
                return "changed"
            if known.get("weights") != list(self.weights):
                return "weights"
            return "same" if renewed(known["scan"], _files_of(scan)) else "scan"
        except DatasetError:
            # Said when the scan's turn comes.
            return "scan"


def _files_of(scan: Scan) -> list[Path]:
    """All files of a scan. Raises DatasetError: a folder that cannot be read."""
    if scan.series:
        return [path for one in contents_of(scan.path).series if one.uid in scan.series for path in one.paths]
    return [part for path in scan.channels or (scan.path,) for part in parts(path)]


def _is_of(entry: Mapping[str, Any], name: str) -> bool:
    """Whether an entry is about the result of that name: of another format there may be one beside it."""
    return entry.get("output", name) == name


def _read_earlier(folder: Path) -> dict[str, Entry]:
    """Read run.json's entries, and the notes of a run that was stopped before it wrote one, where they are readable."""
    report = earlier_json(folder / REPORT)
    entries = report.get("cases")
    rows = entries if isinstance(entries, list) else []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / _NOTES).read_text(encoding="utf-8").splitlines():
            # The last one may have been cut short.
            with contextlib.suppress(ValueError):
                rows.append(parse_json(line))
    earlier = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            continue
        # What was kept without anything known of it was not made by the run that kept it.
        configuration = row.get("configuration", None if row.get("kept") else report.get("configuration"))
        if isinstance(configuration, dict):
            earlier[one_form(row["id"])] = row | {"configuration": configuration}
            if not isinstance(row.get("remarks", []), list):
                del earlier[one_form(row["id"])]["remarks"]
    return earlier
