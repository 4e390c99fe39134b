"""What a --model_path names: the networks of a run, and how each is loaded.

An exported model needs neither flax nor the networks' code, so that the readers of others are imported when one of
these is to be read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambahome_jax.config import Precision
from mambahome_jax.errors import ConfigError
from mambahome_jax.support.files import read_json
from mambahome_jax.support.paths import openable_path
from mambahome_jax.weights.exported import SUFFIX, ExportedModel, read_exported, read_manifest
from mambahome_jax.weights.nnunet import CHECKPOINT, nnunet_checkpoints, untrained_folds

if TYPE_CHECKING:
    from mambahome_jax.model.network import Network
    from mambahome_jax.weights.weights import FoldMean

RUN_CHECKPOINT = Path("checkpoints") / "best"  # of a run folder: what infer is to use
# Of a run of several networks, folders fold_0, fold_1, ... or member_0, ..., each a run.
FOLD, MEMBER, CROSS_VALIDATION = "fold", "member", "cross_validation"


def load_model(
    path: Path | str, param_dtype=None, precision: Precision | None = None, *, use_checkpoint: bool = False
) -> "Network | FoldMean | ExportedModel":
    """Load a network: of a run, a checkpoint folder (RUN/checkpoints/best), or a published .pth, .npz, .safetensors.

    Of a model folder of nnU-Net v2 (`<trainer>__<plans>__<configuration>`), the mean of its folds where it has several.
    Of what `mambahome export` wrote (.mh), its programs, whose numbers and window are fixed.

    Args:
        param_dtype: dtype of the parameters, float32 by default; float64 needs JAX x64.
        precision: fp32, tf32 or bf16; by default bf16 on a GPU and fp32 elsewhere (fp32 with float64 parameters).
        use_checkpoint: recompute each block in a backward pass.

    Raises:
        CheckpointError: lists by name whatever is missing, unknown or misshapen; nothing is loaded halfway.
        ConfigError: numbers that are not to be had.
    """
    path = openable_path(path)
    if path.suffix == SUFFIX:
        if param_dtype is not None or use_checkpoint:
            raise ConfigError(f"{path}: an exported model has float32 parameters and no backward pass")
        return read_exported(path, precision)
    from mambahome_jax.weights.weights import load_network

    return load_network(path, param_dtype, precision, use_checkpoint=use_checkpoint)


def networks_of_run(folder: Path) -> list[Path]:
    """The folders of the networks of a run of several, by number, as far as they have a checkpoint; none of another."""
    for kind in (FOLD, MEMBER):
        numbered = {path: path.name.removeprefix(f"{kind}_") for path in folder.glob(f"{kind}_*")}
        homes = [path for path, number in numbered.items() if number.isdecimal() and (path / RUN_CHECKPOINT).is_dir()]
        if homes and not (folder / RUN_CHECKPOINT).is_dir():
            return sorted(homes, key=lambda path: int(numbered[path]))
    return []


def networks_at(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Put its networks in the place of a run of several, or of nnU-Net's model folder, and note what it lacks."""
    found: list[Path] = []
    notes: list[str] = []
    for path in paths:
        networks = networks_of_run(path) or nnunet_checkpoints(path)
        found += networks or [path]
        if untrained := untrained_folds(path):
            notes.append(f"{path}: {', '.join(untrained)} without {CHECKPOINT}; the other folds segment alone")
        reports = [_object(network / "run.json") for network in networks]
        folds = next((_part(report, "configuration").get("folds") for report in reports), None)
        if isinstance(folds, int) and len(networks) < folds:
            notes.append(f"{path} holds {len(networks)} of {folds} folds, which segment without the others")
        for network, report in zip(networks, reports, strict=True):
            if report.get("status", "finished") != "finished":
                notes.append(f"the training of {network} has not ended ({report['status']})")
    return found, notes


def learned_largest(run: Path) -> tuple[str, ...]:
    """Structures of which the cross-validation of a run found it better to keep the largest connected part alone."""
    if run.suffix == SUFFIX:
        return tuple(read_manifest(run)["keep_largest"])
    table = _part(_object(run / CROSS_VALIDATION / "summary.json"), "largest_part")
    return tuple(name for name, entry in table.items() if isinstance(entry, Mapping) and entry.get("kept") is True)


def _object(file: Path) -> Mapping[str, Any]:
    """The content of a JSON file; empty where there is no such file. Raises DatasetError: damaged."""
    return read_json(file) if file.is_file() else {}


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in another; empty where it is none."""
    part = content.get(key)
    return part if isinstance(part, Mapping) else {}
