"""Checkpoints of a training, written in the background, whole or not at all, and whether a run may go on from one.

The folders are those of weights/checkpoint.py with two more items: "optimizer" (step, state of the optimizer, and the
parameters that are trained where those of the model are others) and "data" (state of the loader's iterator).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from mambahome_jax.config import Contents, Strategy
from mambahome_jax.datasets.files import listed
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError, why_not_written
from mambahome_jax.support.devices import versions
from mambahome_jax.support.files import jsonable
from mambahome_jax.support.paths import local_path
from mambahome_jax.training.distributed import is_first, tree_sharding
from mambahome_jax.training.setup import Setup, json_digest
from mambahome_jax.training.step import TrainState, deployed_params
from mambahome_jax.weights.checkpoint import (
    MODEL_ITEM,
    PARTIAL,
    PREVIOUS,
    READ_ERRORS,
    WRITE_ERRORS,
    WRITING,
    find_checkpoint,
    finish_checkpoint,
    prepare_partial,
    quiet_orbax,
    read_checkpoint_config,
    remove_partial,
    require_space,
    sibling,
    writing_handler,
)

OPTIMIZER_ITEM, DATA_ITEM = "optimizer", "data"
# Settings that earlier versions did not record, with their value then; settings that no longer exist, with the value
# that changes nothing.
_NOT_YET = {
    **{"dropout": 0.0, "plane_rotation": 0.0, "strides": [[2, 2, 2]] * 4, "kernel_sizes": [[3, 3, 3]] * 5},
    **{"mixer": "scan", "experts": "home"},
    **{"scheduler": "CALR", "batch_dice": False, "positive_fraction": 0.75},
}
_NO_LONGER = {"label_smoothing": 0.0}
PACKAGES = ("mambahome-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Of the entry "data" in config.json; what else it holds is a setting of its own or follows from the voxels.
PROPERTIES = ("spacing", "orientation", "channels", "labels", "values")
_PARTS = {"train": "train on", "val": "validate on"}


class CheckpointWriter(contextlib.AbstractContextManager):
    """Writes checkpoints one after the other while training goes on; the end of the context waits for the last."""

    def __init__(self) -> None:
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        self._checkpointer = ocp.AsyncCheckpointer(writing_handler(), async_options=WRITING)
        self._swapper = ThreadPoolExecutor(1)
        self._swap: Future | None = None
        self._folder = Path()

    def save(
        self, folder: Path, state: TrainState, config: dict[str, Any], data: Mapping | None = None, keep: int = 1
    ) -> None:
        """Start to write a checkpoint in the place of `folder`, once the one before is done; all processes call it.

        When this returns, `state` is copied and may be donated. Without `data` (state of the iterator) the parameters
        alone are written. keep: checkpoints to keep, the earlier ones as step_<number> beside `folder`.
        Raises OutputError, also for the checkpoint before, if it failed since.
        """
        self.wait()
        folder = local_path(folder).absolute()
        trees = {MODEL_ITEM: deployed_params(state)}
        if data is not None:
            trees[OPTIMIZER_ITEM] = _optimizer_item(state)
        items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        if data is not None:
            items[DATA_ITEM] = ocp.args.JsonSave(dict(data))
        partial = prepare_partial(folder) if is_first() else sibling(folder, PARTIAL)
        self._folder = folder
        try:
            if is_first():
                require_space(folder.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
            self._checkpointer.save(partial, args=ocp.args.Composite(**items))
        except WRITE_ERRORS as error:
            raise self._failure(error) from error
        self._swap = self._swapper.submit(self._finish, folder, config, keep)

    def wait(self) -> None:
        """Until the last checkpoint stands in its place. Raises OutputError, once, where it could not be written."""
        swap, self._swap = self._swap, None
        try:
            if swap is not None:
                swap.result()
        except WRITE_ERRORS as error:
            raise self._failure(error) from error

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._swapper.shutdown()
            # A failure that was told already would come again, as Orbax has it, in the place of our message.
            with contextlib.suppress(*WRITE_ERRORS):
                self._checkpointer.close()
            self._quiet.close()

    def _finish(self, folder: Path, config: dict[str, Any], keep: int) -> None:
        # Orbax' own callback runs before its folder has its final name.
        self._checkpointer.wait_until_finished()
        if is_first():
            finish_checkpoint(folder, config, keep)

    def _failure(self, error: Exception) -> OutputError:
        if is_first():
            remove_partial(self._folder)
        kept = "The checkpoint before it is kept" if self._folder.exists() else "There is no checkpoint before it"
        reason = why_not_written(error)
        return OutputError(f"{self._folder}: cannot be written ({reason}). Is the disk full or read-only? {kept}")


def checkpoint_bytes(state: TrainState) -> tuple[int, int]:
    """Bytes of the arrays in a checkpoint of the parameters alone, as `best`, and in one to resume from, as `last`."""
    best, optimizer = (
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(item))
        for item in (deployed_params(state), _optimizer_item(state))
    )
    return best, best + optimizer


def restore_state(
    folder: Path, abstract: TrainState, mesh: Mesh, strategy: Strategy = "ddp"
) -> tuple[TrainState, dict[str, Any]]:
    """State and data-iterator state of a checkpoint, placed on the devices of `mesh`, whatever it was written from.

    abstract: shapes and dtypes of the state of this run. Raises CheckpointError: no checkpoint, one without optimizer,
    a damaged one, or one whose parameters have other names or shapes (all of them listed).
    """
    path = find_checkpoint(folder)
    if not (path / OPTIMIZER_ITEM).is_dir():
        reason = "holds parameters alone, as best does, and last after mambahome clean"
        raise CheckpointError(f"{path} {reason}. Resume from RUN/checkpoints/last, or start with --use_pretrained")
    shardings = tree_sharding(abstract, mesh, strategy)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    items = {MODEL_ITEM: deployed_params(placed), OPTIMIZER_ITEM: _optimizer_item(placed)}
    _check_shapes(path, items)
    arguments = {
        name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        for name, item in items.items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path, ocp.args.Composite(**arguments, data=ocp.args.JsonRestore()))
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). The checkpoint is damaged, use another") from error
    optimizer, model = restored[OPTIMIZER_ITEM], restored[MODEL_ITEM]
    average = None if abstract.ema is None else model
    state = TrainState(optimizer["step"], optimizer.get("params", model), optimizer["state"], average)
    return state, restored[DATA_ITEM]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """The item "optimizer"; with the parameters that are trained, where those of the item "model" are others."""
    trained = {} if deployed_params(state) is state.params else {"params": state.params}
    return {"step": state.step, "state": state.opt_state} | trained


def _check_shapes(path: Path, items: Mapping[str, Any]) -> None:
    faults = []
    for name, item in items.items():
        try:
            metadata = ocp.PyTreeCheckpointHandler().metadata(path / name)
        except READ_ERRORS as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error}). Use another checkpoint") from error
        stored, expected = _shapes(metadata.tree), _shapes(item)
        faults += [f"{key} is missing" for key in expected if key not in stored]
        faults += [f"{key} is unknown" for key in stored if key not in expected]
        both = [key for key in expected if key in stored]
        faults += [f"{key} is {stored[key]}, expected {expected[key]}" for key in both if stored[key] != expected[key]]
    if faults:
        raise CheckpointError(f"{path} is of another configuration: " + "; ".join(faults))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape}; Orbax gives back the entries of lists, tuples and named tuples under text keys."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run with a checkpoint to resume."""
    return any((folder / "checkpoints" / name).is_dir() for name in ("last", sibling(Path("last"), PREVIOUS)))


def recorded_cases(config: Mapping[str, Any] | None) -> Contents:
    """The scans that a run was trained on by config.json of its last checkpoint, see `DataProperties`."""
    return tuple(map(tuple, (config or {}).get("data", {}).get("trained_on") or ()))


def checkpoint_settings(setup: Setup, before: Contents = ()) -> dict[str, Any]:
    """What config.json of every checkpoint says of its run, as JSON; before: scans that its weights began with."""
    scans = setup.properties.trained_on
    if before:
        scans = tuple(dict.fromkeys((*(scans or ((),)), *before)))
    settings = {
        "model": setup.model.replace(use_checkpoint=False).to_json(),
        "data": dataclasses.replace(setup.properties, trained_on=scans).to_json(),
        "cases": data_summary(setup.digests),
        "training": setup.settings(),
        "versions": versions(PACKAGES),
    }
    return jsonable(settings)


def require_same_run(folder: Path, setup: Setup, report: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the last checkpoint of a run, whose run.json is `report`, after making sure that it is of `setup`.

    Raises CheckpointError: another network. ConfigError: other settings or data.
    """
    settings, recorded = checkpoint_settings(setup), report.get("data", {}).get("digests", {})
    differences = partial(data_differences, now=settings, recorded=recorded, digests=setup.digests)
    return check_settings(folder / "checkpoints" / "last", settings, differences)


def check_settings(
    folder: Path, settings: Mapping[str, Any], differences: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
) -> dict[str, Any]:
    """Configuration of a checkpoint to resume, whose entries "model" and "training" have to be those of `settings`.

    differences: between the data of a configuration and those of today. Raises CheckpointError for another network,
    ConfigError for other data or settings; both list every field that differs.
    """
    config = read_checkpoint_config(folder)
    if changed := differences(config):
        advice = "Resume on the data that it began with, or start anew with --use_pretrained"
        raise ConfigError(f"{folder} was trained on other data: {'; '.join(changed)}. {advice}")
    for entry, error, advice in (
        ("model", CheckpointError, "Resume with the same network, or name another --output_dir"),
        ("training", ConfigError, "Resume with the same settings, or start anew with --use_pretrained"),
    ):
        now = settings[entry]
        before = {name: value for name, value in _NOT_YET.items() if name in now} | config.get(entry, {})
        now = now | {name: value for name, value in _NO_LONGER.items() if before.get(name) == value}
        if differ := _changes(before, now, sorted({*before, *now})):
            raise error(f"{folder} is of another configuration: {'; '.join(differ)}. {advice}")
    return config


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    different = [name for name in names if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)}, now {now.get(name)}" for name in different]


def data_summary(digests: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str | None]]:
    """For each part digests of its cases and, where all are known, of their voxels; ids cannot be read off it."""
    return {part: _summary(cases) for part, cases in digests.items()}


def _summary(cases: Mapping[str, str]) -> dict[str, str | None]:
    rows = [(case, *digest.split(":")) for case, digest in sorted(cases.items())]
    voxels = [(case, checksum) for case, _, checksum in rows]
    complete = all(checksum for _, checksum in voxels)
    return {"facts": json_digest([row[:2] for row in rows]), "voxels": json_digest(voxels) if complete else None}


def data_differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    recorded: Mapping[str, Mapping[str, str]],
    digests: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """How the data of a run that is resumed differ from those that it began with.

    before, now: config.json and what a checkpoint of today would say. recorded, digests: {part: {case: digest}} of
    run.json and of today. What an earlier version did not write is not compared.
    """
    properties = before.get("data", {})
    differ = _changes(properties, now["data"], [n for n in PROPERTIES if n in properties and n in now["data"]])
    for part, state in now["cases"].items():
        known = before.get("cases", {}).get(part, {})
        if any(value and known.get(key) and known[key] != value for key, value in state.items()):
            differ.append(_changed_cases(part, recorded.get(part, {}), digests[part]))
    return differ


def _changed_cases(part: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    lists = {
        "no longer there": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
        "with other voxels": [case for case in now if case in before and _differ(before[case], now[case])],
    }
    texts = [f"{what}: {listed(cases)}" for what, cases in lists.items() if cases and before]
    return f"cases to {_PARTS[part]} changed" + (f" ({'; '.join(texts)})" if texts else "")


def _differ(one: str, other: str) -> bool:
    (facts, voxels), (other_facts, other_voxels) = (text.split(":") for text in (one, other))
    return facts != other_facts or bool(voxels and other_voxels and voxels != other_voxels)
