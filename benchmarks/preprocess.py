"""Cases a minute of preprocess (orientation, spacing, save) against MONAI's pipeline on the same generated cases.

python benchmarks/preprocess.py --workers 1 2 --json preprocess.json
python benchmarks/preprocess.py --monai_python OTHER_ENVIRONMENT/bin/python

MONAI's: LoadImaged, Orientationd, Spacingd, SaveImaged, over as many processes. Ours writes the patch store as
well, and its time includes that of starting its processes; MONAI's start and imports are left out of its time.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np


def make_cases(folder: Path, cases: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """CT-like int16 scans with noise, and label maps with three structures, axes L, P, S, as .nii.gz."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    i, j, k = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    radius = np.sqrt(i**2 + j**2 + 0.3 * k**2)
    label = np.digitize(-radius, [-0.7, -0.45, -0.2]).astype(np.uint8)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(cases):
        rng = np.random.default_rng(number)
        inside = np.where(radius < 0.9, 40.0 + 30 * label, -1000.0)
        image = (inside + 20 * rng.standard_normal(shape)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, affine), folder / f"images/case{number:02}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"labels/case{number:02}.nii.gz")


def ours(source: Path, output: Path, spacing: tuple[float, float, float], workers: int) -> tuple[float, float]:
    """Seconds for all cases, and processor seconds of all processes."""
    from mambahome_jax.datasets.registry import load_dataset
    from mambahome_jax.flags import PreprocessConfig
    from mambahome_jax.preprocessing.dataset import prepare_dataset

    dataset, config = (
        load_dataset(source),
        PreprocessConfig(source, output, spacing, modality="ct", num_workers=workers),
    )
    start, processor = time.perf_counter(), processor_seconds()
    result = prepare_dataset(dataset, config)
    seconds = time.perf_counter() - start
    if result.failed:
        raise SystemExit(f"cases failed: {result.failed}")
    return seconds, processor_seconds() - processor


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


_NEVER = (float("inf"), 0.0)
_pipeline: Any = None


def start_monai(output: Path, spacing: tuple[float, float, float], threads: int) -> None:
    """Build the pipeline in a process of the pool."""
    import torch
    from monai import transforms

    global _pipeline
    torch.set_num_threads(threads)
    keys = ("image", "label")
    save = {"output_postfix": "", "separate_folder": False, "print_log": False}
    _pipeline = transforms.Compose(
        [
            transforms.LoadImaged(keys, ensure_channel_first=True),
            transforms.Orientationd(keys, axcodes="RAS", labels=None),
            transforms.Spacingd(keys, pixdim=spacing, mode=("bilinear", "nearest")),
            transforms.SaveImaged("image", output_dir=output / "images", output_dtype=np.float32, **save),
            transforms.SaveImaged("label", output_dir=output / "labels", output_dtype=np.uint8, **save),
        ]
    )


def monai_case(files: dict[str, str]) -> float:
    """Processor seconds of one case."""
    start = time.process_time()
    _pipeline(files)
    return time.process_time() - start


def monai(source: Path, output: Path, spacing: tuple[float, float, float], workers: int) -> tuple[float, float]:
    """As `ours`, once the processes have begun; each has its share of the cores as threads."""
    files = [
        {"image": str(path), "label": str(source / "labels" / path.name)}
        for path in sorted((source / "images").glob("*.nii.gz"))
    ]
    threads = max(len(os.sched_getaffinity(0)) // workers, 1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, start_monai, (output, spacing, threads)) as pool:
        # A first case for each process, so that imports and first calls are not counted.
        pool.map(monai_case, files[:1] * workers, chunksize=1)
        start = time.perf_counter()
        processor = sum(pool.map(monai_case, files, chunksize=1))
        return time.perf_counter() - start, processor


def compare(first: Path, second: Path) -> float:
    """Share of the voxels of all images that differ by more than 0.1, both being the same pipeline."""
    different = voxels = 0
    for path in sorted((first / "images").glob("*.nii.gz")):
        a, b = (np.asarray(nib.load(folder / "images" / path.name).dataobj) for folder in (first, second))
        if a.shape != b.shape:
            raise SystemExit(f"{path.name}: {a.shape} and {b.shape} voxels")
        different += int(np.count_nonzero(np.abs(a - b) > 0.1))
        voxels += a.size
    return different / voxels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 128), help="voxels")
    parser.add_argument("--from_spacing", type=float, nargs=3, default=(0.75, 0.75, 2.5), help="mm")
    parser.add_argument("--spacing", type=float, nargs=3, default=(0.8, 0.8, 3.0), help="mm")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many runs counts, on both sides")
    parser.add_argument("--monai_python", default=sys.executable, help="interpreter that has MONAI")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only_monai", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    spacing = tuple(args.spacing)
    if args.only_monai:
        source, output, workers = args.only_monai
        print(json.dumps(monai(Path(source), Path(output), spacing, int(workers))))
        return

    probe = "import monai, torch; print(monai.__version__, torch.__version__)"
    found = subprocess.run([args.monai_python, "-c", probe], capture_output=True, text=True, check=False)
    versions = found.stdout.split() if found.returncode == 0 else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        make_cases(source, args.cases, tuple(args.shape), tuple(args.from_spacing))
        for workers in args.workers:
            row: dict[str, Any] = {"workers": workers}
            best: dict[str, tuple[float, float]] = {}
            for repeat in range(args.repeats):
                # In turn, so that other work on the machine meets both.
                mine, theirs = (Path(folder) / f"{name}{workers}{repeat}" for name in ("ours", "monai"))
                best["ours"] = min(best.get("ours", _NEVER), ours(source, mine, spacing, workers))
                if versions:
                    command = [args.monai_python, __file__, "--spacing", *map(str, spacing)]
                    command += ["--only_monai", str(source), str(theirs), str(workers)]
                    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                    best["monai"] = min(best.get("monai", _NEVER), tuple(json.loads(output.splitlines()[-1])))
                    row["differing"] = compare(mine, theirs)
            for name, (seconds, processor) in best.items():
                row[f"{name}_cases_per_minute"] = 60 * args.cases / seconds
                row[f"{name}_processor_s_per_case"] = processor / args.cases
            rows.append(row)

    cores = len(os.sched_getaffinity(0))
    print(f"{args.cases} cases of {args.shape} at {args.from_spacing} mm -> {args.spacing} mm, {cores} cores")
    for row in rows:
        line = f"{row['workers']} workers: ours {row['ours_cases_per_minute']:.1f} cases a minute"
        if versions:
            ratio = row["ours_cases_per_minute"] / row["monai_cases_per_minute"]
            line += f", MONAI {row['monai_cases_per_minute']:.1f} ({ratio:.2f} times)"
            line += f"; processor seconds a case {row['ours_processor_s_per_case']:.2f}"
            line += f" and {row['monai_processor_s_per_case']:.2f}; {row['differing']:.2%} of voxels differ"
        print(line)
    if not versions:
        print("MONAI is not installed there, so there is nothing to compare with.")
    if args.json:
        report = {"rows": rows, "cases": args.cases, "shape": args.shape, "spacing": args.spacing}
        report |= {"load_average": os.getloadavg(), "machine": platform.machine(), "cores": cores}
        report |= {"versions": {"python": platform.python_version(), "numpy": np.__version__}}
        if versions:
            report["versions"] |= dict(zip(("monai", "torch"), versions, strict=True))
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
