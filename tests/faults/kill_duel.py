"""Kill a duel with -9 at random moments, start it again each time, and compare its end with an uninterrupted one.

python -m tests.faults.kill_duel --kills 10 --json kills.json
python -m tests.faults.kill_duel --kills 4 --at_once 2

Two contestants, two folds, MambaHoME_tiny on synthetic scans. A kill may hit any of the four trainings, the scores of a
fold or what is between; every second one waits until a checkpoint is being written, and what dies is the command, whose
training then ends by itself. The uninterrupted duel trains one network at a time, the other --at_once. Exit code 0:
parameters, losses, and all scores and differences of duel.json are the same.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from tests.commands.test_train import _dataset
from tests.faults.kill_training import _different, _different_scores, _finish, _kill, _start

AGAINST = "mixer=none,experts=ffn"
FLAGS = ("--model", "MambaHoME_tiny", "--against", AGAINST, "--folds", "2")


def kill_duel(folder: Path, kills: int, steps: int, seed: int = 0, at_once: int = 1) -> dict[str, Any]:
    """Do it in an empty `folder`; returns the kills, and what differs between the two ends."""
    chance, data = random.Random(seed), _dataset(folder / "data")
    command = [sys.executable, "-m", "mambahome_jax", "duel", str(data), *FLAGS, "--steps", str(steps)]
    straight, killed = folder / "straight", folder / "killed"
    _finish(_start([*command, "--output_dir", str(straight)], folder))
    command += ["--output_dir", str(killed), "--at_once", str(at_once)]
    told: list[dict[str, Any]] = []
    while len(told) < kills:
        process = _start(command, folder)
        found = _kill(process, _networks(killed), chance, while_writing=len(told) % 2 == 1)
        if found is None:
            raise RuntimeError(f"the duel was through after {len(told)} kills: give it more --steps")
        told.append(found)
        print(f"kill {len(told)}: {found}", flush=True)
    _finish(_start(command, folder))
    different = [
        name
        for one, other in zip(_networks(straight), _networks(killed), strict=True)
        for name in _different(one, other)
    ]
    for one, other in zip(_homes(straight), _homes(killed), strict=True):
        different += _different_scores(one, other)
    return {"kills": told, "different": different + ["duel.json"] * (scores(straight) != scores(killed))}


def scores(output: Path) -> tuple[Any, ...]:
    """What duel.json says that does not depend on the clock."""
    content = json.loads((output / "duel.json").read_text())
    parts = ("scores", "differences", "structures")
    return content["verdicts"], {n: [entry[part] for part in parts] for n, entry in content["contestants"].items()}


def _homes(output: Path) -> list[Path]:
    return [output / name / "seed_0" for name in ("MambaHoME_tiny", AGAINST)]


def _networks(output: Path) -> list[Path]:
    return [home / f"fold_{fold}" for home in _homes(output) for fold in range(2)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = kill_duel(args.folder or Path(temporary), args.kills, args.steps, args.seed, args.at_once)
    given = {name: getattr(args, name) for name in ("steps", "seed", "at_once")}
    about = {"jax": jax.__version__, "python": platform.python_version(), **given}
    if args.json:
        args.json.write_text(json.dumps({"about": about, **result}, indent=1))
    print("Same bits" if not result["different"] else f"Different: {result['different']}")
    return int(bool(result["different"]))


if __name__ == "__main__":
    raise SystemExit(main())
