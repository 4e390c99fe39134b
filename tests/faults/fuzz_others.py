"""Damaged MetaImage, NRRD and DICOM files, dataset.json, CSV tables and checkpoints: a result, or one line naming them.

python -m tests.faults.fuzz_others --count 100 --json others.json

Each kind has a process of its own with a limit of memory; one that dies is a fault, and another does the next file.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import consecutive
from mambahome_jax.errors import MambaHomeError
from mambahome_jax.imaging import itk
from mambahome_jax.imaging.volume import read_volume
from mambahome_jax.preprocessing.examine import ExamineJob, examine_case
from mambahome_jax.support.processes import isolated_reads
from mambahome_jax.weights.weights import read_weights, write_weights
from tests.conftest import ROOT, golden_path
from tests.datasets.miniatures import MINIATURES
from tests.faults import mutations
from tests.faults.fuzz_files import MEGABYTES, SECONDS
from tests.faults.fuzz_worker import resident
from tests.faults.results import tell
from tests.imaging.dicom_files import write_slice

LIMIT = 3 << 30


def _scan(folder: Path, seed: int, suffix: str) -> Path:
    path = folder / f"scan{suffix}"
    array = np.random.default_rng(seed).integers(-1000, 1000, mutations.SHAPE).astype(np.int16)
    sitk = itk.simpleitk(path)
    sitk.WriteImage(sitk.GetImageFromArray(array.transpose(2, 1, 0)), str(path), useCompression=seed % 2 == 0)
    _damage(path, seed, textual=True)
    return path


def _dicom(folder: Path, seed: int, _: str) -> Path:
    for k in range(3):
        pixels = np.random.default_rng(k).integers(-1000, 1000, (8, 10)).astype(np.int16)
        write_slice(folder / "series" / f"{k}.dcm", pixels, position=(0, 0, 2.5 * k), number=k + 1)
    _damage(folder / "series" / f"{seed % 3}.dcm", seed, textual=False)
    return folder / "series"


def _table(folder: Path, seed: int, name: str) -> Path:
    """A dataset of any layout with its text file of that name damaged."""
    layouts = sorted(MINIATURES)
    made = folder / "data"
    for number in range(len(layouts)):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        MINIATURES[layouts[(seed + number) % len(layouts)]](made)
        files = sorted(made.rglob(f"*{name}"))
        if files:
            _damage(files[seed % len(files)], seed, textual=True)
            return made
    raise RuntimeError(f"no layout has {name}")


def _weights(folder: Path, seed: int, suffix: str) -> Path:
    path = folder / f"weights{suffix}"
    write_weights(path, read_weights(golden_path("mambahome_tiny.pth")))
    if not suffix:
        files = sorted(found for found in path.rglob("*") if found.is_file())
        _damage(files[seed % len(files)], seed, textual=files[seed % len(files)].name == "config.json")
        return path
    if suffix == ".safetensors" and seed % 2:
        content = path.read_bytes()
        path.write_bytes(content[:8] + mutations.text(random.Random(seed), content[8:]))
    elif suffix == ".pth" and seed % 2:
        _damage_member(path, "archive/data.pkl", seed)
    else:
        _damage(path, seed, textual=False)
    return path


def _damage(path: Path, seed: int, textual: bool) -> None:
    path.write_bytes(mutations.any_file(seed, path.read_bytes(), textual)[1])


def _damage_member(path: Path, name: str, seed: int) -> None:
    """A member of a zip archive damaged and its checksum made right, so that it is read to its end."""
    with zipfile.ZipFile(path) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    members[name] = mutations.flip(random.Random(seed), members[name], 6)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in members.items():
            archive.writestr(entry, content)


def _check(folder: Path) -> None:
    dataset = consecutive(load_dataset(folder))
    for case in dataset.cases[:3]:
        examine_case(ExamineJob(case, len(dataset.channels), dict(dataset.labels), dataset.hint, None, False))


Make = Callable[[Path, int, str], Path]
KINDS: dict[str, tuple[Make, str, Callable[[Path], Any]]] = {
    "MetaImage": (_scan, ".mha", read_volume),
    "MetaImage, two files": (_scan, ".mhd", read_volume),
    "NRRD": (_scan, ".nrrd", read_volume),
    "DICOM": (_dicom, "", read_volume),
    "dataset.json": (_table, ".json", _check),
    "CSV": (_table, ".csv", _check),
    ".pth": (_weights, ".pth", read_weights),
    ".npz": (_weights, ".npz", read_weights),
    ".safetensors": (_weights, ".safetensors", read_weights),
    "checkpoint folder": (_weights, "", read_weights),
}


@isolated_reads()
def worker(kind: str, first: int, end: int) -> None:
    """Print JSON for each file: processor seconds, megabytes, and the fault: "" for a result, None where refused."""
    make, suffix, read = KINDS[kind]
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") * 1024 + LIMIT,) * 2)
    for seed in range(first, end):
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder), seed, suffix)
            Path("/proc/self/clear_refs").write_text("5")
            before, begun, fault = resident("VmRSS"), time.process_time(), ""
            try:
                read(path)
            except MambaHomeError as error:
                lines = str(error).splitlines()
                # A list of several things is the one message that has lines of its own.
                named = folder in str(error) and (len(lines) == 1 or all(line[:4] == "  - " for line in lines[1:-1]))
                fault = None if named else f"unnamed: {error}"
            except Exception as error:  # noqa: BLE001  what this program is to find
                fault = f"{type(error).__name__}: {error}"
            seconds, megabytes = time.process_time() - begun, (resident("VmHWM") - before) / 1024
            if not fault and (seconds > SECONDS or megabytes > MEGABYTES):
                fault = f"took {seconds:.1f} s, {megabytes:.0f} MB"
            print(json.dumps({"seconds": seconds, "megabytes": megabytes, "fault": fault}), flush=True)


def fuzz(kind: str, count: int, first: int = 0) -> dict[str, Any]:
    """Counts, the worst time and memory, and the faults."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    environment |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    seed, end, found, faults = first, first + count, [], []
    while seed < end:
        program = [sys.executable, "-m", "tests.faults.fuzz_others", "--worker", kind, str(seed), str(end)]
        limit = 600 + 10 * (end - seed)
        try:
            done = subprocess.run(
                program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
            output, how = done.stdout, f"exit code {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired as error:
            output, how = (error.stdout or b"").decode(), "hung"
        results = [json.loads(line) for line in output.splitlines() if line.startswith('{"')]
        faults += [f"{kind} {seed + n}: {result['fault']}" for n, result in enumerate(results) if result["fault"]]
        found += results
        seed += len(results)
        if seed < end:
            faults.append(f"{kind} {seed}: {how}")
            seed += 1
    return {
        "files": count,
        "refused": sum(result["fault"] is None for result in found),
        "seconds": max((result["seconds"] for result in found), default=0.0),
        "megabytes": max((result["megabytes"] for result in found), default=0.0),
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), int(args.worker[2]))
        return 0
    result = {kind: fuzz(kind, args.count) for kind in args.kinds}
    tell(result, args.json)
    return int(any(found["faults"] for found in result.values()))


if __name__ == "__main__":
    raise SystemExit(main())
