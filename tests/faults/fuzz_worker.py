"""One command over folders of damaged scans, in a process of its own with a limit of memory: see fuzz_files.

fuzz_worker.py COMMAND FOLDER ...: prints a line of JSON a folder: {"folder", "code", "output", "cases": {id: [seconds,
MB]}, "reasons": {id: reason}}.
"""

import contextlib
import io
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambahome_jax.commands import check, infer, preprocess
from mambahome_jax.config import DataProperties
from mambahome_jax.errors import MambaHomeError
from mambahome_jax.flags import CheckConfig, InferConfig, PreprocessConfig
from mambahome_jax.inference import batch
from mambahome_jax.inference.result_files import ResultFiles
from mambahome_jax.preprocessing import dataset, examine
from tests.inference.models import Levels

PROPERTIES = DataProperties(
    spacing=(1.0, 1.0, 3.0), labels=((1, "liver"), (2, "spleen")), patch_size=(16, 16, 32), modality="ct"
)
LIMIT = 3 << 30


def measured(function: Callable, seen: dict[str, list[float]], name: Callable[[tuple], str]) -> Callable:
    """The function, noting processor seconds and megabytes at the peak of each call."""

    def call(*arguments: Any, **named: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        before, begun = resident("VmRSS"), time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            seen[name(arguments)] = [time.process_time() - begun, (resident("VmHWM") - before) / 1024]

    return call


def resident(name: str) -> int:
    """Kilobytes of this process: VmRSS, VmHWM, VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def one(command: str, folder: Path, seen: dict[str, list[float]]) -> dict[str, Any]:
    """Exit code and the reason for each case that failed."""
    reasons: dict[str, str] = {}
    output = folder.parent / f"{folder.name}-{command}"
    if command == "check":
        code = check.run(CheckConfig(folder, json=output.with_suffix(".json"), num_workers=1))
        for finding in json.loads(output.with_suffix(".json").read_text())["findings"]:
            if finding["severity"] == "error":
                reasons[finding["case"]] = f"{finding['file']}: {finding['found']}"
    elif command == "preprocess":
        code = preprocess.run(PreprocessConfig(folder, output, spacing=(1, 1, 3), modality="ct", num_workers=1))
        skipped = json.loads((output / "dataset.json").read_text())["skipped"]
        reasons = {entry["id"]: entry["reason"] for entry in skipped}
    else:
        home = folder / "images" if (folder / "images").is_dir() else folder
        code = infer.run(InferConfig(home, folder / "model", output_dir=output))
        failures = json.loads((output / "run.json").read_text())["failures"]
        reasons = {entry["id"]: entry["reason"] for entry in failures}
    return {"code": code, "reasons": reasons}


def main() -> None:
    command, folders = sys.argv[1], [Path(name) for name in sys.argv[2:]]
    batch.load_model = lambda path, precision: Levels((0.0, 0.5, 1.0), metadata=PROPERTIES)  # type: ignore[assignment]
    seen: dict[str, list[float]] = {}
    examine.examine_case = measured(examine.examine_case, seen, lambda a: a[0].case.id)
    dataset.prepare_case = measured(dataset.prepare_case, seen, lambda a: a[0].case.id)
    names: dict[int, str] = {}
    read = batch.InferRun.read

    def remembered(run: Any, scan: Any) -> Any:
        found = read(run, scan)
        names[id(found[1])] = scan.case
        return found

    batch.InferRun.read = measured(remembered, seen, lambda a: a[1].case)  # type: ignore[method-assign]
    batch.label = measured(batch.label, seen, lambda a: f"labels of {names[id(a[1])]}")
    save_result = measured(ResultFiles.save_result, seen, lambda a: f"result of {a[1].scan.case}")
    ResultFiles.save_result = save_result  # type: ignore[method-assign]
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") * 1024 + LIMIT,) * 2)
    for folder in folders:
        seen.clear()
        said = io.StringIO()
        result: dict[str, Any] = {"code": None, "reasons": {}}
        begun = time.perf_counter()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                result = one(command, folder, seen)
            except MambaHomeError as error:
                result |= {"code": 2, "error": str(error)}
            except Exception:  # noqa: BLE001  what this program is to find
                said.write(traceback.format_exc())
        result |= {"folder": folder.name, "output": said.getvalue(), "cases": dict(seen)}
        print(json.dumps(result | {"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
