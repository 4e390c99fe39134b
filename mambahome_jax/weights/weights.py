"""Weights on disk <-> the network: published names in .pth, .npz and .safetensors, and our checkpoint folders."""

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from mambahome_jax.config import DataProperties, NetworkConfig, Precision, network_from_json
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError
from mambahome_jax.model.network import Network
from mambahome_jax.model.networks import make_network
from mambahome_jax.support.devices import default_precision
from mambahome_jax.support.files import NPZ_ERRORS, json_form, parse_json, require_whole_npz
from mambahome_jax.support.paths import openable_path
from mambahome_jax.weights.checkpoint import (
    HUB_WEIGHTS,
    find_checkpoint,
    model_card,
    prepare_partial,
    read_checkpoint_config,
    read_checkpoint_params,
    remove_partial,
    write_checkpoint,
    write_hub_folder,
    write_safetensors,
)
from mambahome_jax.weights.model_path import RUN_CHECKPOINT
from mambahome_jax.weights.names import (
    TreePath,
    all_names,
    canonical_name,
    config_of_shapes,
    dotted,
    official_shape,
    require_published_names,
    targets,
)
from mambahome_jax.weights.nnunet import (
    STATE_DICT,
    checkpoint_entries,
    described,
    is_nnunet,
    nnunet_checkpoints,
    planned_by,
)
from mambahome_jax.weights.pth import read_pth, write_pth

# Wrappers that data-parallel training puts around the names.
_STATE_DICTS = ("model", "state_dict", STATE_DICT)
_PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.")


class Weights(NamedTuple):
    """Parameters as a flat {dotted path of ours: array}, with what the source says of the network and its data."""

    params: dict[str, np.ndarray]
    config: NetworkConfig
    data: DataProperties | None


class FoldMean(nnx.Module):
    """Networks of several folds as one: the mean of their logits, which nnU-Net makes labels of."""

    def __init__(self, networks: Sequence[Any]):
        self.networks = nnx.List(networks)
        self.config: NetworkConfig = networks[0].config
        self.metadata: DataProperties | None = networks[0].metadata

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, D, H, W, in) -> logits (batch, D, H, W, classes)."""
        total = self.networks[0](x)
        for network in self.networks[1:]:
            total = total + network(x)
        return total / len(self.networks)


def _leaves(tree: Any) -> dict[TreePath, Any]:
    """{path: array} of a model, its state, or any nested dict or pytree of its shape."""
    flat: dict[TreePath, Any] = {}

    def walk(node: Any, path: TreePath) -> None:
        if isinstance(node, nnx.State):
            node = nnx.to_pure_dict(node)
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, (*path, int(key) if isinstance(key, str) and key.isdigit() else key))
        elif node is not None:
            flat[path] = node[...] if isinstance(node, nnx.Variable) else node

    walk(nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree, ())
    return flat


def _nest(flat: Mapping[TreePath, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def export_official(tree: Any) -> dict[str, np.ndarray]:
    """Parameters under their published names, in torch's layout.

    Args:
        tree: a network, its `nnx.State`, or any pytree shaped like its parameters (gradients, optimizer moments).

    Returns:
        {published name: array}, one tensor an expert, each array in its own dtype.

    Raises ConfigError for a twin (`ModelConfig.mixer`, `experts`), which has no such names, and for several folds.
    """
    if isinstance(tree, FoldMean):
        count = len(tree.networks)
        raise ConfigError(f"a model of {count} folds; expected one network, such as model.networks[0]")
    if isinstance(tree, Network):
        require_published_names(tree.config)
    official: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree).items():
        array = np.asarray(leaf)
        for target in targets(path, array.shape):
            part = array if target.expert is None else array[target.expert]
            official[target.name] = np.ascontiguousarray(target.layout.to_official(part))
    return official


class _OneKey(nnx.Rngs):
    """For shapes alone: nnx.Rngs counts its keys, which takes seconds where the constructor is traced."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def _abstract(config: NetworkConfig, **arguments: Any) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: make_network(config, rngs=_OneKey(0), **arguments)))


@functools.lru_cache(maxsize=8)
def _shapes(config: NetworkConfig) -> dict[str, tuple[TreePath, tuple[int, ...]]]:
    """{dotted path: (path, shape)} of the network's parameters."""
    return {dotted(path): (path, leaf.shape) for path, leaf in _leaves(_abstract(config)[1]).items()}


def flat_params(tree: Any) -> dict[str, np.ndarray]:
    """{dotted path: array} of a model, its state, or any nested dict or pytree of its shape."""
    return {dotted(path): np.asarray(leaf) for path, leaf in _leaves(tree).items()}


def parameter_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """{dotted path: shape} of a network's parameters."""
    return {name: shape for name, (_, shape) in _shapes(config).items()}


def _require_shapes(source: Path, given: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError that lists every missing, unknown and misshapen name."""
    lists = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "wrong shape": [
            f"{name} is {given[name].shape}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in given and given[name].shape != tuple(shape)
        ],
    }
    text = "; ".join(f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in lists.items() if names)
    if text:
        raise CheckpointError(
            f"{source}: the names and shapes are not those of the network, nothing was loaded. {text}"
        )


def _from_official(source: Path, tensors: Mapping[str, np.ndarray], config: NetworkConfig) -> dict[str, np.ndarray]:
    shapes = _shapes(config)
    plan = {ours: targets(path, shape) for ours, (path, shape) in shapes.items()}
    expected = {t.name: official_shape(t, shapes[ours][1]) for ours, parts in plan.items() for t in parts}
    _require_shapes(source, tensors, expected)
    params = {}
    for ours, parts in plan.items():
        arrays = [target.layout.to_ours(np.asarray(tensors[target.name])) for target in parts]
        params[ours] = arrays[0] if parts[0].expert is None else np.stack(arrays)
    return params


def _json_object(text: str, path: Path) -> dict[str, Any]:
    """The configuration in a file of weights or beside it."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error}); expected JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: its configuration is {json_form(values)}; expected a JSON object")
    return values


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    require_whole_npz(path)
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    config = _json_object(str(arrays.pop("config_json", "{}")), path)
    marked = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    return marked or arrays, config


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, framework="np") as file:
        config = _json_object((file.metadata() or {}).get("config", "{}"), path)
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    content = read_pth(path)
    config: dict[str, Any] = {}
    if isinstance(content, Mapping):
        config = dict(content["config"]) if isinstance(content.get("config"), Mapping) else {}
        if is_nnunet(content) and (not config or nnunet_checkpoints(path)):
            config = described(path, content)
        inner = (content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping))
        content = next(inner, content)
    if not isinstance(content, Mapping):
        where = " or ".join(_STATE_DICTS)
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}; expected a state_dict, alone or under {where}"
        )
    return {str(name): array for name, array in content.items() if isinstance(array, np.ndarray)}, config


# By suffix: reader, what it raises for a damaged file (CheckpointError aside), and what it expects.
_READERS: dict[str, tuple[Callable, tuple[type[Exception], ...], str]] = {
    ".pth": (_read_torch, (), ""),
    ".pt": (_read_torch, (), ""),
    ".npz": (_read_npz, NPZ_ERRORS, "arrays of numpy.savez"),
    ".safetensors": (
        _read_safetensors,
        (OSError, ValueError, TypeError, safetensors.SafetensorError),
        "a safetensors file",
    ),
}
FORMATS = tuple(_READERS)


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    reader, errors, expected = _READERS[path.suffix]
    try:
        return reader(path)
    except errors as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected {expected}") from error


def _config_beside(path: Path) -> tuple[dict[str, Any], Path]:
    """Content of the .json beside a file of weights, and where it stood; empty where there is none."""
    for candidate in (path.with_suffix(".json"), path.with_name("config.json")):
        if candidate.is_file():
            try:
                values = parse_json(candidate.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{candidate}: cannot be read ({error}); expected JSON") from error
            if isinstance(values, dict):
                return values, candidate
    return {}, path


def _strip_prefixes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip_prefixes({name.removeprefix(prefix): array for name, array in tensors.items()})
    return tensors


def _under_one_name(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each tensor once. Raises CheckpointError where the names of one hold different values."""
    known: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        other = known.setdefault(canonical_name(name), array)
        if other is not array and not np.array_equal(other, array):
            found = f"{name} and {canonical_name(name)} differ"
            raise CheckpointError(f"{path}: {found}; expected two names of one tensor. Save the weights again")
    return known


def _data_of(values: Mapping[str, Any], source: Path) -> DataProperties | None:
    """From the entry "data" of a configuration, None where there is none."""
    if not isinstance(values.get("data"), Mapping):
        return None
    best = values.get("best")
    score = {"val_dice": best["val_dice"]} if isinstance(best, Mapping) and "val_dice" in best else {}
    try:
        return DataProperties.from_json(score | dict(values["data"]))
    except ConfigError as error:
        raise CheckpointError(f'{source}: entry "data" of its configuration: {error}') from error


def read_weights(path: Path | str) -> Weights:
    """Read a checkpoint folder or one of a model hub, a fold of nnU-Net, or published .pth, .npz and .safetensors.

    The configuration comes from the tensors' names and shapes; the group sizes of MambaHoME and the slices of SegMamba,
    which leave no trace there, from the configuration in the file or in a .json beside it, else they are as published.
    Raises CheckpointError listing by name whatever is missing, unknown or misshapen; nothing is loaded halfway.
    """
    path = openable_path(path)
    folds = nnunet_checkpoints(path)
    if len(folds) > 1:
        raise CheckpointError(f"{path}: {len(folds)} folds; expected one, such as {folds[0].parent}")
    path = folds[0] if folds else path
    if path.is_file() and path.suffix in FORMATS:
        return _read_weights_file(path)
    if path.suffix in FORMATS and not path.exists():
        raise CheckpointError(f"{path}: no such file. Check the path")
    if path.is_file():
        raise CheckpointError(f"{path}: unknown suffix; expected {', '.join(FORMATS)} or a checkpoint folder")
    if (weights := find_checkpoint(path) / HUB_WEIGHTS).is_file():
        return _read_weights_file(weights)
    values = read_checkpoint_config(path)
    config = config_from_json(values["model"], path)
    params = flat_params(read_checkpoint_params(path))
    _require_shapes(path, params, parameter_shapes(config))
    return Weights(params, config, _data_of(values, path))


def _read_weights_file(path: Path) -> Weights:
    tensors, values = _read_tensors(path)
    values, source = (values, path) if values else _config_beside(path)
    model = values["model"] if isinstance(values.get("model"), Mapping) else values
    tensors = _under_one_name(path, _strip_prefixes(tensors))
    if not tensors:
        raise CheckpointError(f"{path}: no tensors inside; expected the weights of a network")
    data = _data_of(values, source)
    if data is not None and data.nnunet is not None:
        # The plans say more than the shapes: whether these are those of the network that is in them.
        config = config_from_json(model, source)
        with planned_by(data.nnunet.trainer):
            return Weights(_from_official(path, tensors, config), config, data)
    try:
        config = config_of_shapes({name: array.shape for name, array in tensors.items()}, model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{source}: its configuration cannot be used: {error}") from error
    return Weights(_from_official(path, tensors, config), config, data)


def config_from_json(values: Mapping[str, Any], source: Path | str) -> NetworkConfig:
    """Read the entry "model" of a config.json. Raises CheckpointError on unknown or impossible values."""
    try:
        return network_from_json(values)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{source}: its configuration does not fit this version ({error})") from error


def load_network(
    path: Path, param_dtype=None, precision: Precision | None = None, *, use_checkpoint: bool = False
) -> Network | FoldMean:
    """As `model_path.load_model`, of anything but an exported model."""
    folds = nnunet_checkpoints(path) or [path]
    networks = [build_model(read_weights(one), param_dtype, precision, use_checkpoint=use_checkpoint) for one in folds]
    return networks[0] if len(networks) == 1 else FoldMean(networks)


def build_model(
    weights: Weights, param_dtype=None, precision: Precision | None = None, *, use_checkpoint: bool = False
) -> Network:
    """The network of `weights`; arguments as those of load_model."""
    dtype = jnp.dtype(param_dtype or jnp.float32)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "float64 parameters need JAX x64: set JAX_ENABLE_X64=1 or jax.config.update('jax_enable_x64', True)"
        )
    if precision is None:
        precision = "fp32" if dtype == jnp.float64 else default_precision()
    config = weights.config.replace(use_checkpoint=use_checkpoint)
    arrays = {name: jnp.asarray(array, dtype) for name, array in weights.params.items()}
    return assembled(config, arrays, param_dtype=dtype, precision=precision, metadata=weights.data)


def assembled(config: NetworkConfig, params: Mapping[str, jax.Array], **arguments: Any) -> Network:
    """The network of a configuration with these parameters, by their dotted paths; they may be traced."""
    graphdef, state = _abstract(config, **arguments)
    nnx.replace_by_pure_dict(state, _nest({path: params[dotted(path)] for path in _leaves(state)}))
    return nnx.merge(graphdef, state)


def _nested_params(weights: Weights) -> dict[Any, Any]:
    return _nest({path: weights.params[ours] for ours, (path, _) in _shapes(weights.config).items()})


def write_weights(path: Path | str, weights: Weights, *, overwrite: bool = False) -> None:
    """Write weights and their configuration as the suffix says: published names in one file, without one a folder.

    The folder has the layout of a model hub; that of a twin, which has no published names, is a checkpoint.
    Raises OutputError where the place is taken or cannot be written; a file appears whole or not at all.
    """
    path = openable_path(path)
    values: dict[str, Any] = {"model": weights.config.to_json()}
    if weights.data is not None:
        values["data"] = weights.data.to_json()
    if path.suffix == "" and weights.config.twin:
        write_checkpoint(path, _nested_params(weights), values, overwrite=overwrite)
        return
    if path.suffix == "":
        card = model_card(weights.config, weights.data, sum(array.size for array in weights.params.values()))
        write_hub_folder(path, export_official(_nested_params(weights)), values, card, overwrite=overwrite)
        return
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: unknown suffix; expected {', '.join(FORMATS)}, or none for a folder")
    try:
        require_published_names(weights.config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Choose another name or pass --overwrite")
    tensors = export_official(_nested_params(weights))
    text = json.dumps(values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mambahome-") as folder:
            partial = Path(folder) / path.name
            if path.suffix == ".npz":
                np.savez(partial, allow_pickle=False, config_json=np.asarray(text), **tensors)
            elif path.suffix == ".safetensors":
                write_safetensors(partial, tensors, {"config": text})
            else:
                aliases = {alias: array for name, array in tensors.items() for alias in all_names(name)}
                others = checkpoint_entries(weights.data)
                key = STATE_DICT if others else "model"
                write_pth(partial, aliases, {"config": parse_json(text)} | others, key)
            partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({error}). Is the disk full or read-only?") from error


def write_folds(path: Path | str, folds: Mapping[str, Weights], *, overwrite: bool = False) -> None:
    """Write networks as a run of several folds, whose names are such as "fold_0". Raises OutputError, ConfigError."""
    path = openable_path(path)
    if path.suffix:
        raise ConfigError(f"{path}: {len(folds)} folds make a folder of checkpoints; expected a name without suffix")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already. Choose another name or pass --overwrite")
    home = path if path.exists() else prepare_partial(path)
    try:
        for name, weights in folds.items():
            write_weights(home / name / RUN_CHECKPOINT, weights, overwrite=overwrite)
        home.replace(path)
    except (OSError, OutputError) as error:
        remove_partial(path)
        raise OutputError(f"{path}: cannot be written ({error})") from error


def digest_of(model: Any) -> str:
    """SHA-256 of a network's parameters, configuration and metadata, however its files are called or written.

    Fields that have their default are left out, so that a version which adds some gives the same. Empty for a callable
    that is no network.
    """
    if not isinstance(model, nnx.Module):
        return ""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for path, leaf in sorted(leaves, key=lambda entry: jax.tree_util.keystr(entry[0])):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    for part in (getattr(model, "config", None), getattr(model, "metadata", None)):
        digest.update(json.dumps(_changed_fields(part), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _changed_fields(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
    return {name: _changed_fields(own) for name, (own, default) in fields.items() if own != default}
