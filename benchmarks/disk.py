"""Bytes that preprocess writes for each voxel of a dataset, and how far they are from what it says before.

python benchmarks/disk.py --input_path DATASET --spacing 0.9 0.9 0.9 --cases 20 --json disk.json

--spacing 0 0 0 resamples nothing. The kinds of files are those of preprocessing/case.py.
"""

import argparse
import dataclasses
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.preprocessing import dataset as preprocessing
from mambahome_jax.support.files import bytes_of


def measure(source: Path, spacing: tuple[float, float, float], modality: Any, cases: int) -> dict[str, Any]:
    """Preprocess the first cases to a temporary folder, and measure what came of it."""
    dataset = load_dataset(source)
    dataset = dataclasses.replace(dataset, cases=dataset.cases[:cases])
    expected: list[int] = []

    def note(output: Path, jobs: Any, footprints: Any, say: Any) -> None:
        expected.append(sum(size.written for size in footprints.values()))

    preprocessing.require_disk = note
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        config = PreprocessConfig(source, output, spacing, modality=modality, num_workers=1)
        entries = preprocessing.prepare_dataset(dataset, config).entries
        voxels = sum(math.prod(entry.shape) * entry.channels for entry in entries)
        parts = {part: bytes_of(output / part) for part in ("images", "labels")}
        for array in ("image", "label"):
            parts[f"store {array}"] = sum(bytes_of(output / "store" / entry.id / array) for entry in entries)
        parts["store positions"] = bytes_of(output / "store") - parts["store image"] - parts["store label"]
        return {
            "cases": len(entries),
            "bytes_a_voxel": {part: round(size / voxels, 3) for part, size in parts.items()},
            "written": sum(parts.values()),
            "expected": expected[0],
            "expected_to_written": round(expected[0] / sum(parts.values()), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_path", type=Path, required=True, help="a dataset as preprocess takes it")
    parser.add_argument("--spacing", type=float, nargs=3, default=(0.0, 0.0, 0.0), help="mm; 0 keeps an axis")
    parser.add_argument("--modality", choices=("ct", "mr", "us"))
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    figures = {"dataset": args.input_path.name, "spacing": args.spacing, "python": platform.python_version()}
    figures |= measure(args.input_path, tuple(args.spacing), args.modality, args.cases)
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
