"""export without a console: a model as one file for deployment, see `exported.py`."""

import contextlib
import dataclasses
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from mambahome_kernels.backends import exporting
from mambahome_kernels.selective_scan.api import BACKENDS

from mambahome_jax.config import PUBLISHED_ROI, DataProperties, NetworkConfig, Platform, Precision, Triple
from mambahome_jax.errors import ConfigError, OutputError
from mambahome_jax.flags import ExportConfig, InferConfig
from mambahome_jax.support.console import Say, Track, shown, silent, untracked
from mambahome_jax.support.devices import default_precision
from mambahome_jax.support.files import atomic_write
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.version import __version__
from mambahome_jax.weights.exported import FORMAT, MANIFEST, PLATFORMS, SUFFIX, Program
from mambahome_jax.weights.model_path import learned_largest, networks_at
from mambahome_jax.weights.weights import Weights, assembled, build_model, digest_of, parameter_shapes, read_weights

if TYPE_CHECKING:
    from mambahome_jax.keywords import ExportFlags


@dataclass(frozen=True)
class Exported:
    """What was exported. networks: how many vote. scans: platform -> precision and what computes Mamba's scan there.

    notes: on what the source lacks.
    """

    path: Path
    window: Triple
    networks: int
    scans: dict[Platform, str]
    notes: tuple[str, ...]


@shows_keywords(ExportConfig)
def export(*, progress: bool = False, **flags: "Unpack[ExportFlags]") -> Exported:
    """Write a model as one file that `infer` and `load_model` read without flax and without our networks' code.

    The programs take any number of windows. They are planned for as many as infer gives a call by default; with these
    their logits are those of the network.

    Args:
        progress: show notes and a bar; else it prints nothing.
        flags: those of the command, as keywords: model, destination, platforms, ... (flags.ExportConfig).

    Raises:
        CheckpointError: weights that cannot be read.
        ConfigError: flags that do not fit the model.
        OutputError: the file exists already, or cannot be written.
    """
    return export_model(from_keywords(ExportConfig, flags), *shown(progress, "Lowering"))


def export_model(config: ExportConfig, say: Say = silent, track: Track = untracked) -> Exported:
    """Write a model as one file; see `export`. say, track: of support.console."""
    path = config.destination
    if path.suffix != SUFFIX:
        onnx = ". ONNX is not written, see docs/how-to/deploy.md" if path.suffix == ".onnx" else ""
        raise ConfigError(f"{path}: expected a file name that ends in {SUFFIX}{onnx}")
    if config.model.suffix == SUFFIX:
        raise ConfigError(f"{config.model}: exported already. Name the run or the weights that it was made of")
    if not config.platforms:
        raise ConfigError(f"--platforms names none; expected one or more of {', '.join(PLATFORMS.values())}")
    if path.exists() and not config.overwrite:
        raise OutputError(f"{path} exists already. Choose another name or pass --overwrite")
    paths, notes = networks_at([config.model])
    for note in notes:
        say(f"Note: {note}")
    given = [read_weights(one) for one in paths]
    networks = [weights._replace(data=_prepared(weights.data, config)) for weights in given]
    window = config.roi_size or (networks[0].data or DataProperties(patch_size=None)).patch_size or PUBLISHED_ROI
    for weights in networks:
        weights.config.check_size(window)
    configs = list(dict.fromkeys(weights.config for weights in networks))
    wanted = list(dict.fromkeys(itertools.product(range(len(configs)), config.platforms)))
    programs: list[dict[Platform, Program]] = [{} for _ in configs]
    lowered = (_program(configs[n], window, platform, config.precision) for n, platform in wanted)
    for (n, platform), program in zip(wanted, track(lowered, len(wanted)), strict=True):
        programs[n][platform] = program
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"mambahome-jax": __version__, "jax": jax.__version__},
        "window": window,
        "keep_largest": learned_largest(config.model),
        "programs": [
            {
                name: {"file": f"program_{n}.{name}", "precision": each.precision, "scan": each.scan}
                for name, each in by.items()
            }
            for n, by in enumerate(programs)
        ],
        "networks": [
            {
                "model": weights.config.to_json(),
                "data": None if weights.data is None else weights.data.to_json(),
                "published": source.data is None,
                "digest": digest_of(build_model(weights)),
                "program": configs.index(weights.config),
                "weights": f"weights_{n}.npz",
            }
            for n, (source, weights) in enumerate(zip(given, networks, strict=True))
        ],
    }
    with atomic_write(path, "file") as partial:
        _write(partial, manifest, programs, networks)
    scans = {name: f"{each.precision}, {each.scan}" for name, each in programs[0].items()}
    return Exported(path, window, len(networks), scans, tuple(notes))


def _prepared(data: DataProperties | None, config: ExportConfig) -> DataProperties | None:
    """How scans are prepared, as the flags change it. Raises ConfigError: where nnU-Net's plans say how."""
    changes = {name: getattr(config, name) for name in ("modality", "spacing") if getattr(config, name) is not None}
    if not changes:
        return data
    if data is not None and data.nnunet is not None:
        raise ConfigError(f"--{next(iter(changes))}: nnU-Net's plans say how scans are prepared. Leave it out")
    return dataclasses.replace(data or DataProperties(), **changes)


def _program(config: NetworkConfig, window: Triple, platform: Platform, precision: Precision | None) -> Program:
    """Trace and lower for a platform, which need not be here."""
    device = next(name for name, other in PLATFORMS.items() if other == platform)
    numbers = precision or default_precision(device)
    config = config.replace(use_checkpoint=False)

    def logits(params: dict[str, jax.Array], windows: jax.Array) -> jax.Array:
        return assembled(config, params, param_dtype=jnp.float32, precision=numbers)(windows)

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parameter_shapes(config).items()}
    (batch,) = jax.export.symbolic_shape("batch")
    windows = jax.ShapeDtypeStruct((batch, *window, config.in_chans), jnp.float32)
    with exporting(device, InferConfig.sw_batch_size), _without_places():
        exported = jax.export.export(jax.jit(logits), platforms=[platform])(params, windows)
        reason = BACKENDS.why_not("mosaic_gpu")
    scan = "no scan"
    if any(name.endswith("A_log") for name in params):
        scan = f"the portable scan (not mosaic_gpu: {reason})" if reason else "the scan of mosaic_gpu"
    return Program(bytes(exported.serialize()), numbers, scan)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keep the paths of our source files, which may have somebody's name, out of what is lowered."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _write(
    path: Path, manifest: dict[str, Any], programs: Sequence[dict[Platform, Program]], networks: Sequence[Weights]
) -> None:
    # Without times, so that the same model gives the same bytes.
    with zipfile.ZipFile(path, "w") as archive:
        packed = zipfile.ZIP_DEFLATED
        archive.writestr(zipfile.ZipInfo(MANIFEST), json.dumps(manifest, indent=1), packed)
        for entries, by in zip(manifest["programs"], programs, strict=True):
            for name, program in by.items():
                archive.writestr(zipfile.ZipInfo(entries[name]["file"]), program.serialized, packed)
        for entry, weights in zip(manifest["networks"], networks, strict=True):
            with archive.open(zipfile.ZipInfo(entry["weights"]), "w", force_zip64=True) as file:
                np.savez(file, allow_pickle=False, **{k: v.astype(np.float32) for k, v in weights.params.items()})
