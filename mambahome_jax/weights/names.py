"""Published parameter names and shapes <-> ours: each published tensor to one of our arrays, or a slice of one."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mambahome_jax.config import (
    NETWORKS,
    TWINS,
    ModelConfig,
    NetworkConfig,
    PlainUNetConfig,
    ResEncUNetConfig,
    SegMambaConfig,
    Triple,
    UNetConfig,
)
from mambahome_jax.errors import CheckpointError, ConfigError

TreePath = tuple[str | int, ...]
_KNOWN = f"{', '.join([*NETWORKS][:-1])} or {[*NETWORKS][-1]}"

_MAMBA = "mamba_encoder.mamba_blocks.{}.{}."
_HOME = "mamba_encoder.moe_layers.{}.{}.mlp."
_SECOND = _HOME + "dynamic_slots_soft_moe."
_STAGE = r"encoder\.stages\.(\d)\."
_BLOCK = _STAGE + r"blocks\.(\d+)\."
_LEVEL = r"encoder\.levels\.(\d)\."
_SEGMAMBA_BLOCK = _LEVEL + r"stage\.blocks\.(\d+)\."
_UNET_PART = r"encoder\.stages\.(\d+)\.(\d+)\."
_UNIT = r"(conv|norm)\.(kernel|scale|bias)"
_BLOCK_OF_UNET = "encoder.stages.{}.blocks.{}."
# Our dotted path -> published name. Groups are indices; {e} stands for the expert that a stacked array holds.
_TABLE: dict[str, str | Callable[..., str]] = {
    r"encoder\.stages\.0\.downsample\.(kernel|bias)": "mamba_encoder.downsample_layers.0.0.{}",
    _STAGE + r"downsample\.(kernel|bias)": "mamba_encoder.downsample_layers.{}.1.{}",
    _STAGE + r"gsc\.(proj\d?)\.(kernel|bias)": "mamba_encoder.gscs.{}.{}.{}",
    _BLOCK + r"mamba_norm\.(\w+)": _MAMBA + "norm.{}",
    _BLOCK + r"home_norm\.(\w+)": "mamba_encoder.norm_moe.{}.{}.{}",
    _BLOCK + r"mamba\.(A_log|D)": _MAMBA + "mamba.{}",
    _BLOCK + r"mamba\.dt_bias": _MAMBA + "mamba.dt_proj.bias",
    _BLOCK + r"mamba\.conv\.(kernel|bias)": _MAMBA + "mamba.conv1d.{}",
    _BLOCK + r"mamba\.(\w+_proj)\.kernel": _MAMBA + "mamba.{}.weight",
    _BLOCK + r"home\.expert_gates": _HOME + "expert_gates",
    _BLOCK + r"home\.group_gate\.(kernel|bias)": _HOME + "group_gate_mlp.{}",
    _BLOCK + r"home\.experts\.(kernel|bias)_in": _HOME + "experts_first.{{e}}.0.{}",
    _BLOCK + r"home\.experts\.(kernel|bias)_out": _HOME + "experts_first.{{e}}.3.{}",
    _BLOCK + r"home\.second\.experts\.(kernel|bias)_in": _SECOND + "experts.{{e}}.0.{}",
    _BLOCK + r"home\.second\.experts\.(kernel|bias)_out": _SECOND + "experts.{{e}}.3.{}",
    r"encoder\.levels\.0\.stage\.downsample\.(kernel|bias)": "vit.downsample_layers.0.0.{}",
    _LEVEL + r"stage\.downsample\.(kernel|bias)": "vit.downsample_layers.{}.1.{}",
    _LEVEL + r"stage\.gsc\.(proj\d?)\.(kernel|bias)": "vit.gscs.{}.{}.{}",
    _LEVEL + r"mlp\.(fc\d)\.(kernel|bias)": "vit.mlps.{}.{}.{}",
    _SEGMAMBA_BLOCK + r"norm\.scale": "vit.stages.{}.{}.norm.weight",
    _SEGMAMBA_BLOCK + r"norm\.bias": "vit.stages.{}.{}.norm.bias",
    _SEGMAMBA_BLOCK + r"mamba\.(\w+_proj)\.kernel": "vit.stages.{}.{}.mamba.{}.weight",
    r"decoder\.skips\.(\d)\.(conv\d)\.kernel": lambda k, conv: f"encoder{int(k) + 1}.layer.{conv}.conv.weight",
    r"decoder\.ups\.(\d)\.up\.kernel": lambda k: f"decoder{5 - int(k)}.transp_conv.conv.weight",
    r"decoder\.ups\.(\d)\.block\.(conv\d)\.kernel": lambda k, conv: (
        f"decoder{5 - int(k)}.conv_block.{conv}.conv.weight"
    ),
    r"decoder\.last\.(conv\d)\.kernel": "decoder1.layer.{}.conv.weight",
    r"decoder\.out\.(kernel|bias)": "out.conv.conv.{}",
}
_TABLE |= {
    r"encoder\.stem\." + _UNIT: "encoder.stem.convs.0.{}.{}",
    _UNET_PART + _UNIT: "encoder.stages.{}.0.convs.{}.{}.{}",
    _UNET_PART + r"(conv\d)\." + _UNIT: _BLOCK_OF_UNET + "{}.{}.{}",
    _UNET_PART + r"skip\.(\d)\." + _UNIT: _BLOCK_OF_UNET + "skip.{}.{}.{}",
    r"decoder\.stages\.(\d+)\.up\.(kernel|bias)": "decoder.transpconvs.{}.{}",
    r"decoder\.stages\.(\d+)\.units\.(\d+)\." + _UNIT: "decoder.stages.{}.convs.{}.{}.{}",
    r"decoder\.heads\.(\d+)\.(kernel|bias)": "decoder.seg_layers.{}.{}",
}
for _level, _name in (("", _HOME), (r"second\.", _SECOND)):
    _TABLE[_BLOCK + rf"home\.{_level}norm\.gamma"] = _name + "norm.gamma"
    _TABLE[_BLOCK + rf"home\.{_level}slot_proj\.kernel"] = _name + "to_slot_embeds.0.weight"
    _TABLE[_BLOCK + rf"home\.{_level}slot_norm\.gamma"] = _name + "to_slot_embeds.2.gamma"
_VIT = "vit.stages.{}.{}.mamba."
for _ours, _suffix in (("forward", ""), ("backward", "_b"), ("slices", "_s")):
    _direction = _SEGMAMBA_BLOCK + rf"mamba\.{_ours}\."
    _TABLE |= {
        _direction + "A_log": f"{_VIT}A{_suffix}_log",
        _direction + "D": f"{_VIT}D{_suffix}",
        _direction + "dt_bias": f"{_VIT}dt_proj{_suffix}.bias",
        _direction + r"conv\.(kernel|bias)": f"{_VIT}conv1d{_suffix}.{{}}",
        _direction + r"(x_proj|dt_proj)\.kernel": f"{_VIT}{{}}{_suffix}.weight",
    }
_PATTERNS = tuple((re.compile(pattern), name) for pattern, name in _TABLE.items())


class Layout(NamedTuple):
    """How a published tensor lies in ours: axes[i] is our axis that is published axis i; None is a new axis of 1."""

    axes: tuple[int | None, ...]

    def to_official(self, array: np.ndarray) -> np.ndarray:
        moved = array.transpose([axis for axis in self.axes if axis is not None])
        return moved[tuple(np.newaxis if axis is None else slice(None) for axis in self.axes)]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        kept = array[tuple(0 if axis is None else slice(None) for axis in self.axes)]
        return kept.transpose(np.argsort([axis for axis in self.axes if axis is not None]))


class Target(NamedTuple):
    """A published tensor: its name, and where it lies in our array (expert: index of the first axis, or None)."""

    name: str
    expert: int | None
    layout: Layout


def dotted(path: TreePath) -> str:
    """("decoder", "ups", 0) -> "decoder.ups.0"."""
    return ".".join(str(part) for part in path)


def _layout(ours: str, ndim: int) -> Layout:
    if ours.endswith(".up.kernel"):
        return Layout((3, 4, 0, 1, 2))
    if ours.endswith(".conv.kernel") and ndim == 2:
        return Layout((1, None, 0))
    if ours.rsplit(".", 1)[-1].startswith("kernel"):
        return Layout((4, 3, 0, 1, 2)) if ndim == 5 else Layout((1, 0))
    return Layout(tuple(range(ndim)))


def targets(path: TreePath, shape: tuple[int, ...]) -> list[Target]:
    """The published tensors that our array at `path` holds: one, or one an expert where experts are stacked."""
    ours = dotted(path)
    for pattern, name in _PATTERNS:
        if match := pattern.fullmatch(ours):
            groups = ["weight" if group in ("kernel", "scale") else group for group in match.groups()]
            theirs = name(*groups) if callable(name) else name.format(*groups)
            if "{e}" not in theirs:
                return [Target(theirs, None, _layout(ours, len(shape)))]
            layout = _layout(ours, len(shape) - 1)
            return [Target(theirs.format(e=e), e, layout) for e in range(shape[0])]
    raise CheckpointError(f"{ours}: no published parameter corresponds to it; expected parameters of {_KNOWN}")


def require_published_names(config: NetworkConfig) -> None:
    """Raises ConfigError for a twin: its parameters have no published names."""
    if config.twin:
        raise ConfigError(
            f"{config.twin}: only the published network has published names. Use the checkpoint folder of this twin"
        )


def official_shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the published tensor for our array's shape."""
    ours = shape if target.expert is None else shape[1:]
    return tuple(1 if axis is None else ours[axis] for axis in target.layout.axes)


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]], extra: Mapping[str, Any] | None = None) -> NetworkConfig:
    """Configuration of the network whose published tensors have these shapes.

    The group sizes of MambaHoME's level 1 and the slices of SegMamba leave no trace there: they come from `extra`
    (fields of the configuration), else they are the published ones. Raises CheckpointError where a tensor is missing,
    ConfigError where a value cannot be or `extra` is of a twin.
    """
    segmamba, unet = (any(name.startswith(prefix) for name in shapes) for prefix in ("vit.", "encoder.stages."))
    try:
        if unet:
            config: NetworkConfig = _unet(shapes)
        else:
            config = SegMambaConfig(**_common(shapes, "vit", "stages")) if segmamba else _mambahome(shapes)
    except KeyError as error:
        raise CheckpointError(f"no tensor named {error.args[0]}; expected the weights of {_KNOWN}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"the tensors do not make a network ({error}); expected those of {_KNOWN}") from error
    untraced = [name for name in ("num_slices", "group_list", *TWINS, "use_checkpoint") if hasattr(config, name)]
    config = config.replace(**{name: extra[name] for name in untraced if extra and name in extra})
    require_published_names(config)
    return config


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)

    residual = any(name.startswith("encoder.stem.") for name in shapes)
    part, first = (r"blocks\.", "blocks.0.conv1") if residual else (r"0\.convs\.", "0.convs.0")
    stages = range(count(r"encoder\.stages\.(\d+)\."))
    kernels = [shapes[f"encoder.stages.{stage}.{first}.conv.weight"] for stage in stages]
    steps = stages[:-1]
    return (ResEncUNetConfig if residual else PlainUNetConfig)(
        in_chans=shapes["encoder.stem.convs.0.conv.weight"][1] if residual else kernels[0][1],
        out_chans=shapes[f"decoder.seg_layers.{len(steps) - 1}.weight"][0],
        depths=tuple(count(rf"encoder\.stages\.{stage}\.{part}(\d+)\.") for stage in stages),
        feat_size=tuple(kernel[0] for kernel in kernels),
        strides=tuple(_axes(shapes[f"decoder.transpconvs.{step}.weight"]) for step in steps[::-1]),
        kernel_sizes=tuple(map(_axes, kernels)),
        decoder_depths=tuple(count(rf"decoder\.stages\.{step}\.convs\.(\d+)\.") for step in steps),
    )


# In a state dict of nnU-Net the decoder holds the encoder too, and each convolution and norm has two names.
_ALIASES = (
    (re.compile(r"^decoder\.encoder\."), "encoder."),
    (re.compile(r"\ball_modules\.0\."), "conv."),
    (re.compile(r"\ball_modules\.1\."), "norm."),
)


def canonical_name(name: str) -> str:
    """The one name of ours for a published tensor, of the several that it has in a state dict of nnU-Net."""
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    return name


def all_names(name: str) -> list[str]:
    """Every name that a published tensor has in a state dict: several in those of nnU-Net's networks."""
    if not re.match(r"encoder\.(stem|stages)\.|decoder\.(stages|transpconvs|seg_layers)\.", name):
        return [name]
    again = re.sub(r"\bnorm\.(\w+)$", r"all_modules.1.\1", re.sub(r"\bconv\.(\w+)$", r"all_modules.0.\1", name))
    names = [name] if again == name else [name, again]
    return names + [f"decoder.{each}" for each in names if each.startswith("encoder.")]


def _mambahome(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    def home(name: str, axis: int) -> tuple[int, ...]:
        return tuple(shapes[_HOME.format(stage, 0) + name][axis] for stage in range(4))

    common = _common(shapes, "mamba_encoder", "mamba_blocks")
    feat, experts = common["feat_size"], home("expert_gates", 0)
    second = home("dynamic_slots_soft_moe.to_slot_embeds.0.weight", 0)
    return ModelConfig(
        **common,
        expert_mult=_expert_mult(feat, home("experts_first.0.3.weight", 1)),
        num_slots_per_expert_first=home("to_slot_embeds.0.weight", 0)[0] // (experts[0] * feat[0]),
        experts_list=experts,
        experts_list_second=tuple(n // f for n, f in zip(second, feat, strict=True)),
    )


def _common(shapes: Mapping[str, tuple[int, ...]], encoder: str, blocks: str) -> dict[str, Any]:
    """Fields of NetworkConfig; encoder, blocks: what the names of an encoder, and of its blocks, begin with."""
    first = shapes[f"{encoder}.downsample_layers.0.0.weight"]
    return {
        "in_chans": first[1],
        "out_chans": shapes["out.conv.conv.weight"][0],
        "depths": tuple(
            1 + max(int(m[1]) for n in shapes if (m := re.match(rf"{encoder}\.{blocks}\.{i}\.(\d+)\.", n)))
            for i in range(4)
        ),
        "feat_size": (first[0], *(shapes[f"{encoder}.downsample_layers.{i}.1.weight"][0] for i in range(1, 4))),
        "hidden_size": shapes["encoder5.layer.conv1.conv.weight"][0],
        # encoder1 lies on the full grid, decoder2 leads to it
        "strides": tuple(_axes(shapes[f"decoder{i + 2}.transp_conv.conv.weight"]) for i in range(4)),
        "kernel_sizes": tuple(_axes(shapes[f"encoder{i + 1}.layer.conv1.conv.weight"]) for i in range(5)),
    }


def _axes(shape: tuple[int, ...]) -> Triple:
    _, _, a, b, c = shape
    return a, b, c


def _expert_mult(feat: tuple[int, ...], hidden: tuple[int, ...]) -> int:
    for mult in range(1, 65):
        if all(int(f * mult * 2 / 3) == h for f, h in zip(feat, hidden, strict=True)):
            return mult
    raise ValueError(f"experts of {hidden} hidden units for {feat} channels")
