"""Numbers of structures, 1, 2, 3, ..., beside the values that label maps store, such as 255 of a mask."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mambahome_jax.errors import DatasetError

_LISTED = 20
# A brush of three voxels, or a click that went astray, in hardly any of the label maps.
_FEW_VOXELS, _FEW_CASES = 27, 0.05


@dataclass(frozen=True)
class StrayValue:
    """A label value with few voxels, in few of many label maps. voxels: of each of these cases."""

    value: int
    voxels: Mapping[str, int]

    def __str__(self) -> str:
        where = ", ".join(f"{count} voxel{'s' * (count != 1)} of {case}" for case, count in self.voxels.items())
        return f"label value {self.value} occurs in {where} alone"


def numbering(values: Iterable[int]) -> dict[int, int]:
    """Number -> stored value of structures, in the order of the stored `values`; empty where all keep their value."""
    stored = sorted({*values} - {0})
    return {} if stored == list(range(1, len(stored) + 1)) else dict(enumerate(stored, start=1))


def table_of_values(table: object, file: Path, labels: Iterable[int] = ()) -> dict[int, int]:
    """The entry "values" of a dataset.json or run.json, {"1": 255}, as number -> stored value; empty without one.

    labels: numbers that it must have. Raises DatasetError: another form, or one that lacks such a number.
    """
    if table is None:
        return {}
    try:
        values = {int(number): int(stored) for number, stored in table.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as error:
        expected = '"values": {"1": 255, ...}, a stored value from 1 to 65535 for each label'
        raise DatasetError(f'"values" is {table!r}', file=file, expected=expected) from error
    if len({*values.values()}) < len(values) or not all(0 < stored < 1 << 16 for stored in values.values()):
        raise DatasetError(f'"values" is {table!r}', file=file, expected="distinct values from 1 to 65535")
    if values and not {*labels} <= {*values}:
        raise DatasetError(f'"values" is {table!r}', file=file, expected='a stored value for each of "labels"')
    return values


def describe_numbering(values: Mapping[int, int]) -> str:
    """One line about number -> stored value."""
    shown = list(values.items())[:_LISTED]
    more = f" and so on, {len(values)} in all" if len(values) > _LISTED else ""
    stored, numbers = (", ".join(map(str, part)) for part in zip(*((old, new) for new, old in shown), strict=True))
    if len(values) == 1:
        return f"stored label value {stored} is structure {numbers}; infer writes {stored}"
    return f"stored label values {stored}{more} are structures {numbers}{more}; infer writes the stored values"


def stray_values(counts: Mapping[str, Mapping[int, int]]) -> list[StrayValue]:
    """Values that a slip may have drawn: at most 27 voxels a case, in one case or up to 5 % of them, not in half.

    counts: case -> voxels of each value but 0 in its label map.
    """
    cases: dict[int, dict[str, int]] = {}
    for case, found in counts.items():
        for value, voxels in found.items():
            cases.setdefault(value, {})[case] = voxels
    most = min(max(1, _FEW_CASES * len(counts)), len(counts) / 2)
    return [
        StrayValue(value, found)
        for value, found in sorted(cases.items())
        if len(found) <= most and max(found.values()) <= _FEW_VOXELS
    ]
