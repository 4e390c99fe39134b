"""Every layout that can be read. A new one is a module with LOOKS_FOR, detect and load, and a name in LAYOUTS."""

from pathlib import Path

from mambahome_jax.datasets import decathlon, images_labels, prepared, published
from mambahome_jax.datasets.base import Dataset
from mambahome_jax.errors import DatasetError

# In order: the first whose detect() says yes reads the folder.
LAYOUTS = (prepared, decathlon, images_labels, published)


def load_dataset(folder: str | Path) -> Dataset:
    """Find out the layout of a folder and list its cases; only names and dataset.json are read, no scan.

    Raises DatasetError: missing or empty folder, a file, an unknown layout (with what was looked for), and what the
    layout's own load() finds.
    """
    folder = Path(folder)
    expected = "one of:\n" + "\n".join(f"  - {layout.LOOKS_FOR}" for layout in LAYOUTS)
    if not folder.is_dir():
        found = "a file, not a folder" if folder.exists() else "no such folder"
        raise DatasetError(found, file=folder, expected=expected)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", file=folder) from error
    for layout in LAYOUTS:
        if layout.detect(folder):
            return layout.load(folder)
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    found = f"unknown layout (it holds {listed})" if names else "the folder is empty"
    raise DatasetError(found, file=folder, expected=expected)
