"""Every fault, as `make faults` has it: python -m tests.faults [--json FILE] [NAME ...]

Runs each program below, and says for each how long it took and whether it found a fault. Exit code 0: none did.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PARTS: dict[str, list[str]] = {
    "files": ["-m", "tests.faults.fuzz_files", "--count", "1000", "--json"],
    "others": ["-m", "tests.faults.fuzz_others", "--count", "50", "--json"],
    "kills": ["-m", "tests.faults.kill_commands", "--kills", "18", "--json"],
    "kills of training": ["-m", "tests.faults.kill_training", "--kills", "10", "--json"],
    "disk": ["-m", "pytest", "-q", "tests/faults/test_disk.py", "-p", "no:cacheprovider", "--junit-xml"],
    "memory over cases": ["-m", "tests.faults.memory", "infer", "--count", "50"],
    "memory over steps": ["-m", "tests.faults.memory", "train", "--count", "5000"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MAMBAHOME_FAULTS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts or PARTS:
            program, file, begun = [sys.executable, *PARTS[name]], Path(folder) / "result", time.monotonic()
            if program[-1].startswith("--j"):
                program.append(str(file))
            done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            seconds = round(time.monotonic() - begun)
            found = json.loads(file.read_text()) if program[-2] == "--json" and file.exists() else done.stdout[-2000:]
            results[name] = {"seconds": seconds, "code": done.returncode, "found": found}
            print(f"{name}: {'no fault' if done.returncode == 0 else 'FAULTS'}, {seconds} s", flush=True)
            if done.returncode:
                print(done.stdout[-5000:], done.stderr[-3000:], flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return int(any(result["code"] for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
