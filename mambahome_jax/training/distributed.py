"""Several devices, and several processes on one host or many: what lies where, how they start, agree and stop.

Each process runs the same program on its own devices; JAX joins them through a service in the first one. What every
process has to decide alike (whether to resume, when to stop) is gathered from all of them first.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mambahome_jax.config import Strategy
from mambahome_jax.errors import ConfigError, MambaHomeError, TrainingError

# A process that has not been heard of for so long is dead, and ends the others; JAX's own default is 100.
HEARTBEAT_SECONDS = 30
# Queues let the processes of one job start minutes apart.
START_SECONDS = 600
AXIS = "data"
# Below this number of elements the messages of splitting an array cost more than its memory. The optimizer joins arrays
# below it.
SMALLEST_SPLIT = 2**17


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """One axis of all devices: batches are split over it, parameters are copied (ddp) or split (fsdp)."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def tree_sharding(tree: Any, mesh: Mesh, strategy: Strategy) -> Any:
    """Sharding of every array of a tree: all copied (ddp), or split along the largest axis that divides (fsdp)."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh.size, strategy)), tree)


def _spec(shape: tuple[int, ...], devices: int, strategy: Strategy) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if strategy == "ddp" or np.prod(shape, dtype=np.int64) < SMALLEST_SPLIT or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == largest else None for axis in range(len(shape))))


def device_put_tree(tree: Any, shardings: Any) -> Any:
    """Place host values (identical in every process) on devices according to `shardings`."""

    def put(value: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def own_device(devices: Sequence[jax.Device]) -> jax.Device:
    """The first device of this process."""
    return next(device for device in devices if device.process_index == jax.process_index())


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Make arrays on a CPU: the small programs that this takes are compiled in less time than those of a GPU."""
    with contextlib.suppress(RuntimeError):  # the user may have left JAX its GPU alone
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    return contextlib.nullcontext()


def copy_to(tree: Any, device: jax.Device) -> Any:
    """Whole arrays on one device of this process; with several processes all of them have to call it."""
    sharding = jax.tree.leaves(tree)[0].sharding
    if sharding.is_fully_addressable:
        whole = jax.device_put(tree, device)
    else:
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(sharding.mesh))(tree)
    # The data of a shard: device_put keeps the mesh in an array's type, so that programs would be compiled anew for it.
    return jax.tree.map(lambda x: next(shard.data for shard in x.addressable_shards if shard.device == device), whole)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Start the transfer of this process' share of a batch; the first axes of all processes together are the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


FINISHING = "finishing this step and writing a checkpoint (a compilation ends first)"


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Join the other processes of this job, if it has any, before anything else asks for devices.

    Without arguments (host:port of process 0, number, own id from 0) they come from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from SLURM (a step of several tasks, one a device) or Open MPI.
    Raises ConfigError: some of the three are missing or impossible, or the others do not answer.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _whole(num_processes, environment, "JAX_NUM_PROCESSES"),
        "process_id": _whole(process_id, environment, "JAX_PROCESS_ID"),
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not missing:
        given["cluster_detection_method"] = "deactivate"
        count, index = given["num_processes"], given["process_id"]
        if not 0 <= index < count or ":" not in given["coordinator_address"]:
            raise ConfigError(
                f"--coordinator_address {given['coordinator_address']} --num_processes {count} --process_id {index}; "
                "expected host:port, and an id from 0 that is below the number of processes"
            )
        if count == 1:
            return
    elif len(missing) < 3:
        expected = "--coordinator_address, --num_processes and --process_id, or none of them under SLURM or Open MPI"
        raise ConfigError(f"{', '.join(missing)} missing; expected {expected}")
    elif not launched_as_several(environment):
        return
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes of this job could not be joined: {error}") from error


def launched_as_several(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started this process as one of several, in the variables that JAX reads too."""
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    mpi = "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    return slurm or mpi


def _whole(value: int | None, environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ConfigError(f"{name}={text}; expected a whole number")
    return int(text)


def is_first() -> bool:
    """Whether this process writes the files and talks to the person."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Every process' `value` (JSON), in the order of the processes; all of them have to call it."""
    if jax.process_count() == 1:
        return [value]
    # As bytes: arrays of float64 would come back as float32.
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def require_same(what: str, value: Any) -> None:
    """Raise ConfigError, in every process, where the processes differ in `value`."""
    values = gather(value)
    if any(other != values[0] for other in values):
        raise ConfigError(
            f"{what} differs between the processes. Start all of them with the same flags, and with a --data_train and "
            "an --output_dir that every host sees"
        )


@contextlib.contextmanager
def exit_all_processes_on_error() -> Iterator[None]:
    """End one of several processes at once on an error; a regular exit would wait for the others, and they for it.

    The exit code is 2 for what the user can correct, 130 for an interrupt, else 1; one process alone just raises.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        # The barrier is that of a checkpoint, which all processes write together.
        lost = isinstance(error, jax.errors.JaxRuntimeError) or "barrier" in str(error)
        process = f"process {jax.process_index()} of {jax.process_count()}"
        if lost:
            advice = "another process may have died, look at its last messages"
            print(f"Error ({process}): {error}\n{advice}. The same command with --resume continues", file=sys.stderr)
        elif isinstance(error, MambaHomeError):
            print(f"Error ({process}): {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        users = isinstance(error, MambaHomeError) and not isinstance(error, TrainingError) and not lost
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2 if users else 1)


class Votes:
    """The largest number that any process voted for in a step, without waiting for a device: counted a step later."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pending: jax.Array | None = None
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def cast(self, number: int) -> int:
        """Vote; return the result of the vote before this one, 0 for the first."""
        before, self._pending = self._pending, self._start(number)
        return 0 if before is None else int(before)

    def settle(self, number: int) -> int:
        """Vote and wait for the result; nothing is pending afterwards."""
        self._pending = None
        return int(self._start(number))

    def _start(self, number: int) -> jax.Array:
        sharding = batch_sharding(self._mesh)
        votes = np.full(len(sharding.addressable_devices), number, np.int32)
        return self._largest(jax.make_array_from_process_local_data(sharding, votes))


class StopOnSignal(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT, so that the step is finished and a checkpoint written; the second SIGINT interrupts.

    Several processes stop after the same step, whichever of them was asked to: each step they vote.
    """

    def __init__(self, say: Callable[[str], None], mesh: Mesh, what: str = FINISHING):
        self.received: int | None = None
        self._decided: int | None = None
        self._votes = Votes(mesh) if jax.process_count() > 1 else None
        self._say, self._what = say, what
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noticed(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def requested(self) -> int | None:
        """The signal to stop for, None for none: the same answer in every process."""
        return self.received if self._votes is None else self._decided

    def agree(self, at_once: bool = False) -> None:
        """Take part in a vote; without `at_once` its result counts from the next one on, when it is there anyway."""
        if self._votes is not None and self._decided is None:
            vote = self._votes.settle if at_once else self._votes.cast
            self._decided = vote(self.received or 0) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        self._say(f"{name}: {self._what}")
