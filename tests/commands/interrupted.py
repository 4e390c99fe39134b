"""A script of test_preprocess_interrupted: preprocess, killed before each of its changes to the file system in turn.

interrupted.py INPUT FOLDER FRESH|STALE: for n = 1, 2, ... a run with output FOLDER/<n> is killed before its n-th
change, until one gets through; each is then run again. STALE: the output was complete, at another spacing, before.
Every run is a fork of this process, which spares the imports; TensorStore's threads start after the fork only.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from mambahome_jax.commands.preprocess import run
from mambahome_jax.flags import PreprocessConfig

SPACING, OTHER = (1.0, 1.0, 3.0), (2.0, 1.0, 3.0)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def preprocess(source: Path, output: Path, spacing: tuple[float, float, float], kill_at: int = 0) -> int:
    """Exit status of a run in its own process, negative where it was killed: before its change number `kill_at`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes or event in _EVENTS:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    os._exit(run(PreprocessConfig(source, output, spacing=spacing, num_workers=1)))


def done(output: Path) -> dict[str, int]:
    """Time of the entry of each case that is done at SPACING."""
    found = {}
    for file in output.glob("store/[!.]*/case.json"):
        if json.loads(file.read_text())["fingerprint"]["spacing"] == list(SPACING):
            found[file.parent.name] = file.stat().st_mtime_ns
    return found


def main() -> None:
    source, folder, state = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    complete = folder.parent / "complete"
    if state == "STALE":
        assert preprocess(source, complete, OTHER) == 0
    # The stale ones run three times as often, so every second moment has to do.
    for n in range(1, 1000, 2 if state == "STALE" else 1):
        output = folder / str(n)
        if state == "STALE":
            shutil.copytree(complete, output)
        killed = preprocess(source, output, SPACING, kill_at=n)
        before = done(output)
        if state == "STALE":
            # The same interruption, and then back to what was there before it.
            shutil.copytree(output, folder / f"back{n}")
            assert preprocess(source, folder / f"back{n}", OTHER) == 0
        assert preprocess(source, output, SPACING) == 0
        after = done(output)
        twice = [case for case in before if before[case] != after[case]]
        assert not twice, f"killed before change {n}: {twice} done twice"
        if killed == 0:
            print(n)
            return


if __name__ == "__main__":
    main()
