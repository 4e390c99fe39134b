"""Trained model folders of nnU-Net v2: what plans.json, dataset.json and a checkpoint say of network and scans.

    <trainer>__<plans>__<configuration>/ plans.json  dataset.json  fold_0/checkpoint_final.pth  fold_1/...

As nnunetv2 2.8.1 writes and reads them, with the plans of earlier releases, which name the network otherwise.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mambahome_jax.config import DataProperties, PlainUNetConfig, ResEncUNetConfig, UNetConfig
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError
from mambahome_jax.forms import Convert, among, converted, count_up_to, entries, mapping, positive, text
from mambahome_jax.support.files import read_json

PLANS, DATASET, CHECKPOINT = "plans.json", "dataset.json", "checkpoint_final.pth"
STATE_DICT = "network_weights"
_NETWORKS: dict[str, tuple[type[UNetConfig], str]] = {
    "PlainConvUNet": (PlainUNetConfig, "n_conv_per_stage"),
    "ResidualEncoderUNet": (ResEncUNetConfig, "n_blocks_per_stage"),
}
# What every network of these has; anything else changes what it computes without a trace in its tensors.
_FIXED: dict[str, Any] = {
    "conv_op": "Conv3d",
    "conv_bias": True,
    "norm_op": "InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
_COUNT = count_up_to(1 << 20)
_COUNTS, _OBJECT = entries(_COUNT), (mapping, "an object with keys")
_NAMED, _STEPS = (text, "a name"), (entries(_COUNTS), "lists of integers above 0")
_EACH = (lambda value: (_COUNTS if isinstance(value, list) else _COUNT)(value), "an integer above 0, or a list of them")
# What an entry of the plans looks like where it is there, at whatever depth.
_FORMS: dict[str, tuple[Convert, str]] = {
    **dict.fromkeys(("configurations", "architecture", "arch_kwargs"), _OBJECT),
    **dict.fromkeys(("resampling_fn_data_kwargs", "resampling_fn_probabilities_kwargs"), _OBJECT),
    **dict.fromkeys(("image_reader_writer", "preprocessor_name", "network_class_name", "UNet_class_name"), _NAMED),
    **dict.fromkeys(("resampling_fn_data", "resampling_fn_probabilities"), _NAMED),
    **dict.fromkeys(("patch_size", "features_per_stage", "n_conv_per_stage_encoder"), (_COUNTS, "integers above 0")),
    **dict.fromkeys(("kernel_sizes", "strides", "conv_kernel_sizes", "pool_op_kernel_sizes"), _STEPS),
    **dict.fromkeys(("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"), _EACH),
    **dict.fromkeys(("n_stages", "UNet_base_num_features", "unet_max_num_features"), (_COUNT, "an integer above 0")),
    "transpose_forward": (entries(among((0, 1, 2)), 3), "an order of the axes 0 1 2"),
    "spacing": (entries(positive), "mm above 0"),
    "normalization_schemes": (entries(text), "names, one a channel"),
    "use_mask_for_norm": (entries(among((True, False))), "true or false, one a channel"),
}
_SIZES = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder")
_RESAMPLING = "resample_data_or_seg_to_shape"
# Reader of the plans -> the orientation to which it turns scans.
_READERS = {
    **dict.fromkeys(("SimpleITKIO", "NibabelIO"), None),
    **dict.fromkeys(("SimpleITKIOWithReorient", "NibabelIOWithReorient"), "RAS"),
}


def nnunet_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a model folder of nnU-Net, of one fold of it, or a checkpoint in one; none of anything else.

    Every numbered fold that has one, else fold_all. Raises CheckpointError: a model folder without any, or a folder of
    model folders.
    """
    if path.suffix == ".pth":
        return [path] if path.is_file() and _is_model_folder(path.parent.parent) else []
    if _is_model_folder(path.parent) and path.name.startswith("fold_"):
        return [path / CHECKPOINT]
    if not _is_model_folder(path):
        # A dataset's folder holds its models, nnUNet_results those of all datasets.
        plans = [file for depth in ("", "*/") for file in sorted(path.glob(f"{depth}*__*__*/{PLANS}"))]
        below = [str(file.parent.relative_to(path)) for file in plans]
        if below:
            raise CheckpointError(f"{path}: the folder of several models; expected one of {', '.join(below)}")
        return []
    folds = {fold.parent.name.removeprefix("fold_"): fold for fold in sorted(path.glob(f"fold_*/{CHECKPOINT}"))}
    numbered = sorted((name for name in folds if name.isdecimal()), key=int)
    if not folds:
        raise CheckpointError(f"{path}: no fold_*/{CHECKPOINT}; expected that of a trained fold. Was it copied whole?")
    return [folds[name] for name in numbered] or [*folds.values()]


def untrained_folds(path: Path) -> list[str]:
    """The folds of a model folder of nnU-Net that have no checkpoint, by name; none of anything else."""
    folds = sorted(path.glob("fold_*")) if _is_model_folder(path) else []
    return [fold.name for fold in folds if fold.is_dir() and not (fold / CHECKPOINT).is_file()]


def _is_model_folder(path: Path) -> bool:
    return (path / PLANS).is_file() and (path / DATASET).is_file()


def is_nnunet(content: Mapping[str, Any]) -> bool:
    """Whether a file of torch.save holds a checkpoint of nnU-Net v2."""
    return STATE_DICT in content and isinstance(content.get("init_args"), Mapping)


def checkpoint_entries(data: DataProperties | None) -> dict[str, Any]:
    """What nnU-Net reads of a checkpoint beside the state dict; nothing for a network that it does not know."""
    preparation = None if data is None else data.nnunet
    if preparation is None:
        return {}
    return {
        "trainer_name": preparation.trainer,
        "init_args": {"configuration": preparation.configuration},
        "inference_allowed_mirroring_axes": preparation.mirror_axes,
    }


@contextlib.contextmanager
def planned_by(trainer: str) -> Iterator[None]:
    """Add to a CheckpointError, of tensors that are not those of the network in the plans, what it may come of."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Has the trainer, {trainer}, changed the network of the plans?") from error


def described(checkpoint: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of ours would say of the network ("model") and the way of its scans ("data").

    By the plans of the model folder; by those that the checkpoint itself holds, where it lies in none. content: of the
    checkpoint. Raises CheckpointError: a configuration or network of another kind, damaged files.
    """
    folder, arguments = checkpoint.parent.parent, content["init_args"]
    try:
        name, trainer = str(arguments["configuration"]), str(content["trainer_name"])
        if _is_model_folder(folder):
            plans, dataset = read_json(folder / PLANS), read_json(folder / DATASET)
        else:
            folder, plans, dataset = checkpoint, arguments["plans"], arguments["dataset_json"]
    except KeyError as error:
        raise CheckpointError(f"{checkpoint}: no entry {error}; expected a checkpoint of nnU-Net v2") from error
    except DatasetError as error:
        raise CheckpointError(str(error)) from error
    try:
        _require_forms(plans)
        configuration = _configuration(plans, name)
        channels = list(
            converted("channel_names", dataset.get("channel_names") or dataset["modality"], *_OBJECT).values()
        )
        labels, outputs, regions, region_values = _labels(dataset)
        schemes = _normalisation(plans, configuration)
        if len(schemes) != len(channels):
            raise ConfigError(f"{len(schemes)} normalization_schemes for {len(channels)} channels")
        mirrored = content.get("inference_allowed_mirroring_axes")
        preparation = {
            # nnU-Net counts the axes of a file from the last one.
            "axes": [2 - int(axis) for axis in plans["transpose_forward"]],
            "normalisation": {"channels": schemes},
            "orientation": _orientation(plans),
            "mirror_axes": None if mirrored is None else list(mirrored),
            "regions": regions,
            "region_values": region_values,
            "configuration": name,
            "trainer": trainer,
        }
        data = {
            "spacing": configuration["spacing"],
            "modality": "ct" if all(each["scheme"] == "CTNormalization" for each in schemes) else "mr",
            "labels": labels,
            "channels": channels,
            "patch_size": configuration["patch_size"],
            "resampling": "cubic",
            "nnunet": preparation,
        }
        return {"model": _network(configuration, len(channels), outputs).to_json(), "data": data}
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: no entry {error} in {PLANS} or {DATASET}; expected those of a model"
        ) from error
    except (ConfigError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{folder}: configuration {name}: {error}") from error


def _require_forms(content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key in _FORMS:
            converted(key, value, *_FORMS[key])
        if isinstance(value, Mapping):
            _require_forms(value)


def _one_of(known: Mapping[str, Any], word: Any, name: str) -> Any:
    if word not in known:
        raise ConfigError(f"{name} is {word}; expected {' or '.join(known)}, as no other is supported")
    return known[word]


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """With what it inherits. Raises ConfigError: one that cannot run here."""
    chosen: dict[str, Any] = {}
    seen: list[str] = []
    parent: str | None = name
    while parent is not None and parent not in seen:
        seen.append(parent)
        own = converted(parent, plans["configurations"][parent], *_OBJECT)
        chosen = own | chosen
        parent = own.get("inherits_from")
    if chosen.get("previous_stage"):
        raise ConfigError("a cascade, which takes the labels of another; supported are 3d_fullres and 3d_lowres")
    if len(chosen["patch_size"]) != 3:
        raise ConfigError("works on slices; supported are 3d_fullres and 3d_lowres")
    _one_of({"DefaultPreprocessor": True}, chosen.get("preprocessor_name", "DefaultPreprocessor"), "preprocessor_name")
    for what, order in (("data", 3), ("probabilities", 1)):
        key = f"resampling_fn_{what}"
        _one_of({_RESAMPLING: True}, chosen.get(key, _RESAMPLING), key)
        expected = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
        found = expected | chosen.get(f"{key}_kwargs", {})
        if found != expected:
            raise ConfigError(f"{key}_kwargs is {found}; expected {expected}, as no other is supported")
    return chosen


def _network(configuration: Mapping[str, Any], channels: int, outputs: int) -> UNetConfig:
    """Of the plans' architecture. Raises ConfigError: one that is not ours."""
    name, sizes = _architecture(configuration)
    kind, parts = _one_of(_NETWORKS, name, "network_class_name")
    others = {key: value for key, value in sizes.items() if key not in (*_SIZES, parts)}
    for key, value in others.items():
        word = value.rsplit(".", 1)[-1] if isinstance(value, str) else value
        if key not in _FIXED or word != _FIXED[key]:
            expected = f"{_FIXED[key]}" if key in _FIXED else "none of that name"
            raise ConfigError(f"{key} of the network is {value}; expected {expected}, as no other is supported")
    stages = int(sizes["n_stages"])

    def each(key: str, count: int) -> tuple[int, ...]:
        return (sizes[key],) * count if isinstance(sizes[key], int) else tuple(sizes[key])

    strides = [tuple(stride) for stride in sizes["strides"]]
    if strides[:1] != [(1, 1, 1)]:
        raise ConfigError(f"the strides are {sizes['strides']}; expected 1 1 1 as the first")
    return kind(
        in_chans=channels,
        out_chans=outputs,
        depths=each(parts, stages),
        feat_size=tuple(sizes["features_per_stage"]),
        strides=tuple(strides[1:]),
        kernel_sizes=tuple(tuple(size) for size in sizes["kernel_sizes"]),
        decoder_depths=each("n_conv_per_stage_decoder", stages - 1),
    )


def _architecture(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the network, of the plans of earlier releases too."""
    if "architecture" in configuration:
        architecture = configuration["architecture"]
        return architecture["network_class_name"].rsplit(".", 1)[-1], dict(architecture["arch_kwargs"])
    name, parts = configuration["UNet_class_name"], configuration["n_conv_per_stage_encoder"]
    widths = (configuration["UNet_base_num_features"] * 2**stage for stage in range(len(parts)))
    return name, {
        "n_stages": len(parts),
        "features_per_stage": [min(width, configuration["unet_max_num_features"]) for width in widths],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        _one_of(_NETWORKS, name, "UNet_class_name")[1]: parts,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
    }


def _orientation(plans: Mapping[str, Any]) -> str | None:
    reader = _one_of(_READERS, plans["image_reader_writer"], "image_reader_writer")
    # TotalSegmentator turns scans before nnU-Net sees them, in training too.
    return "RAS" if "totalsegmentator" in str(plans.get("dataset_name")).lower() else reader


def _normalisation(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each channel, as `ChannelScheme` is kept."""
    statistics = plans.get("foreground_intensity_properties_per_channel")
    statistics = statistics or plans["foreground_intensity_properties_by_modality"]
    schemes, names, masks = [], configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    if len(names) != len(masks):
        raise ConfigError(f"use_mask_for_norm has {len(masks)} entries; expected {len(names)}, one a channel")
    for channel, (scheme, mask) in enumerate(zip(names, masks, strict=True)):
        masked = mask and scheme == "ZScoreNormalization"
        numbers = {"low": 0.0, "high": 0.0, "mean": 0.0, "std": 1.0}
        if scheme == "CTNormalization":
            keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
            own = converted("foreground_intensity_properties", statistics, *_OBJECT)[str(channel)]
            own = converted(f"foreground_intensity_properties of channel {channel}", own, *_OBJECT)
            values = (converted(f"{key} of channel {channel}", own[key], float, "a number") for key in keys)
            numbers = dict(zip(numbers, values, strict=True))
        schemes.append({"scheme": scheme, "masked": masked} | numbers)
    return schemes


def _labels(dataset: Mapping[str, Any]) -> tuple[dict[str, str], int, list[int], list[list[int]]]:
    """Names of the values in label maps, and outputs of the network; of regions the value that each writes where they
    overlap, and the values in it."""
    table = converted("labels", dataset["labels"], *_OBJECT)
    form = (lambda v: among(range(1 << 16))(int(v) if isinstance(v, str) else v), "a label value, or a list of them")
    sets = {
        name: [converted(f"label {name}", v, *form) for v in (value if isinstance(value, list) and value else [value])]
        for name, value in table.items()
        if name != "ignore"
    }
    foreground = {name: values for name, values in sets.items() if set(values) != {0}}
    if any(len(values) > 1 for values in sets.values()):
        order = list(converted("regions_class_order", dataset["regions_class_order"], _COUNTS, "label values above 0"))
        if len(order) != len(foreground):
            raise ConfigError(f"regions_class_order has {len(order)} entries; expected {len(foreground)}, one a region")
        names = {str(value): name for value, name in zip(order, foreground, strict=True)}
        return names, len(order), order, list(foreground.values())
    values = sorted(value for (value,) in sets.values())
    if values != list(range(len(values))):
        raise ConfigError(f"labels are {values}; expected 0, 1, 2 and so on, as the outputs of the network are counted")
    return {str(value): name for name, (value,) in foreground.items()}, len(values), [], []
