"""The whole way for a miniature of every layout: check, preprocess, train 3 steps, infer, evaluate; names looked at.

Run it with `python -m tests.datasets.all_layouts [LAYOUT ...]`; takes about a minute a layout on two cores. The fast
tests do so for two of them.
"""

import csv
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import nibabel as nib

# Sets the flags of XLA with which compiling takes less time, so before anything of JAX.
import tests.conftest  # noqa: F401
from mambahome_jax.cli import run_command
from tests.datasets.miniatures import MINIATURES


def end_to_end(name: str, folder: Path, *flags: str) -> dict[str, str]:
    """Write the miniature into folder/in and run the five commands on it.

    Returns the table of labels that evaluate ends with, {"1": name}; AssertionError where a command fails or a name is
    lost on the way.
    """
    (folder / "in").mkdir(parents=True)
    miniature = MINIATURES[name](folder / "in")
    out, trained, predicted, scored = (folder / part for part in ("out", "run", "pred", "eval"))
    spacing = ("--spacing", "0", "0", "0", "--num_workers", "1")
    code = _command("check", folder / "in", "--num_workers", "1")
    assert code in (0, 1), f"check ended with {code}"
    code = _command("preprocess", "--input_path", folder / "in", "--output_path", out, *spacing, *flags)
    assert code == (1 if miniature.skipped else 0), f"preprocess ended with {code}"
    prepared = json.loads((out / "dataset.json").read_text())
    labels = prepared["labels"]
    sizes = ("--recipe", "published", "--patch_size", "32", "16", "16", "--batch_size", "1", "--num_workers", "0")
    model = (
        "--model",
        "MambaHoME_tiny",
        "--steps",
        "3",
        "--val_every",
        "3",
        "--max_val_cases",
        "1",
        "--parallel",
        "False",
    )
    assert _command("train", "--data_train", out, "--output_dir", trained, *sizes, *model) == 0
    saved = json.loads((trained / "checkpoints/best/config.json").read_text())
    assert saved["data"]["labels"] == labels, f"the checkpoint names {saved['data']['labels']}"
    where = ("--data_path", out, "--model_path", trained / "checkpoints/best", "--output_dir", predicted)
    assert _command("infer", *where, "--split", "all", "--previews", "False") == 0
    assert json.loads((predicted / "run.json").read_text())["labels"] == labels
    first = next(case for case in prepared["cases"] if case["label"] is not None)
    assert _names_in(predicted / f"{first['id']}.nii.gz") == labels
    # Labels without names are numbered once all cases were seen, when the first of them are long written.
    unnamed = list(labels.values()) == [f"label_{value}" for value in labels]
    assert _names_in(out / first["label"]) == (None if unnamed else labels)
    code = _command(
        "evaluate",
        "--predictions",
        predicted,
        "--references",
        out / "labels",
        "--output_dir",
        scored,
        "--num_workers",
        "0",
    )
    unlabelled = any(case["label"] is None for case in prepared["cases"])
    assert code == (1 if unlabelled else 0), f"evaluate ended with {code}"
    summary = json.loads((scored / "summary.json").read_text())
    assert set(summary["structures"]) == set(labels.values()), set(summary["structures"]) ^ set(labels.values())
    assert summary["cases"] == sum(case["label"] is not None for case in prepared["cases"])
    with (scored / "metrics.csv").open() as file:
        rows = {(row["case"], row["structure"]) for row in csv.DictReader(file)}
    assert (first["id"], labels["1"]) in rows
    return summary["labels"]


def _names_in(file: Path) -> dict[str, str] | None:
    """The names of the structures in a file's header, None where it has none."""
    found = [bytes(extension.get_content()).rstrip(b"\0") for extension in nib.load(file).header.extensions]
    return json.loads(found[0])["labels"] if found else None


def _command(command: str, *arguments: str | Path) -> int:
    return run_command(command, [str(argument) for argument in arguments], command)


def main(names: list[str]) -> int:
    """Run them one after the other and print what came of each; returns the number of those that failed."""
    failed = 0
    for name in names or list(MINIATURES):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                labels = end_to_end(name, Path(folder))
                result = f"passes, {len(labels)} structures"
            # Whatever it is, the other layouts go on.
            except Exception:  # noqa: BLE001
                traceback.print_exc()
                result, failed = "FAILS", failed + 1
        print(f"{name}: {result}, {time.perf_counter() - begun:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
