"""Checkpoints of a training: everything that the next step depends on, written in the background, whole or not at all.

The folders are those of weights/checkpoint.py with two more items: "optimizer" (step, state of the optimizer, and the
parameters that are trained where the model is their moving average, or trained with auxiliary heads) and
"data" (state of the loader's iterator). Randomness needs none: its keys are made from the seed and the step.
"""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from mambahome_jax.config import BEFORE_THERE_WERE, GONE, PUBLISHED_GRID, Strategy
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError, why_not_written
from mambahome_jax.support.paths import local_path
from mambahome_jax.training.distributed import is_first
from mambahome_jax.training.sharding import tree_sharding
from mambahome_jax.training.step import TrainState, deployed_params
from mambahome_jax.weights.checkpoint import (
    MODEL_ITEM,
    PARTIAL,
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


class CheckpointWriter:
    """Writes checkpoints one after the other while training goes on. Has to be closed; a context manager does it."""

    def __init__(self) -> None:
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        self._checkpointer = ocp.AsyncCheckpointer(writing_handler(), async_options=WRITING)
        self._swapper = ThreadPoolExecutor(1)
        self._swap: Future | None = None
        self._folder = Path()

    def save(
        self,
        folder: Path,
        state: TrainState,
        config: dict[str, Any],
        data: Mapping[str, Any] | None = None,
        keep: int = 1,
    ) -> None:
        """Start to write a checkpoint in the place of `folder`, once the one before is done.

        When this returns, `state` is copied and may be donated. Without `data` (state of the iterator) the parameters
        alone are written. keep: checkpoints to keep, the earlier ones as step_<number> beside `folder`. With several
        processes all of them have to call it; each writes what it holds. Raises OutputError, also for the checkpoint
        before, if it failed since.
        """
        self.wait()
        folder = local_path(folder).absolute()
        items = {MODEL_ITEM: ocp.args.PyTreeSave(deployed_params(state))}
        arrays: list[Any] = [deployed_params(state)]
        if data is not None:
            beside = _beside_model(state)
            arrays.append(beside)
            items |= {OPTIMIZER_ITEM: ocp.args.PyTreeSave(beside), DATA_ITEM: ocp.args.JsonSave(dict(data))}
        partial = prepare_partial(folder) if is_first() else sibling(folder, PARTIAL)
        self._folder = folder
        try:
            if is_first():
                require_space(folder.parent, sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
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

    def close(self) -> None:
        """Wait, and end the threads."""
        try:
            self.wait()
        finally:
            self._swapper.shutdown()
            # A failure that was told already would come again, as Orbax has it, in the place of our message.
            with contextlib.suppress(*WRITE_ERRORS):
                self._checkpointer.close()
            self._quiet.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


def restore_state(
    folder: Path, abstract: TrainState, mesh: Mesh, strategy: Strategy = "ddp"
) -> tuple[TrainState, dict[str, Any]]:
    """State and data-iterator state of a checkpoint, placed on the devices of `mesh`, whatever it was written from.

    Args:
        abstract: shapes and dtypes, as `jax.eval_shape` gives them for the state of this run.

    Raises CheckpointError: no checkpoint, one without optimizer, a damaged one, or one whose parameters have other
    names or shapes (all of them listed).
    """
    path = find_checkpoint(folder)
    if not (path / OPTIMIZER_ITEM).is_dir():
        raise CheckpointError(f"{path} holds parameters alone. Resume from RUN/checkpoints/last, or use_pretrained")
    shardings = tree_sharding(abstract, mesh, strategy)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    items = {MODEL_ITEM: deployed_params(placed), OPTIMIZER_ITEM: _beside_model(placed)}
    _check_shapes(path, items)
    arguments = {
        name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        for name, item in items.items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(path, ocp.args.Composite(**arguments, data=ocp.args.JsonRestore()))
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). The checkpoint is damaged, use another") from error
    optimizer = found[OPTIMIZER_ITEM]
    params = optimizer.get("params", found[MODEL_ITEM])
    average = None if abstract.ema is None else found[MODEL_ITEM]
    return TrainState(optimizer["step"], params, optimizer["state"], average), found[DATA_ITEM]


def _beside_model(state: TrainState) -> dict[str, Any]:
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
        found, expected = _shapes(metadata.tree), _shapes(item)
        faults += [f"{key} is missing" for key in expected if key not in found]
        faults += [f"{key} is unknown" for key in found if key not in expected]
        faults += [
            f"{key} is {found[key]}, expected {expected[key]}"
            for key in expected
            if key in found and found[key] != expected[key]
        ]
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


def check_settings(
    folder: Path,
    settings: Mapping[str, Any],
    data_differences: Callable[[Mapping[str, Any]], list[str]] | None = None,
) -> dict[str, Any]:
    """Configuration of a checkpoint to resume, after making sure that it was written by a run like this one.

    Args:
        settings: {"model": {...}, "training": {...}}, JSON values; these entries have to agree, others may differ.
        data_differences: what differs between the data that a configuration was written of and those of today.

    Raises CheckpointError for another network, ConfigError for other data or settings that change the result; both list
    every field that differs.
    """
    config = read_checkpoint_config(folder)
    changed = data_differences(config) if data_differences else []
    if changed:
        advice = "Resume on the data that it began with, or start anew with --use_pretrained"
        raise ConfigError(f"{folder} was trained on other data: {'; '.join(changed)}. {advice}")
    for entry, error, advice in (
        ("model", CheckpointError, "Resume with the same network, or name another --output_dir"),
        ("training", ConfigError, "Resume with the same settings, or start anew with --use_pretrained"),
    ):
        now = settings[entry]
        older = BEFORE_THERE_WERE | PUBLISHED_GRID
        before = {name: value for name, value in older.items() if name in now} | config.get(entry, {})
        differ = [
            f"{name} was {before.get(name)}, now {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name, GONE.get(name))
        ]
        if differ:
            raise error(f"{folder} is of another configuration: {'; '.join(differ)}. {advice}")
    return config
