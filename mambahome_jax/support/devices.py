"""Devices: which ones work, how XLA compiles for them, where programs are kept, what reports say. Imports jax late."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambahome_jax.config import Precision
from mambahome_jax.errors import ConfigError
from mambahome_jax.support.processes import in_thread

if TYPE_CHECKING:
    import jax

_OPTIONS: dict[str, dict[str, str | bool]] = {
    # YNNPACK takes three to four times as long as Eigen for the gradients of convolutions (JAX 0.10.2). Beyond the
    # first level of optimisation, compiling takes a fifth longer and steps are no faster.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "", "xla_backend_optimization_level": "1"},
    # XLA leaves 3-D convolutions channels-first, and cuDNN then transposes before and after each of them. Triton's
    # matrix products gain little over cuBLAS' here and take much of the time to compile, as does comparing the results
    # of all algorithms, which the levels 3 and 4 of autotuning add.
    "gpu": {"xla_gpu_force_conv_nhwc": True, "xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "2"},
}

# The scheduler that hides the time of collectives takes memory for it: two GPUs with split parameters took 12.8 GiB and
# 118.5 ms a step with it, 7.9 GiB and 120.4 ms without (docs/experiments/speed.md).
_LESS_MEMORY: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": False}}

# The libraries of CUDA of which XLA needs the most while it compiles, the first one first.
_MUCH_READ = ("xla_cuda_plugin", "libcublas", "libcudnn", "libnvrtc", "libnvJitLink")
_CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# The part of a GPU's memory that JAX takes, unless one of the variables names another.
JAX_SHARE = 0.75
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@functools.cache
def compiler_options(less_memory: bool = False) -> dict[str, str | bool]:
    """Return the `compiler_options` of jax.jit on the default backend that this jaxlib knows and XLA_FLAGS leaves open.

    less_memory: at the cost of some time, on several devices.
    """
    import jax

    def known(options: dict[str, str | bool]) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    backend = jax.default_backend()
    wanted = _OPTIONS.get(backend, {}) | (_LESS_MEMORY.get(backend, {}) if less_memory else {})
    users = {flag.lstrip("-").split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    wanted = {name: value for name, value in wanted.items() if name not in users}
    # All at once first, as each question is a program to compile.
    if not wanted or known(wanted):
        return wanted
    return {name: value for name, value in wanted.items() if known({name: value})}


@functools.cache
def begin_devices() -> Future[None]:
    """Start the devices in a thread, and read CUDA's libraries ahead: XLA finds them in memory when it compiles.

    On a machine that has just been started they come from its disk, a page at a time, while the GPU waits.
    """

    def read() -> None:
        buffer = bytearray(1 << 23)
        for path in cuda_libraries():
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def begin() -> None:
        import jax

        if jax.default_backend() == "gpu":
            threading.Thread(target=read, daemon=True).start()  # for which the end of the program does not wait

    return in_thread(begin)


def cuda_libraries(maps: Path = Path("/proc/self/maps")) -> list[Path]:
    """The files of CUDA's libraries in this process, and those that cuDNN opens later; empty where no file `maps`
    tells."""
    try:
        lines = maps.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    mapped = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    later = {path for file in mapped if file.name.startswith("libcudnn") for path in file.parent.glob("libcudnn*.so*")}
    files = {path.resolve() for path in mapped | later if path.name.startswith(_MUCH_READ)}
    return sorted(files, key=lambda file: [not file.name.startswith(name) for name in _MUCH_READ])


def default_precision(platform: str | None = None) -> Precision:
    """Return bf16 on a GPU, fp32 elsewhere. platform: of JAX's names; None: the default one."""
    import jax

    return "bf16" if (platform or jax.default_backend()) == "gpu" else "fp32"


def gpu_memory_gib() -> float | None:
    """Return the memory of the smallest GPU in GiB, None without one that JAX has its plugin for. Starts no JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (
        platforms.startswith("cpu")
        or visible in ("", "-1")
        or not any(next(iter(importlib.metadata.distributions(name=plugin)), None) for plugin in _CUDA_PLUGINS)
    ):
        return None
    return min(_nvidia_smi("memory.total"), default=None)


def _nvidia_smi(column: str, *options: str) -> list[float]:
    """Ask the driver for a column in MiB and return it in GiB, one entry a GPU; empty where it does not answer."""
    query = ["nvidia-smi", f"--query-gpu={column}", "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=True)
        return [float(line) / 1024 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def visible_gpus() -> list[str]:
    """Return the GPUs of this process by the names that CUDA_VISIBLE_DEVICES takes. Starts no JAX."""
    if gpu_memory_gib() is None:
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(len(_nvidia_smi("memory.total")))]


def jax_share() -> float:
    """Return the part of a GPU's memory that JAX may take in this environment."""
    named = next((os.environ[name] for name in SHARE_VARIABLES if os.environ.get(name)), "")
    try:
        return min(float(named), 1.0) if named else JAX_SHARE
    except ValueError:
        return JAX_SHARE  # JAX itself refuses such a value when it starts


def free_device_bytes(device: "jax.Device") -> int | None:
    """Return what can still be allocated on a device of this process, None where it does not tell (CPUs).

    JAX's limit counts, and what other programs leave of the card beyond what JAX holds already.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    growth = stats["bytes_limit"] - stats.get("pool_bytes", stats["bytes_limit"])
    if growth > 0:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = device.local_hardware_id or 0
        name = visible[number] if number < len(visible) else str(number)
        for card in _nvidia_smi("memory.free", f"--id={name}"):
            free -= max(growth - int(card * 2**30), 0)
    return max(free, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left for what it was asked to do; errors of full disks have the same word."""
    import jax

    # A CPU says the second, in an INTERNAL error.
    texts = ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(text in str(error) for text in texts)


def choose_devices(parallel: bool = True, num_devices: int | None = None) -> "list[jax.Device]":
    """Return the devices to work on, process by process: all accelerators or one CPU of each, unless a number is given.

    num_devices: of each process. Raises ConfigError.
    """
    import jax

    local = jax.local_devices()
    count = num_devices if num_devices is not None else 1 if local[0].platform == "cpu" else len(local)
    if not 1 <= count <= len(local):
        raise ConfigError(f"--num_devices {count}: this machine has {len(local)} {local[0].platform} devices")
    processes = jax.process_count()
    if processes == 1:
        return local[: count if parallel else 1]
    if not parallel:
        raise ConfigError(f"--parallel False, but there are {processes} processes; expected one")
    shares = [[device for device in jax.devices() if device.process_index == n][:count] for n in range(processes)]
    if any(len(share) != count for share in shares):
        found = ", ".join(str(len(share)) for share in shares)
        raise ConfigError(f"the processes have {found} devices; expected as many in each. Use --num_devices")
    return [device for share in shares for device in share]


def program_cache() -> Path | None:
    """Return the folder of compiled programs in the user's cache, made where it is missing; None where there is none.

    A relative XDG_CACHE_HOME does not count, as its specification says.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
        # A home that does not exist, as /nonexistent of a service, is not made; of an empty one Path makes "/".
        if not cache.parent.is_dir() or (not named and os.environ.get("HOME") == ""):
            return None
        folder = cache / "mambahome" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        # RuntimeError: neither HOME nor an entry in passwd.
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def keep_programs() -> str:
    """Have JAX keep what this process compiles, in `program_cache`, unless the user named a folder or turned that off.

    Returns the folder of kept programs, "" where they are not kept. Imports jax.
    """
    import jax

    named = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not named and "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := program_cache()):
        named = str(folder)
        jax.config.update("jax_compilation_cache_dir", named)
    return named if named and jax.config.jax_enable_compilation_cache else ""  # type: ignore[attr-defined]


def device_line() -> str:
    """Return how many devices there are, and of what kind."""
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of packages; "not installed" where one runs from its sources alone."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


@functools.cache
def _version(name: str) -> str:
    """Looked up once: every checkpoint tells it, and a look reads and parses the package's metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_versions() -> None:
    """Print what a report of a fault needs: Python, the system, the packages, the devices, where programs are kept."""
    print(f"system: {platform.platform()}")
    for name, number in versions(("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")).items():
        print(f"{name} {number}")
    print(f"devices: {device_line()}")
    print(f"compiled programs: {program_cache() or 'not kept'}")


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """{"commit", "changed": files that differ from it} of the checkout of this code, or `folder`; None without one."""
    folder = folder or Path(__file__).parents[1]
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, encoding="utf-8", check=True, timeout=10
            ).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}
