"""A model in one file, as `mambahome export` writes it: compiled and run without flax, our networks or our kernels.

    model.mh, a zip archive: manifest.json  program_0.cpu  program_0.cuda  ...  weights_0.npz  ...

A program (`jax.export`) takes parameters and windows, so that the weights are in the file once, and networks of one
configuration share it. The manifest holds configuration and `DataProperties` of each network.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.export
import numpy as np

from mambahome_jax.config import DataProperties, NetworkConfig, Platform, Precision, Triple, network_from_json, spaced
from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.forms import among, converted, entries, text
from mambahome_jax.support.devices import compiler_options
from mambahome_jax.support.files import NPZ_ERRORS, parse_json

SUFFIX, MANIFEST, FORMAT = ".mh", "manifest.json", 1
# What JAX calls the platform of a device -> what it calls that of a program.
PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
# What zipfile, numpy, the manifest's readers and jax.export raise for damaged files.
_READ_ERRORS = (*NPZ_ERRORS, AttributeError, LookupError, AssertionError, ConfigError)
_ACTION = "Export the model again"


class Program(NamedTuple):
    """What one platform runs: `jax.export`'s bytes, and what is said of it."""

    serialized: bytes
    precision: Precision
    scan: str


@dataclass(frozen=True, eq=False)
class Programs:
    """A network without its weights, for windows of one size; compiled when it is first called.

    by_platform: platform -> its program.
    """

    source: Path
    window: Triple
    by_platform: Mapping[Platform, Program]
    _loaded: dict[Platform, jax.export.Exported] = field(default_factory=dict)
    _compiled: dict[str, Any] = field(default_factory=dict)

    def of(self, platform: str) -> tuple[Platform, Program]:
        """The program of a device's platform, and that platform's name here. Raises CheckpointError: none."""
        name = PLATFORMS.get(platform)
        if name is None or name not in self.by_platform:
            held, action = ", ".join(self.by_platform), f"Export the model again with --platforms {name or platform}"
            raise CheckpointError(f"{self.source}: programs for {held}; expected one for {platform}. {action}")
        return name, self.by_platform[name]

    def exported(self, platform: str) -> jax.export.Exported:
        """The program of a device's platform. Raises CheckpointError: none, or one that this JAX cannot read."""
        name, program = self.of(platform)
        if name not in self._loaded:
            try:
                self._loaded[name] = jax.export.deserialize(bytearray(program.serialized))
            except _READ_ERRORS as error:
                found = f"its program for {name} cannot be read by JAX {jax.__version__} ({error or type(error)})"
                raise CheckpointError(f"{self.source}: {found}. {_ACTION} with this JAX") from error
        return self._loaded[name]

    def call(self, params: Mapping[str, jax.Array], windows: jax.Array, platform: str) -> jax.Array:
        """Logits (n, *window, classes) of windows (n, *window, in)."""
        exported = self.exported(platform)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, windows))):
            return exported.call(params, windows)  # a part of what the caller compiles
        if platform not in self._compiled:
            self._compiled[platform] = jax.jit(exported.call, compiler_options=compiler_options())
        return self._compiled[platform](params, windows)


@dataclass(frozen=True, eq=False)
class ExportedNetwork:
    """A network of an exported model: (batch, *window, in) float32 -> logits (batch, *window, classes) float32.

    metadata: what it was trained on, None where it does not say. published: whether it was bare weights, for the
    published way of scans. digest: as `digest_of` the network itself. params: by their dotted paths, on the host.
    """

    config: NetworkConfig
    metadata: DataProperties | None
    published: bool
    digest: str
    programs: Programs
    params: Mapping[str, np.ndarray]
    _placed: dict[jax.Device | None, dict[str, jax.Array]] = field(default_factory=dict)

    @property
    def window(self) -> Triple:
        """Size in voxels of the windows that it takes."""
        return self.programs.window

    def check_window(self, size: Triple) -> None:
        """Raise ConfigError for windows of another size."""
        if tuple(size) != self.window:
            found = f"{self.programs.source}: windows of {spaced(size)} voxels; expected {spaced(self.window)}"
            raise ConfigError(f"{found}, which is fixed. Leave --roi_size out, or export the model again with it")

    def on(self, device: jax.Device | None) -> Callable[[jax.Array], jax.Array]:
        """The network on a device; None: the default one. Raises CheckpointError: no program for its platform."""
        platform = jax.default_backend() if device is None else device.platform
        self.programs.of(platform)
        if device not in self._placed:
            self._placed[device] = jax.device_put(dict(self.params), device)
        return lambda windows: self.programs.call(self._placed[device], windows, platform)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, *window, in) -> logits (batch, *window, classes). Raises ConfigError: another shape."""
        if x.ndim != 5 or x.shape[-1] != self.config.in_chans:
            expected = f"(batch, {', '.join(map(str, self.window))}, {self.config.in_chans})"
            raise ConfigError(f"the input has shape {x.shape}; expected {expected}")
        _, *size, _ = x.shape
        self.check_window((size[0], size[1], size[2]))
        return self.on(None)(x.astype(np.float32))


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """What is in an exported file: one network, or several that vote."""

    networks: tuple[ExportedNetwork, ...]

    @property
    def config(self) -> NetworkConfig:
        """Shape of its networks."""
        return self.networks[0].config

    @property
    def metadata(self) -> DataProperties | None:
        """What its networks were trained on; None where they do not say."""
        return self.networks[0].metadata

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, *window, in) -> logits (batch, *window, classes) of the only network.

        Raises ConfigError: another shape, or several networks, whose vote `segment` takes.
        """
        if len(self.networks) > 1:
            action = "Give it to segment, or call one of its networks"
            raise ConfigError(f"{self.networks[0].programs.source}: {len(self.networks)} networks that vote. {action}")
        return self.networks[0](x)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what an exported file says of itself. Raises CheckpointError: no such file, another kind, damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            return _manifest(archive)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error


def read_exported(path: Path, precision: Precision | None = None) -> ExportedModel:
    """Read a file of `mambahome export`.

    Raises CheckpointError: damaged, or no program for the default device. ConfigError: a precision that it has not.
    """
    manifest = read_manifest(path)
    try:
        window = entries(int, 3)(manifest["window"])
        with zipfile.ZipFile(path) as archive:
            programs = [
                Programs(path, (window[0], window[1], window[2]), _programs(archive, each))
                for each in manifest["programs"]
            ]
            networks = tuple(_network(archive, programs, each) for each in manifest["networks"])
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    if not networks:
        raise CheckpointError(f"{path}: no networks inside. {_ACTION}")
    for network in networks:
        name, program = network.programs.of(jax.default_backend())
        if precision is not None and precision != program.precision:
            action = f"Leave --precision out, or export the model again with --precision {precision}"
            raise ConfigError(f"{path}: its program for {name} computes in {program.precision}. {action}")
        _require_fitting(network)
    return ExportedModel(networks)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    expected = "expected a file of mambahome export"
    return CheckpointError(f"{path}: cannot be read ({error or type(error).__name__}); {expected}. {_ACTION}")


def _manifest(archive: zipfile.ZipFile) -> dict[str, Any]:
    manifest = parse_json(archive.read(MANIFEST))
    if manifest["format"] != FORMAT:
        raise ConfigError(f"format {manifest['format']}, and this version reads {FORMAT}")
    keep = converted("keep_largest", manifest["keep_largest"], entries(text), "names of structures")
    return manifest | {"keep_largest": keep}


def _programs(archive: zipfile.ZipFile, values: Mapping[str, Any]) -> dict[Platform, Program]:
    numbers = among(get_args(Precision))
    return {
        among(get_args(Platform))(name): Program(
            archive.read(text(each["file"])), numbers(each["precision"]), text(each["scan"])
        )
        for name, each in values.items()
    }


def _network(archive: zipfile.ZipFile, programs: list[Programs], values: Mapping[str, Any]) -> ExportedNetwork:
    data = values["data"]
    with archive.open(text(values["weights"])) as file, np.load(file, allow_pickle=False) as arrays:
        params = {name: arrays[name] for name in arrays.files}
    return ExportedNetwork(
        network_from_json(values["model"]),
        None if data is None else DataProperties.from_json(data),
        among((False, True))(values["published"]),
        text(values["digest"]),
        programs[values["program"]],
        params,
    )


def _require_fitting(network: ExportedNetwork) -> None:
    """Raise CheckpointError where the weights are not those that the program takes."""
    exported = network.programs.exported(jax.default_backend())
    try:
        (shapes, windows), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        expected = {name: (aval.shape, aval.dtype) for name, aval in shapes.items()}
        size = tuple(windows.shape[1:])
    except _READ_ERRORS as error:
        raise _damaged(network.programs.source, error) from error
    found = {name: (array.shape, array.dtype) for name, array in network.params.items()}
    if found != expected or size != (*network.window, network.config.in_chans):
        action = f"The file is damaged. {_ACTION}"
        raise CheckpointError(f"{network.programs.source}: weights that are not those of its program. {action}")
