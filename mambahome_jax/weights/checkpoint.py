"""Checkpoint folders: `config.json` in plain sight, parameters in Orbax' format, swapped in whole or not at all.

Weights alone, as `convert` writes them, lie in the layout of a model hub instead: one model.safetensors, and a card.

A folder `best` is written as `best.partial` and renamed; the one it replaces is `best.previous` for that moment, and
is read in its place should a crash leave only that. training/checkpoints.py adds the state of optimizer and data.
"""

import contextlib
import glob
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from mambahome_jax.config import DataProperties, NetworkConfig
from mambahome_jax.errors import CheckpointError, OutputError, why_not_written
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import free_bytes, parse_json
from mambahome_jax.support.paths import openable_path, require_letters
from mambahome_jax.weights.model_path import RUN_CHECKPOINT, networks_of_run

CONFIG_FILE, MODEL_ITEM = "config.json", "model"
# Of a folder as model hubs have them: weights with published names, and the card that a person reads there.
HUB_WEIGHTS, MODEL_CARD = "model.safetensors", "README.md"
PARTIAL, PREVIOUS, EARLIER = ".partial", ".previous", "step_"
# Bytes that one on the disk may stand for: arrays of zeros, as some parameters begin, pack well.
_PACKED = 10_000
# What Orbax and TensorStore raise for files that are missing, cut short or of another kind.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError)
WRITE_ERRORS = (OSError, ValueError, RuntimeError)
# Folders are made before any thread begins to write: where one cannot be made, the threads wait ten minutes for it.
WRITING = ocp.options.AsyncOptions(create_directories_asynchronously=False)
# What a checkpoint takes beside its arrays: some 50 small files and folders, each of a block.
_MORE_BYTES, _FILES = 1 << 20, 100
# Tries to remove what a failed write left, a tenth of a second between them.
_REMOVALS = 20


def sibling(folder: Path, suffix: str) -> Path:
    """The folder's neighbour of the same name with a suffix."""
    return folder.with_name(folder.name + suffix)


def find_checkpoint(folder: Path | str) -> Path:
    """Find the folder to read: itself, the best checkpoint of a run, or what a crash in a swap left aside of either.

    Raises CheckpointError when there is none.
    """
    folder = openable_path(folder).absolute()
    require_letters(folder)
    for checkpoint in (folder, folder / RUN_CHECKPOINT):
        for candidate in (checkpoint, sibling(checkpoint, PREVIOUS)):
            parameters = (candidate / CONFIG_FILE).is_file() and (candidate / MODEL_ITEM).is_dir()
            if parameters or (candidate / HUB_WEIGHTS).is_file():
                return candidate
    nothing = f"the folder has no {CONFIG_FILE} and {MODEL_ITEM}/, nor {HUB_WEIGHTS}"
    fault = nothing if folder.is_dir() else "no such folder"
    if networks := networks_of_run(folder):
        raise CheckpointError(f"{folder}: the folder of several networks; expected one, such as {networks[0]}")
    # Of a run's folder of checkpoints, or of a folder of runs.
    below = [file.parent for depth in ("best", f"*/{RUN_CHECKPOINT}") for file in folder.glob(f"{depth}/{CONFIG_FILE}")]
    example = min(below, default=Path("RUN") / RUN_CHECKPOINT)
    raise CheckpointError(f"{folder}: {fault}; expected a run, or a checkpoint such as {example}. Check the path")


def read_checkpoint_config(folder: Path | str) -> dict[str, Any]:
    """Read `config.json`: {"model": fields of ModelConfig, "data": {...}, "step", ...}. Raises CheckpointError."""
    path = find_checkpoint(folder) / CONFIG_FILE
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; expected JSON. The checkpoint is damaged, use another") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f'{path}: no entry "model"; expected the configuration of the network')
    return config


def integer_keys(tree: Any) -> Any:
    """Make the keys of lists integers again, as nnx has them; Orbax keeps every key as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if isinstance(k, str) and k.isdigit() else k: integer_keys(v) for k, v in tree.items()}


def read_checkpoint_params(folder: Path | str) -> dict[str, Any]:
    """Read the parameters onto the host as numpy arrays, nested as `nnx.to_pure_dict` nests them.

    Raises CheckpointError when they cannot be read.
    """
    path = find_checkpoint(folder) / MODEL_ITEM
    try:
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(path).tree
        _require_held(path, tree)
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return integer_keys(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=on_host)))
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). The checkpoint is damaged, use another") from error


def _require_held(path: Path, tree: Any) -> None:
    """Raises ValueError where the arrays are larger than their files can be: what is missing would be made of zeros."""
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if claimed > _PACKED * size:
        raise ValueError(f"{claimed} bytes of parameters in files of {size} bytes")


def write_checkpoint(folder: Path | str, params: Any, config: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Write parameters and configuration alone, as for inference or to start a training from.

    Args:
        folder: appears whole or not at all.
        params: nested dict of arrays, numpy or jax, any dtype.
        config: JSON values; "model" holds the fields of ModelConfig.
        overwrite: replace a checkpoint that is there.

    Raises OutputError when the folder exists already or cannot be written; what was there before stays.
    """
    folder = openable_path(folder).absolute()
    require_letters(folder)
    with _new_checkpoint(folder, config, overwrite) as partial:
        require_space(folder.parent, sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params)))
        with quiet_orbax(), ocp.Checkpointer(writing_handler()) as checkpointer:
            checkpointer.save(partial, args=ocp.args.Composite(**{MODEL_ITEM: ocp.args.PyTreeSave(params)}))
    return folder


@contextlib.contextmanager
def _new_checkpoint(folder: Path, config: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Give the place to write to, which takes that of `folder` at the end. Raises OutputError."""
    if folder.exists() and not overwrite:
        raise OutputError(f"{folder} exists already; expected a new folder. Choose another name or pass --overwrite")
    partial = prepare_partial(folder)
    try:
        yield partial
        finish_checkpoint(folder, config)
    except (*WRITE_ERRORS, safetensors.SafetensorError) as error:
        remove_partial(folder)
        reason = why_not_written(error)
        raise OutputError(f"{folder}: cannot be written ({reason}). Is the disk full or read-only?") from error


def write_hub_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], config: dict[str, Any], card: str, *, overwrite: bool = False
) -> None:
    """Write weights in the layout of a model hub: model.safetensors, config.json, and README.md, the model card.

    Args and errors as of `write_checkpoint`; tensors: by published name, in torch's layout. card: Markdown.
    """
    with _new_checkpoint(folder.absolute(), config, overwrite) as partial:
        partial.mkdir()
        write_safetensors(partial / HUB_WEIGHTS, tensors, {"format": "pt"})
        (partial / MODEL_CARD).write_text(card, encoding="utf-8", errors="backslashreplace")


def model_card(config: NetworkConfig, data: DataProperties | None, parameters: int) -> str:
    """Make the page that a model hub shows: what the network is and how it is used, with gaps for what no file says."""
    known = data or DataProperties()
    network = config.to_json().get("network", "MambaHoME")
    spacing = "of the scan" if known.spacing is None else " x ".join(f"{step:g}" for step in known.spacing) + " mm"
    labels = ", ".join(f"{value} {name}" for value, name in known.labels) or "without names"
    rows = {
        "network": f"{network}, {parameters:,} parameters",
        "input": f"{counted(config.in_chans, 'channel')}, {known.modality}, {spacing}, {known.orientation}",
        "output": f"{config.out_chans} classes with the background: {labels}",
        "Dice in its own validation": "not known" if known.val_dice is None else f"{known.val_dice:.4f}",
        "trained on": "(which scans, under which licence)",
    }
    table = "".join(f"| {name} | {_in_table(value)} |\n" for name, value in rows.items())
    return f"""---
library_name: mambahome-jax
pipeline_tag: image-segmentation
tags: [medical, segmentation, {known.modality}, jax]
---

# {network}

Segments {known.modality.upper()} scans in three dimensions. It is not a medical device.

| | |
|---|---|
{table}
## Use

    pip install mambahome-jax
    mambahome infer --data_path SCANS --model_path THIS_FOLDER --output_dir PRED
"""


def _in_table(text: str) -> str:
    """Text that anybody may have given, in a cell of a Markdown table."""
    return "".join(f"\\{letter}" if letter in "\\|<>[]`*_" else letter for letter in " ".join(text.split()))


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError where arrays of `needed` bytes find no room, before the writer's threads fail one by one."""
    free, needed = free_bytes(folder), needed + _MORE_BYTES
    if free is not None and free < needed:
        raise OSError(f"{needed / 1e6:.3g} MB needed, {free / 1e6:.3g} MB free")
    files = os.statvfs(folder) if hasattr(os, "statvfs") else None
    # Some file systems make room for files as they come, and know no number.
    if files is not None and files.f_files and files.f_favail < _FILES:
        raise OSError(f"{_FILES} files needed, the file system has room for {files.f_favail}")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a .safetensors file that others may read as any file here, where save_file allows its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def remove_partial(folder: Path) -> None:
    """Remove what a failed write left beside `folder`, again where threads still bring files into it."""
    for _ in range(_REMOVALS):
        leftovers = list(folder.parent.glob(f"{glob.escape(folder.name)}{PARTIAL}*"))
        if not leftovers:
            return
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        if any(leftover.exists() for leftover in leftovers):
            time.sleep(0.1)


def writing_handler() -> ocp.CompositeCheckpointHandler:
    """What writes the items of a checkpoint."""
    return ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=WRITING))


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence what Orbax and TensorStore log and print of a failure besides raising it."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def unraisable(args: Any) -> None:
        if "Event loop is closed" not in str(args.exc_value):
            hook(args)

    logger.setLevel(logging.CRITICAL + 1)
    # It stays: tasks may be collected at any later time.
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()


def prepare_partial(folder: Path) -> Path:
    """Clear the place beside `folder` where its successor is written, and return it. Raises OutputError."""
    partial = sibling(folder, PARTIAL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Orbax writes under this name with more behind it, and a killed process leaves that.
        for leftover in folder.parent.glob(f"{partial.name}*"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise OutputError(f"{partial}: {error}. Is the disk full or read-only?") from error
    return partial


def finish_checkpoint(folder: Path, config: dict[str, Any], keep: int = 1) -> None:
    """Let the written `folder`.partial take the place of `folder`; keep - 1 earlier ones stay as step_<number>."""
    partial, previous = sibling(folder, PARTIAL), sibling(folder, PREVIOUS)
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        # A leftover of an earlier crash is needed only as long as `folder` is missing.
        if previous.exists():
            shutil.rmtree(previous)
        folder.replace(previous)
    partial.replace(folder)
    if keep > 1 and previous.exists():
        step = parse_json((previous / CONFIG_FILE).read_text(encoding="utf-8"))["step"]
        kept = folder.with_name(f"{EARLIER}{step:08d}")
        shutil.rmtree(kept, ignore_errors=True)
        previous.replace(kept)
        for old in sorted(folder.parent.glob(f"{EARLIER}*"))[: 1 - keep]:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
