"""Damaged files through check, preprocess and infer: each gives a result or one line that names it, and nothing else.

python -m tests.faults.fuzz_files --count 1000 --json files.json

A fault is a crash, a hang, a traceback, a reason of several lines or one that names no file, more than SECONDS of
processor time or MEGABYTES for one file, or any other change to an input. Exit code 0: none was found.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.faults import mutations
from tests.faults.results import tell

COMMANDS = ("check", "preprocess", "infer")
FOLDER = 50  # cases together in a dataset
SECONDS, MEGABYTES = 10.0, 400.0


def make_folders(root: Path, count: int, first: int = 0) -> tuple[list[Path], dict[str, str]]:
    """Datasets of `FOLDER` cases each below root; every fourth has its label map damaged, else its image.

    Returns the folders, and the kind of damage of each case.
    """
    kinds, folders = {}, []
    for start in range(first, first + count, FOLDER):
        folder = root / f"{start:05}"
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "2": "spleen"}}))
        for seed in range(start, min(start + FOLDER, first + count)):
            damaged = "labels" if seed % 4 == 3 else "images"
            case, rng = f"c{seed:05}", np.random.default_rng(seed)
            kinds[case], suffix, content = mutations.nifti(seed, damaged == "labels")
            (folder / damaged / f"{case}{suffix}").write_bytes(content)
            other = "images" if damaged == "labels" else "labels"
            (folder / other / f"{case}.nii").write_bytes(mutations.scan("int16", rng, other == "labels"))
        folders.append(folder)
    return folders, kinds


def run_worker(command: str, folders: list[Path], limit: float) -> Iterator[dict[str, Any]]:
    """Results of fuzz_worker; after a folder that kills or hangs it, {"folder", "died"}, and on with the next."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    environment |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    left = list(folders)
    while left:
        program = [sys.executable, "-m", "tests.faults.fuzz_worker", command, *map(str, left)]
        try:
            done = subprocess.run(
                program,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=limit * len(left),
                check=False,
            )
            output, how = done.stdout, f"exit code {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired as error:
            output, how = (error.stdout or b"").decode(), f"hung for {limit * len(left):.0f} s"
        results = [json.loads(line) for line in output.splitlines() if line.startswith('{"')]
        yield from results
        left = left[len(results) :]
        if left:
            yield {"folder": left.pop(0).name, "died": how}


def faults_of(command: str, result: dict[str, Any], names: dict[str, list[str]]) -> list[str]:
    """What is wrong with the result of a folder. names: case -> names of its files."""
    where = f"{command} {result['folder']}"
    if "died" in result:
        return [f"{where}: {result['died']}"]
    found = [f"{where}: {result['error']}"] if "error" in result else []
    if "Traceback" in result["output"]:
        found.append(f"{where}: traceback: {result['output'][result['output'].index('Traceback') :][:3000]}")
    for case, reason in result["reasons"].items():
        if "\n" in reason or not any(name in reason for name in names.get(case, ())):
            found.append(f"{where}: {case}: {reason!r}")
    for case, (seconds, megabytes) in result["cases"].items():
        if seconds > SECONDS or megabytes > MEGABYTES:
            found.append(f"{where}: {case} took {seconds:.1f} s, {megabytes:.0f} MB")
    return found


def digest(folders: list[Path]) -> str:
    """Of the names and bytes of all files below the folders."""
    content = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content.update(str(path).encode() + path.read_bytes())
    return content.hexdigest()


def fuzz(root: Path, count: int, commands: tuple[str, ...] = COMMANDS, first: int = 0) -> dict[str, Any]:
    """Do it in an empty folder; returns counts, the worst time and memory, and the faults."""
    folders, kinds = make_folders(root, count, first)
    before, names = digest(folders), {}
    for folder in folders:
        for path in (*folder.glob("images/*"), *folder.glob("labels/*")):
            names.setdefault(path.name.split(".")[0], []).append(path.name)
    faults: list[str] = []
    counts: dict[str, Counter] = {}
    worst = {"seconds": 0.0, "megabytes": 0.0}
    refused = Counter()
    for command in commands:
        counts[command] = Counter()
        for result in run_worker(command, folders, 20 * FOLDER):
            faults += faults_of(command, result, names)
            cases = result.get("cases", {})
            counts[command].update(tried=sum(" " not in case for case in cases), refused=len(result.get("reasons", {})))
            refused.update(kinds[case] for case in result.get("reasons", {}))
            for seconds, megabytes in cases.values():
                worst["seconds"], worst["megabytes"] = (
                    max(worst["seconds"], seconds),
                    max(worst["megabytes"], megabytes),
                )
    if digest(folders) != before:
        faults.append("an input was changed")
    return {
        "files": count,
        "kinds": dict(Counter(kinds.values())),
        "refused": dict(refused),
        "commands": {command: dict(counter) for command, counter in counts.items()},
        "worst": worst,
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first file")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder), args.count, tuple(args.commands), args.first)
    tell(result, args.json)
    return int(bool(result["faults"]))


if __name__ == "__main__":
    raise SystemExit(main())
