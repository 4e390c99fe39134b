"""Names of cases: which file names mean the same one, where nnU-Net's number of a channel may be their ending."""

import re
from collections import defaultdict
from collections.abc import Collection

# nnU-Net's <case>_<channel>. Four digits may also be the number of the case itself, as in scan_0001.
CHANNEL = re.compile(r"(.+)_(\d{4})")


def by_channel(names: Collection[str]) -> dict[str, dict[int, str]]:
    """The names of each beginning by the number that ends them, {case: {0: <case>_0000}}; empty where one has none."""
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        match = CHANNEL.fullmatch(name)
        if match is None:
            return {}
        groups[match[1]][int(match[2])] = name
    return dict(groups)


def channels_of(names: Collection[str]) -> dict[str, list[str]]:
    """The names of each case in order of channel, {case: [<case>_0000, ...]}; empty where the endings are no channels.

    They are where every name has one and every case the same ones, from 0000 on. A single case of several files is
    taken for cases that are numbered themselves: scan_0000, scan_0001, ...
    """
    groups = by_channel(names)
    count = max(map(len, groups.values()), default=0)
    if count > 1 and len(groups) == 1:
        return {}
    complete = all(sorted(files) == list(range(count)) for files in groups.values())
    return {case: [files[number] for number in range(count)] for case, files in groups.items()} if complete else {}


def counterparts(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Name -> its name among `others`: the same, or one that differs in the ending _0000 alone.

    The ending counts as that of a channel only where no other name has the same beginning and another number.
    """
    pairs = {name: name for name in names if name in set(others)}
    left, right = (_first_channels(side, set(pairs)) for side in (names, others))
    for case in left.keys() & right.keys():
        if left[case] != right[case]:
            pairs[left[case]] = right[case]
    return {name: pairs[name] for name in names if name in pairs}


def common_name(name: str, other: str) -> str:
    """What two names of one case are called together: the one without the number of a channel."""
    return min(name, other, key=len)


def _first_channels(names: Collection[str], paired: set[str]) -> dict[str, str]:
    """Names by themselves, and those that end in _0000 without that where this means one name only."""
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := CHANNEL.fullmatch(name):
            numbered[match[1]].append(name)
    single = {case: files[0] for case, files in numbered.items() if files == [f"{case}_0000"] and case not in names}
    return {case: name for case, name in single.items() if name not in paired} | {
        name: name for name in names if name not in paired and name not in single.values()
    }
