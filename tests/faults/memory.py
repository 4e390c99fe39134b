"""Memory over many cases and steps: what is resident at the end, as a share of what it was after a fifth.

python -m tests.faults.memory infer --count 50
python -m tests.faults.memory train --count 5000

Prints a line of JSON; exit code 1 where it grew by more than 3 %. The networks are stand-ins, the scans synthetic.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mambahome_jax.commands import infer, train
from mambahome_jax.flags import InferConfig, TrainConfig
from mambahome_jax.inference import batch
from mambahome_jax.inference.result_files import ResultFiles
from mambahome_jax.training import train as training
from tests.commands.scans import scan, write
from tests.commands.test_train import StandIn, _dataset
from tests.faults.fuzz_worker import PROPERTIES, resident
from tests.inference.models import Levels

MOST = 0.03


def over_cases(folder: Path, count: int, sizes: int) -> list[int]:
    """Resident kilobytes after each of `count` cases of `infer`, of so many sizes in turn."""
    seen: list[int] = []
    for number in range(count):
        # The largest first: more memory for a larger scan is no growth.
        shape = (48 + sizes - 1 - number % sizes, 48, 40)
        write(folder / f"in/{number:03}.nii.gz", scan(shape, seed=number)[0])
    batch.load_model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES)  # type: ignore[assignment]
    save_result = ResultFiles.save_result

    def noted(*arguments: Any) -> Any:
        found = save_result(*arguments)
        seen.append(resident("VmRSS"))
        return found

    ResultFiles.save_result = noted  # type: ignore[method-assign]
    assert infer.run(InferConfig(folder / "in", folder / "model", folder / "out")) == 0
    return seen


def over_steps(folder: Path, count: int) -> list[int]:
    """Resident kilobytes at each of `count` steps of `train`, with a validation and checkpoint every twentieth."""
    seen: list[int] = []
    training.make_network = StandIn  # type: ignore[misc, assignment]
    put = training.put_batch

    def noted(batch: Any, mesh: Any) -> Any:
        seen.append(resident("VmRSS"))
        return put(batch, mesh)

    training.put_batch = noted
    sizes = {"model": "MambaHoME_tiny", "patch_size": (32, 16, 16), "batch_size": 1, "parallel": False}
    settings = {"steps": count, "val_every": max(count // 20, 1), **sizes}
    assert train.run(TrainConfig(_dataset(folder / "data"), output_dir=folder / "run", **settings)) == 0
    return seen


def growth(seen: list[int]) -> float:
    """Largest of the last fifth against the largest up to the end of the first one, as a share."""
    fifth = max(len(seen) // 5, 1)
    return max(seen[-fifth:]) / max(seen[:fifth]) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("infer", "train"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--sizes", type=int, default=2, help="different sizes of scans")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "infer":
            seen = over_cases(Path(folder), args.count, args.sizes)
        else:
            seen = over_steps(Path(folder), args.count)
    found = growth(seen)
    print(json.dumps({"what": args.what, "count": len(seen), "MB": round(max(seen) / 1024), "growth": round(found, 4)}))
    return int(found > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
