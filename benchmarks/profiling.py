"""Where the device's time goes: seconds by kernel, from a profile of a few calls."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax


def kernel_times(call: Callable[[], object], calls: int = 3) -> list[tuple[float, int, str]]:
    """(ms a call, launches a call, kernel) of every kernel that ran on the first GPU, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        times: collections.Counter[str] = collections.Counter()
        launches: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            if "/device:GPU:0" not in plane.name:
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    times[event.name] += event.duration_ns
                    launches[event.name] += 1
    return [(ns / calls / 1e6, launches[name] // calls, name) for name, ns in times.most_common()]


def print_kernel_times(call: Callable[[], object], most: int = 60) -> None:
    rows = kernel_times(call)
    print(f"kernels: {sum(ms for ms, _, _ in rows):.1f} ms a call in {sum(n for _, n, _ in rows)} launches")
    for ms, launches, name in rows[:most]:
        print(f"{ms:9.3f} ms {launches:5d} x  {name[:150]}")
