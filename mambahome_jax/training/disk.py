"""Disk space of runs: what a training will take, and what can go of work that has ended."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import jax

from mambahome_jax.datasets import prepared
from mambahome_jax.errors import ConfigError, OutputError
from mambahome_jax.flags import CleanConfig
from mambahome_jax.preprocessing.plan import PLAN
from mambahome_jax.support.console import counted
from mambahome_jax.support.devices import program_cache
from mambahome_jax.support.files import bytes_of, earlier_json, free_bytes, said_bytes
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.output_folder import LOCK, held, holder_of
from mambahome_jax.support.processes import SHARED_MEMORY, batch_bytes, needed_bytes
from mambahome_jax.training.checkpoints import DATA_ITEM, OPTIMIZER_ITEM, checkpoint_bytes, holds_run
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.step import TrainState
from mambahome_jax.weights.checkpoint import CONFIG_FILE, MODEL_ITEM, PARTIAL, PREVIOUS

if TYPE_CHECKING:
    from mambahome_jax.keywords import CleanFlags

# What support.files, support.output_folder and patches.store write before it has its name, or move aside, by process.
_LEFTOVER = re.compile(r"\.(.*\.)?\d+(-\d+)?\.(partial|old|probe)(\..+)?")
# Folders that hold no run, results or prepared dataset of their own.
_PARTS = {"checkpoints", "data", "data_val", "images", "labels", "previews", "store", "tensorboard", "validation"}
_STORES = ("data", "data_val")
_MOSAIC = "mosaic"  # kernels, see mambahome_kernels/mosaic/launch.py
_DAY = 24 * 3600


# --- What a training will take -----------------------------------------------------------------------------------


def require_disk(run: Path, setup: Setup, state: TrainState, ended: bool = False) -> str:
    """Say what a run takes, and what is free. state: arrays, or their shapes and dtypes. ended: no step is left.

    What an earlier part of the run wrote is replaced, so it counts as free in the end; but the last checkpoint stays
    until the next one is whole. Raises OutputError: no checkpoint fits.
    """
    keep, (best, last) = setup.flags.keep_last, checkpoint_bytes(state)
    # The one before stays until the next is whole.
    kept, most = best + keep * last, best + (keep + 1) * last
    sizes = f"best {said_bytes(best)}, {'last' if keep == 1 else f'{keep} kept of'} {said_bytes(last)}"
    text = f"checkpoints take {said_bytes(kept)} ({sizes}), {said_bytes(most)} while one is written"
    place = (run / "checkpoints").resolve()
    note, free = "", None if ended else free_bytes(place)
    if free is not None:
        unused = free + sum(map(bytes_of, place.glob(f"last{PARTIAL}*")))
        if holds_run(run) and unused < last:
            room = f"{said_bytes(unused)} are free beside the one that is there, which is kept"
            needs = f"the next checkpoint takes {said_bytes(last)}"
            raise OutputError(f"{run / 'checkpoints'}: {needs}, but {room}. Free some space, then --resume again")
        free += bytes_of(place)
        room, action = f"{said_bytes(free)} are free in {run}", "Free some space or name another --output_dir"
        if free < best + last:
            raise OutputError(f"{run / 'checkpoints'}: {text}, but {room}. {action}")
        text += f"; {room}"
        note = "" if free >= most else f"\nNote: the disk may get full. {action}"
    if setup.num_workers:
        shared = said_bytes(needed_bytes(setup.num_workers, shared_batch_bytes(setup)))
        text += f"; in {SHARED_MEMORY} up to {shared} for {counted(setup.num_workers, 'process')} for reading patches"
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    if cache and "://" not in cache:
        text += f"; programs compiled before take {said_bytes(bytes_of(Path(cache)))} in {cache}"
    return f"Disk: {text}{note}"


def shared_batch_bytes(setup: Setup) -> int:
    """Bytes of a batch that the processes of this loader put into shared memory."""
    return batch_bytes(setup.global_batch // jax.process_count(), setup.patch_size, setup.model.in_chans)


# --- What can go -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removable:
    """Files and folders that can go together. lost: what cannot be done without them, empty where nothing is."""

    folder: Path
    paths: tuple[Path, ...]
    what: str
    lost: str = ""

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(map(bytes_of, self.paths))


@dataclass(frozen=True)
class Cleaned:
    """What `clean` found and removed, with sizes in bytes of before; folder -> why it was left alone or is still there.

    kept: in use, a run that is not finished, or nothing that can be read. failed: could not be removed.
    """

    found: tuple[Removable, ...]
    kept: Mapping[Path, str] = field(default_factory=dict)
    removed: tuple[tuple[Removable, int], ...] = ()
    failed: Mapping[Path, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 1 where something could not be removed."""
        return int(bool(self.failed))


@shows_keywords(CleanConfig)
def clean(**flags: "Unpack[CleanFlags]") -> Cleaned:
    """List what can go of runs and other output, and remove it with yes=True; keywords are the flags of `clean`.

    Raises:
        ConfigError: no such folder, a negative number of days.
    """
    config = from_keywords(CleanConfig, flags)
    found = find_removable(config)
    return remove(config, found) if config.yes else found


def find_removable(config: CleanConfig) -> Cleaned:
    """Look for what can go in config.folder, without one among the compiled programs; remove nothing. See `clean`."""
    if config.older_than is not None and not config.older_than >= 0:
        raise ConfigError(f"--older_than {config.older_than:g}; expected 0 or more days")
    if config.folder is not None and not config.folder.is_dir():
        raise ConfigError(f"{config.folder}: no such folder; expected a run, or a folder of runs or of other output")
    kept: dict[Path, str] = {}
    items = _programs(kept) if config.folder is None else _in_folder(config.folder.absolute(), kept)
    before = None if config.older_than is None else time.time() - config.older_than * _DAY
    found = (replace(item, paths=tuple(path for path in item.paths if _is_older(path, before))) for item in items)
    return Cleaned(tuple(item for item in found if item.paths), kept)


def remove(config: CleanConfig, listed: Cleaned) -> Cleaned:
    """Remove what was listed and can still go, each run while no other command can take it. Raises as `clean`."""
    now = {path for item in find_removable(config).found for path in item.paths}
    removed, failed = [], dict[Path, str]()
    for item in listed.found:
        item = replace(item, paths=tuple(path for path in item.paths if path in now))
        size = item.size
        try:
            with contextlib.nullcontext() if config.folder is None else held(item.folder, "clean", "FOLDER"):
                for path in item.paths:
                    _discard(path)
        except OutputError as error:
            failed[item.folder] = str(error)
        except OSError as error:
            failed[item.folder] = f"{error.filename or item.folder}: cannot be removed: {error.strerror or error}"
        else:
            if item.paths:
                removed.append((item, size))
            else:
                failed[item.folder] = f"{item.folder}: used or changed since it was listed. Run mambahome clean again"
    return replace(listed, removed=tuple(removed), failed=failed)


def _discard(path: Path) -> None:
    """Remove a file or folder; a folder is whole or gone for all who look, also where this is killed."""
    if path.is_dir():
        aside = path.with_name(f".{path.name[:40]}.{os.getpid()}.old")
        path = path if _LEFTOVER.fullmatch(path.name) else path.rename(aside)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_older(path: Path, seconds: float | None) -> bool:
    """Whether the newest file of a path was written before a time."""
    with contextlib.suppress(OSError):
        return seconds is None or max(file.lstat().st_mtime for file in (path, *path.rglob("*"))) < seconds
    return False


def _in_folder(folder: Path, kept: dict[Path, str]) -> Iterator[Removable]:
    """What can go in a folder and those below that a command of ours wrote; `kept` gets what is left alone, and why."""
    if not os.access(folder, os.R_OK | os.X_OK):
        kept[folder] = "cannot be read by this user"
        return
    above = _report(folder.parent)
    if above is not None and (reason := _why_kept(folder.parent, above)):
        kept[folder.parent] = reason
        return
    report = _report(folder)
    ours = report is not None or _is_output(folder)
    if ours:
        if holder := holder_of(folder):
            kept[folder] = holder
            return
        if leftovers := tuple(_leftovers(folder)):
            yield Removable(folder, leftovers, "left half-written by commands that were killed")
    if report is not None:
        items = tuple(_of_finished(folder, report))
        if items and (reason := _why_kept(folder, report)):
            kept[folder] = reason
            return
        yield from items
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        kept[folder] = f"cannot be read: {error.strerror or error}"
        return
    for child in children:
        if child.is_dir() and not child.is_symlink() and child.name[0] != "." and not (ours and child.name in _PARTS):
            yield from _in_folder(child, kept)


def _report(folder: Path) -> dict[str, Any] | None:
    """run.json of a training, None where there is none."""
    report = earlier_json(folder / "run.json")
    return report if report.get("command") == "train" else None


def _why_kept(run: Path, report: Mapping[str, Any]) -> str:
    """Why a run is to be left alone; empty where it came to its end and nobody holds it."""
    if holder := holder_of(run):
        return holder
    finished = report.get("status") == "finished"
    return "" if finished else f"not finished ({report.get('status')}), so --resume needs what is there"


def _is_output(folder: Path) -> bool:
    """Whether preprocess, infer or evaluate wrote a folder, or was killed in it."""
    if (folder / LOCK).is_file() or prepared.detect(folder):
        return True
    return (folder / "metrics.csv").is_file() and (folder / "summary.json").is_file()


def _leftovers(folder: Path) -> Iterator[Path]:
    """What no command reads any more, by the names that only half-written files have."""
    checkpoints = folder / "checkpoints"
    folders = [folder, *(folder / name for name in sorted(_PARTS))]
    folders += [folder / name / part for name in _STORES for part in ("store", "images", "labels")]
    folders += [path for path in checkpoints.glob("*") if (path / CONFIG_FILE).is_file()]
    for place in folders:
        if place.is_dir() and not place.is_symlink():
            yield from (path for path in sorted(place.glob(".*")) if _LEFTOVER.fullmatch(path.name))
    for path in sorted(checkpoints.glob("*")):
        name, partial, _ = path.name.partition(PARTIAL)
        if partial and name in ("best", "last"):
            yield path
        # Where a crash left only this one, it is the checkpoint.
        if path.name.endswith(PREVIOUS) and _is_checkpoint(path.with_name(path.name.removesuffix(PREVIOUS))):
            yield path


def _is_checkpoint(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / MODEL_ITEM).is_dir() and not path.is_symlink()


def _of_finished(run: Path, report: Mapping[str, Any]) -> Iterator[Removable]:
    """What a finished run needs no longer: of data what training stored itself, never what preprocess wrote."""
    flags = report.get("configuration", {})
    given = {Path(flags[name]).resolve() for name in ("data_train", "data_val") if flags.get(name)}
    found = [path for path in (run / name for name in _STORES) if prepared.detect(path) and not path.is_symlink()]
    stores = tuple(path for path in found if path.resolve() not in given and not (path / PLAN).exists())
    if stores:
        yield Removable(run, stores, "stores of scans that were trained on as they are", "a next run stores them anew")
    checkpoints = [path for path in sorted((run / "checkpoints").glob("*")) if _is_checkpoint(path)]
    items = (path / name for path in checkpoints for name in (OPTIMIZER_ITEM, DATA_ITEM))
    if states := tuple(path for path in items if path.is_dir() and not path.is_symlink()):
        lost = "it cannot be resumed; its checkpoints stay good for infer and --use_pretrained"
        yield Removable(run, states, "states of the optimizer of a finished run", lost)


def _programs(kept: dict[Path, str]) -> Iterator[Removable]:
    """Compiled programs in the user's cache; in a folder that JAX_COMPILATION_CACHE_DIR names, the kernels alone."""
    own, named = program_cache(), os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    lost = "the next training compiles them anew"
    folders = [own] if own is not None else []
    if named and "://" not in named and Path(named) != own:
        folders.append(Path(named))
        kept[Path(named)] = "JAX_COMPILATION_CACHE_DIR: programs of others may be among those here, but for our kernels"
    for folder in folders:
        if folder == own and (programs := _files(folder, ("*-cache", "*-atime", "xla_gpu_*_dir/*"))):
            yield Removable(folder, programs, "programs compiled by JAX", lost)
        if kernels := _files(folder / _MOSAIC, ("*.mlirbc", "tmp*")):
            yield Removable(folder / _MOSAIC, kernels, "kernels lowered by Pallas", lost)


def _files(folder: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    found: Iterable[Path] = (path for pattern in patterns for path in folder.glob(pattern))
    return tuple(sorted(path for path in found if not path.is_symlink()))
