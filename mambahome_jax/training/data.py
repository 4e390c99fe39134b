"""What the data of a training are beyond the ids of its cases, so that a run is resumed on the same and no other."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mambahome_jax.datasets.files import listed
from mambahome_jax.datasets.prepared import Prepared
from mambahome_jax.patches.store import CRC_LETTERS, Store, StoreEntry

# Of the entry "data" in config.json; what else it holds is a setting of its own or follows from the voxels.
PROPERTIES = ("spacing", "orientation", "channels", "labels", "values")
_PARTS = {"train": "train on", "val": "validate on"}


def case_digests(prepared: Prepared, cases: Sequence[str]) -> dict[str, str]:
    """{case: what tells its data from other data}, read off the store's index: grid, intensities, voxels a class, and
    a checksum of all voxels, which stores of earlier versions lack."""
    store = Store(prepared.store)
    return {case: _digest(store.entry(case)) for case in cases}


def trained_on(train: Iterable[StoreEntry], val: Iterable[StoreEntry]) -> list[str]:
    """Ids of those in `val` whose image is that of a case in `train`, or was made of the same files, whatever the two
    are called."""
    train, val = list(train), list(val)
    # Where a store of an earlier version has none, intensities to the last digit have to do.
    checksums = all(entry.checksum for entry in (*train, *val))
    known = {_image_key(entry, checksums) for entry in train}
    files = {content for entry in train if (content := _files(entry))}
    return [entry.id for entry in val if _image_key(entry, checksums) in known or _files(entry) in files]


def trained_on_notes(cases: Sequence[str], of: int, same_folder: bool) -> tuple[str, ...]:
    """A note that cases are validated on and trained on; empty without any. of: how many are validated on."""
    if not cases:
        return ()
    which = "--data_val is the folder of --data_train: " if same_folder else ""
    what = "are trained on too" if same_folder else "are images that are trained on too"
    text = f"{which}{len(cases)} of {of} cases to validate on {what} ({listed(cases)})"
    return (f"{text}; scores tell nothing of unseen cases",)


def data_summary(digests: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str | None]]:
    """What config.json says of the data: of each part digests of its cases and, where all are known, of their voxels.

    digests: {"train": ..., "val": ...}, each as `case_digests` gives it. Ids of cases are not told by the result.
    """
    return {part: _summary(cases) for part, cases in digests.items()}


def data_differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    recorded: Mapping[str, Mapping[str, str]],
    digests: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """How the data of a run that is resumed differ from those that it began with; empty where they are the same.

    before, now: config.json and what a checkpoint of today would say. recorded, digests: {part: {case: digest}} of
    run.json and of today, which tell whose data changed. What an earlier version did not write is not compared.
    """
    properties = before.get("data", {})
    differ = [
        f"{name} was {properties[name]}, now {now['data'][name]}"
        for name in PROPERTIES
        if name in properties and name in now["data"] and properties[name] != now["data"][name]
    ]
    for part, state in now["cases"].items():
        known = before.get("cases", {}).get(part, {})
        changed = [key for key, value in state.items() if value and known.get(key) and known[key] != value]
        if changed:
            differ.append(_changed_cases(part, recorded.get(part, {}), digests[part]))
    return differ


def _changed_cases(part: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    gone, new = (sorted(set(one) - set(other)) for one, other in ((before, now), (now, before)))
    others = [case for case in now if case in before and _differ(before[case], now[case])]
    texts = [
        f"{what}: {listed(cases)}"
        for what, cases in (("no longer there", gone), ("new", new), ("with other voxels", others))
        if cases and before
    ]
    return f"cases to {_PARTS[part]} changed" + (f" ({'; '.join(texts)})" if texts else "")


def _differ(one: str, other: str) -> bool:
    (facts, voxels), (other_facts, other_voxels) = (text.split(":") for text in (one, other))
    return facts != other_facts or bool(voxels and other_voxels and voxels != other_voxels)


def _summary(cases: Mapping[str, str]) -> dict[str, str | None]:
    rows = [(case, *digest.split(":")) for case, digest in sorted(cases.items())]
    voxels = [(case, checksum) for case, _, checksum in rows]
    complete = all(checksum for _, checksum in voxels)
    return {"facts": _hash([row[:2] for row in rows]), "voxels": _hash(voxels) if complete else None}


def _image_key(entry: StoreEntry, checksum: bool) -> str:
    return _hash([entry.shape, entry.channels, _intensities(entry), entry.checksum[:CRC_LETTERS] if checksum else ""])


def _files(entry: StoreEntry) -> str | None:
    """Digest of the files that a case was made of, at whatever spacing; None where an earlier version made it."""
    sources = entry.fingerprint.get("sources")
    return sources.get("content") if isinstance(sources, Mapping) else None


def _intensities(entry: StoreEntry) -> list[tuple[float, ...]]:
    found = entry.statistics
    return [found.mean, found.std, found.minimum, found.maximum]


def _digest(entry: StoreEntry) -> str:
    counts = None if entry.class_counts is None else sorted(entry.class_counts.items())
    grid = [entry.shape, entry.channels, entry.spacing, entry.affine, entry.modality]
    return f"{_hash([grid, _intensities(entry), counts, entry.labelled])}:{entry.checksum}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
