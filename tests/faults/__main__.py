"""Every fault, as `make faults` has it: python -m tests.faults [--json FILE] [NAME ...]

Runs the programs below, two at a time, and says how long each took and whether it found a fault. Exit code 0: none did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

# The longest first.
PARTS: dict[str, list[str]] = {
    "kills": ["-m", "tests.faults.kill_commands", "--kills", "18", "--json"],
    "kills of training": ["-m", "tests.faults.kill_training", "--kills", "10", "--json"],
    "files": ["-m", "tests.faults.fuzz_files", "--count", "1000", "--json"],
    "others": ["-m", "tests.faults.fuzz_others", "--count", "50", "--json"],
    "disk": ["-m", "pytest", "-q", "tests/faults/test_disk.py", "-p", "no:cacheprovider", "--junit-xml"],
    "memory over cases": ["-m", "tests.faults.memory", "infer", "--count", "50"],
    "memory over steps": ["-m", "tests.faults.memory", "train", "--count", "5000"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.parts or list(PARTS)
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(names, pool.map(run_part, names), strict=True))
    print(f"all: {time.monotonic() - begun:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return int(any(result["code"] for result in results.values()))


def run_part(name: str) -> dict[str, Any]:
    """Seconds, exit code and what the program of a part found."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MAMBAHOME_FAULTS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    with tempfile.TemporaryDirectory() as folder:
        program, file, begun = [sys.executable, *PARTS[name]], Path(folder) / "result", time.monotonic()
        if program[-1].startswith("--j"):
            program.append(str(file))
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        found = json.loads(file.read_text()) if program[-2] == "--json" and file.exists() else done.stdout[-2000:]
    seconds = round(time.monotonic() - begun)
    print(f"{name}: {'no fault' if done.returncode == 0 else 'FAULTS'}, {seconds} s", flush=True)
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-3000:], flush=True)
    return {"seconds": seconds, "code": done.returncode, "found": found}


if __name__ == "__main__":
    raise SystemExit(main())
