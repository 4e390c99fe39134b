"""Results that are there before infer begins: what made them, so that those of other weights or scans are not kept."""

import contextlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mambahome_jax.datasets.files import listed, parts
from mambahome_jax.datasets.find_scans import Scan
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import contents_of
from mambahome_jax.support.files import parse_json, read_json, record_of, renewed
from mambahome_jax.support.paths import one_form

Origin = Literal["same", "weights", "scan", "changed", "unknown"]
# Flags on which the labels do not depend.
_WITHOUT_EFFECT = {
    *("data_path", "output_dir", "save_probabilities", "previews", "skip_existing"),
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


@dataclass(frozen=True)
class Earlier:
    """What the folder says of the results in it: entries of run.json by case, with the configuration of each.

    origins: of the results that may be kept, see `origin_of`.
    """

    cases: Mapping[str, Mapping[str, Any]]
    origins: dict[str, Origin] = field(default_factory=dict)

    def say_again(self, cases: Sequence[str]) -> list[str]:
        """Lines about results that are made again."""
        return self._lines(_AGAIN, cases)

    def account_for(self, kept: Sequence[dict[str, Any]], configuration: Mapping[str, Any]) -> list[str]:
        """Say in the entries of results that are kept what made them.

        Returns lines about those of which something is known against keeping them, or nothing for it.
        """
        by_flag: dict[str, list[str]] = {}
        for entry in kept:
            known = self.cases.get(entry["id"])
            if known is None or not _is_of(known, entry["output"]):
                continue
            entry |= {key: known[key] for key in ("configuration", "made_from", "remarks") if key in known}
            # The same weights are the same wherever they lie.
            ignored = {"model_path"} if self.origins.get(entry["id"]) in ("same", "scan") else set()
            for flag in changed_flags(known["configuration"], configuration, ignored):
                by_flag.setdefault(flag, []).append(entry["id"])
        # What is odd about a scan is so in every run.
        remarks = [(entry["id"], remark) for entry in kept for remark in entry.get("remarks", ())]
        lines = [f"Note: {case}: {remark}" for case, remark in remarks]
        lines += self._lines(_KEPT, [entry["id"] for entry in kept])
        if by_flag:
            names = listed(dict.fromkeys(case for cases in by_flag.values() for case in cases), _NAMED)
            lines.append(f"Note: some of those that are kept were made by another {', '.join(by_flag)}: {names}")
        return lines

    def _lines(self, texts: Mapping[str, str], cases: Sequence[str]) -> list[str]:
        named = {origin: [case for case in cases if self.origins.get(case) == origin] for origin in texts}
        return [texts[origin].format(listed(names, _NAMED)) for origin, names in named.items() if names]


def made_from(weights: Sequence[str], scan: Mapping[str, str] | None, result: Path) -> dict[str, Any]:
    """What run.json says of a result that was just written: digests of weights, of the scan's files and of its own."""
    return {"weights": list(weights), "scan": scan, "result": record_of([result])}


def files_of(scan: Scan) -> list[Path]:
    """All files of a scan. Raises DatasetError: a folder that cannot be read."""
    if scan.series:
        return [path for one in contents_of(scan.path).series if one.uid in scan.series for path in one.paths]
    return [part for path in scan.channels or (scan.path,) for part in parts(path)]


def origin_of(entry: Mapping[str, Any] | None, weights: Sequence[str], scan: Scan, result: Path) -> Origin:
    """Whether a result was made of these weights and this scan: "same", or what speaks against it.

    entry: of run.json. "changed": somebody wrote the file anew since, and may have corrected it by hand. "unknown":
    written by another program or an earlier version.
    """
    known = (entry or {}).get("made_from")
    if entry is None or not _is_of(entry, result.name):
        return "unknown"
    if not isinstance(known, Mapping) or not known.get("scan") or not known.get("result"):
        return "unknown"
    try:
        if renewed(known["result"], [result]) is None:
            return "changed"
        if known.get("weights") != list(weights):
            return "weights"
        return "same" if renewed(known["scan"], files_of(scan)) else "scan"
    except DatasetError:
        # Said when the scan's turn comes.
        return "scan"


def _is_of(entry: Mapping[str, Any], name: str) -> bool:
    """Whether an entry is about the result of that name: of another format there may be one beside it."""
    return entry.get("output", name) == name


def read_earlier(folder: Path) -> Earlier:
    """What run.json says of the results, and the notes of a run that was stopped before it wrote one.

    Nothing where there is neither, or none that can be read.
    """
    try:
        report = read_json(folder / "run.json")
    except DatasetError:
        report = {}
    entries = report.get("cases")
    rows = entries if isinstance(entries, list) else []
    found = {}
    for row in [*rows, *_notes(folder)]:
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            continue
        # What was kept without anything known of it was not made by the run that kept it.
        configuration = row.get("configuration", None if row.get("kept") else report.get("configuration"))
        if isinstance(configuration, dict):
            found[one_form(row["id"])] = row | {"configuration": configuration}
            if not isinstance(row.get("remarks", []), list):
                del found[one_form(row["id"])]["remarks"]
    return Earlier(found)


def note_result(folder: Path, entry: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Write down what made a result, for a next run, should this one not come to write run.json."""
    known = {key: entry[key] for key in ("id", "output", "made_from", "remarks") if key in entry}
    row = known | {"configuration": configuration}
    with contextlib.suppress(OSError), _notes_file(folder).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def forget_notes(folder: Path) -> None:
    """Remove the notes, as run.json says it all."""
    with contextlib.suppress(OSError):
        _notes_file(folder).unlink(missing_ok=True)


def changed_flags(earlier: Mapping[str, Any], configuration: Mapping[str, Any], ignored: Set[str]) -> list[str]:
    """Flags that decide the labels and differ between two configurations, as run.json has them."""
    compared = [name for name in configuration if name in earlier and name not in {*_WITHOUT_EFFECT, *ignored}]
    return [f"--{name}" for name in compared if earlier[name] != configuration[name]]


def _notes_file(folder: Path) -> Path:
    return folder / ".results.jsonl"


def _notes(folder: Path) -> list[Any]:
    try:
        lines = _notes_file(folder).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    rows = []
    for line in lines:
        # The last one may have been cut short.
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
    return rows
