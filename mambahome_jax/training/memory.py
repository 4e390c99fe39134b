"""Memory of a training step: XLA's account of the compiled one, what devices offer, and which sizes fit instead."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mambahome_jax.config import ModelConfig, Triple, UNetConfig, beyond_one_voxel, multiples_of, nearest_multiples
from mambahome_jax.errors import ConfigError, MambaHomeError, TrainingError
from mambahome_jax.preprocessing.grids import grids_for
from mambahome_jax.preprocessing.step_memory import step_gib
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.devices import free_device_bytes, is_out_of_memory
from mambahome_jax.training.distributed import gather
from mambahome_jax.training.progress import device_memory
from mambahome_jax.training.setup import Setup, own_voxel_size
from mambahome_jax.training.step import TrainState, TrainStep
from mambahome_jax.weights.checkpoint import read_checkpoint_config

# Of what a device offers: the rest is for batches on their way and for what is lost between arrays.
FILLED = 0.95
GIB = 2**30
SIZES = ("patch_size", "batch_size")  # flags that say how large a step is


class StepMemory(NamedTuple):
    """Bytes on each device, all processes alike.

    needed: by the compiled step in all. state: what of that no patch changes. offered: what the fullest device has for
    the step, None where devices do not tell (CPUs).
    """

    needed: int
    state: int
    offered: int | None = None

    @property
    def share(self) -> float:
        """The part of the patches that fits, by what the step needs beyond its state; above 1 where there is room."""
        if self.offered is None:
            return math.inf
        return max(FILLED * self.offered - self.state, 0) / max(self.needed - self.state, 1)

    def __str__(self) -> str:
        takes = f"takes {_gib(self.needed)} GiB on each device by XLA's account"
        return takes if self.offered is None else f"{takes}, of {_gib(self.offered)} GiB that are free"


class DeviceMemoryError(MambaHomeError):
    """A training step that does not fit on a device; memory: of the compiled step, None where the running one told."""

    def __init__(self, message: str, memory: StepMemory | None = None) -> None:
        super().__init__(message)
        self.memory = memory


def program_bytes(compiled: Any) -> int | None:
    """What a compiled function takes on each device, arguments and results included; None where XLA does not say."""
    try:
        account = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError:
        return None  # not every backend tells of a program that comes from the cache
    if not account:
        return None
    results = account.output_size_in_bytes - account.alias_size_in_bytes
    return account.temp_size_in_bytes + account.argument_size_in_bytes + results


def step_memory(train_step: TrainStep, state: TrainState, mesh: Mesh) -> StepMemory | None:
    """Ask XLA what a compiled step takes, and the devices what they have for it; None where XLA does not say.

    state: on its devices already. All processes call it, and get the same.
    """
    compiled = train_step.func if isinstance(train_step, partial) else train_step
    held = {device: 0 for device in mesh.local_devices}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    free = {device: free_device_bytes(device) for device in held}
    offered = [held[device] + count for device, count in free.items() if count is not None]
    mine = {
        "needed": program_bytes(compiled) or 0,
        "state": max(held.values()),
        "offered": min(offered, default=None),
    }
    shares = gather(mine)
    needed, kept = (max(share[name] for share in shares) for name in ("needed", "state"))
    offers = [share["offered"] for share in shares if share["offered"] is not None]
    return StepMemory(needed, kept, min(offers, default=None)) if needed else None


@contextmanager
def device_memory_errors(saved: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise DeviceMemoryError where a device has no memory left. Other faults of the device stay as they are.

    saved: whether the run has written a checkpoint; then it is a TrainingError, as nothing begins anew.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if saved():
            action = "Free some of it, and continue with --resume"
            raise TrainingError(f"a device ran out of memory; the checkpoints before are kept. {action}") from error
        raise DeviceMemoryError("a device ran out of memory in training") from error


def require_fit(memory: StepMemory | None, setup: Setup) -> None:
    """Raise DeviceMemoryError where a step needs more than the fullest device offers."""
    if memory is not None and memory.share < 1:
        raise DeviceMemoryError(f"a step of {sizes_text(setup)} {memory}", memory)


def sizes_text(setup: Setup) -> str:
    """Say how many patches of which size a step has on each device."""
    batch, patch = setup.flags.batch_size, " x ".join(map(str, setup.patch_size))
    return f"{batch} patch{'es' * (batch != 1)} of {patch}"


def smaller_sizes(
    setup: Setup, error: DeviceMemoryError, fixed: Collection[str], resumed: bool = False
) -> dict[str, Any]:
    """The flags of SIZES of the largest batch, then the largest patch, that should fit after `error`.

    fixed: flags that the user gave, which stay. Raises ConfigError: nothing can be smaller, and what would fit.
    """
    if resumed:
        raise ConfigError(f"{error}. A run keeps the sizes that it began with: resume it where more memory is free")
    if error.memory is None and jax.process_count() > 1:
        raise ConfigError(f"{error}, which one process cannot change alone. Use a smaller --batch_size or --patch_size")
    given = {name: getattr(setup.flags, name) for name in SIZES if name in fixed}
    sizes, fitting = _sizes_for(setup, error.memory, fixed), _sizes_for(setup, error.memory, ())
    if sizes is None and given and fitting:
        raise ConfigError(f"{_as_flags(given)}: {error}; expected {_as_flags(fitting)}, or less")
    if sizes is None:
        raise ConfigError(f"{error}. Use a smaller --model, --use_checkpoint, or a device with more free memory")
    return sizes


def _sizes_for(setup: Setup, memory: StepMemory | None, fixed: Collection[str]) -> dict[str, Any] | None:
    """As `smaller_sizes`, None where there are none. memory: None halves the patches.

    A batch that was given stays, and so does its patch.
    """
    batch = setup.flags.batch_size
    patches = batch * (0.5 if memory is None else min(memory.share, 1))
    if "batch_size" in fixed:
        return None
    if batch > 1 and (patches >= 1 or "patch_size" in fixed):
        return {"batch_size": max(min(int(patches), batch - 1), 1)}
    if "patch_size" in fixed:
        return None
    patch = smaller_patch(setup, math.prod(setup.patch_size) * patches)
    return {"patch_size": patch, "batch_size": 1} if patch else None


def recorded_sizes(run: Path, setup: Setup, fixed: Collection[str]) -> dict[str, Any]:
    """The flags of SIZES and the mixer that a run began with, by its last checkpoint, where `setup` has others.

    fixed: flags that the user gave, which stay. Raises CheckpointError.
    """
    config = read_checkpoint_config(run / "checkpoints" / "last")
    recorded, mixer = config.get("training", {}), config.get("model", {}).get("mixer", ModelConfig.mixer)
    devices = setup.global_batch // setup.flags.batch_size
    batch, rest = divmod(recorded.get("global_batch", setup.global_batch), devices)
    patch = tuple(recorded.get("patch_size", setup.patch_size))
    found = {"patch_size": patch} if patch != setup.patch_size else {}
    found |= {"batch_size": batch} if batch != setup.flags.batch_size and not rest else {}
    found |= {"mixer": mixer} if mixer != getattr(setup.model, "mixer", mixer) else {}
    return {name: value for name, value in found.items() if name not in fixed}


def smaller_patch(setup: Setup, voxels: float) -> Triple | None:
    """The patch of the setup with its axes shortened in turn to at most so many voxels, None where it cannot be."""
    multiples, size = setup.model.multiples, list(setup.patch_size)
    spacing, unet = own_voxel_size(setup.prepared), isinstance(setup.model, UNetConfig)
    auto = unet or setup.flags.strides != "published"
    while True:
        axis = max(range(3), key=lambda a: size[a] / multiples[a])
        if size[axis] <= multiples[axis]:
            return None
        size[axis] -= multiples[axis]
        # A shorter patch may have other strides, for which it has to be whole too.
        own = multiples_of(grids_for(spacing, size, unet).strides) if auto else multiples
        patch = beyond_one_voxel(nearest_multiples(size, own), own)
        if math.prod(patch) <= voxels and patch == tuple(size):
            return patch


def memory_entry(setup: Setup, memory: StepMemory | None, devices: Sequence[jax.Device]) -> dict[str, float | None]:
    """What run.json says of memory, GiB on each device: as planned, by XLA, offered, and the most that was in use."""
    measured = device_memory(devices)
    patch, batch = setup.patch_size, setup.flags.batch_size
    on_gpu = devices[0].platform == "gpu"
    in_bytes = {
        "planned_gib": step_gib(setup.model, patch, batch, setup.precision) * GIB if on_gpu else None,
        "xla_gib": memory.needed if memory else None,
        "offered_gib": memory.offered if memory else None,
        "peak_gib": measured[0] if measured else None,
    }
    return {name: None if count is None else round(count / GIB, 3) for name, count in in_bytes.items()}


def _gib(count: int) -> str:
    return f"{count / GIB:.3g}"


def _as_flags(values: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {as_typed(value)}" for name, value in values.items())
