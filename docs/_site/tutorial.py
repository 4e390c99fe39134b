"""Run the command lines and the Python of the first steps on synthetic scans, in their order.

python docs/_site/tutorial.py

As typed, but on a coarse grid, with a small network, and for two steps of training: that of examples/scans_to_report,
whose compiled programs are taken where `make docs` ran it before.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from mambahome_jax.datasets.phantom import write_phantoms

PAGE = Path(__file__).parents[1] / "getting-started" / "first-dataset.md"
SHORT = {
    "preprocess": "--spacing 8 8 8",
    "train": "--model MambaHoME_tiny --recipe published --patch_size 48 32 32 --feature_size 12 --batch_size 1 "
    "--augment False --steps 2 --val_every 2",
    "infer": "--sw_batch_size 1",
}


def blocks(text: str) -> list[str]:
    """Indented blocks of a page, without their indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    return [re.sub(r"^    ", "", block, flags=re.M).strip() for block in found]


def commands(block: str) -> list[list[str]]:
    """The words of each command line of a block, shortened."""
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.startswith("mambahome ")]
    return [[*words, *SHORT.get(words[1], "").split()] for words in lines]


def write_scans(folder: Path) -> None:
    """The folders that the page names."""
    write_phantoms(folder / "SCANS", 6)
    write_phantoms(folder / "unseen", 2, first=7)
    for name, there in {"NEW_SCANS": "images", "LABELS": "labels"}.items():
        (folder / "unseen" / there).rename(folder / name)
        (folder / name / "phantom_007.nii.gz").rename(folder / name / "p21.nii.gz")


def main() -> None:
    """Raises CalledProcessError where a line fails."""
    # As conf.py has them for the notebooks.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[2] / "build/docs/programs"))
    python: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scans(folder)
        count = 0
        for block in blocks(PAGE.read_text(encoding="utf-8")):
            for words in commands(block):
                print("$", *words, flush=True)
                done = subprocess.run([sys.executable, "-m", "mambahome_jax", *words[1:]], cwd=folder, check=False)
                # 1: check has remarks on such few scans.
                if done.returncode > int(words[1] == "check"):
                    sys.exit(f"{PAGE}: {shlex.join(words)} ended with exit code {done.returncode}")
                count += 1
            if "mh." in block and "mambahome " not in block:
                python.append(block)
        subprocess.run([sys.executable, "-c", "\n".join(python)], cwd=folder, check=True)
    print(f"{count} command lines and {len(python)} blocks of Python ran")


if __name__ == "__main__":
    main()
