"""The networks that segment a scan, one or several that vote: what they say of their training, and how they run."""

import dataclasses
import functools
import operator
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, product
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.config import (
    DataProperties,
    Mirror,
    MirrorPairs,
    Modality,
    ModelConfig,
    NetworkConfig,
    ScanRanges,
    Triple,
    spaced,
)
from mambahome_jax.datasets.base import Split
from mambahome_jax.datasets.structures import AXES, axis_along, sides, swap_table
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.intensity import voxel_digest
from mambahome_jax.imaging.normalisation import PUBLISHED_WINDOW
from mambahome_jax.inference.tiled import Predict, Replica
from mambahome_jax.support.devices import compiler_options
from mambahome_jax.weights.exported import ExportedModel, ExportedNetwork

if TYPE_CHECKING:
    from flax import nnx

_UNMIRRORED = "tta mirrors no window, as the checkpoint of nnU-Net allows no axis"
# Below it, half of what a network marks is wrong, or half of what there is is missed.
_POOR_DICE = 0.5


@dataclass(frozen=True)
class TrainingRecord:
    """Digests (`voxel_digest`) of the scans that a network was trained and validated on; complete: of all of them."""

    trained_on: frozenset[str]
    held_out: frozenset[str]
    complete: bool

    @classmethod
    def of(cls, data: DataProperties | None) -> "TrainingRecord | None":
        """What a network says of the scans that it saw; None where it says nothing."""
        if data is None or data.trained_on is None:
            return None
        seen, held_out = (
            frozenset(digest for scan in scans for digest in scan) for scans in (data.trained_on, data.held_out or ())
        )
        return cls(seen, held_out, complete=all(data.trained_on))

    def split_of(self, digests: Collection[str]) -> Split | None:
        """The part that a scan had in the training; "test": none; None where that cannot be known."""
        if not self.trained_on.isdisjoint(digests):
            return "train"
        return None if not self.complete else "test" if self.held_out.isdisjoint(digests) else "val"


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Networks, or callables on windows, whose softmax probabilities are averaged; the first one tells for all.

    Of nnU-Net's networks the logits of the folds of a model are averaged first, as nnU-Net does. models: the number of
    the model that each member is a fold of; () where there is one.
    """

    members: tuple[Any, ...]
    models: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any, names: Sequence[str] | None = None, homes: Sequence[Hashable] = ()) -> "Ensemble":
        """Join what `load_model` gives, or a list of several; names: of each member (default: model 1, model 2, ...).

        homes: of each that is given; those of one home are folds of one model.
        Raises ConfigError: none, or several that differ in classes, labels, channels or how scans are prepared.
        """
        if isinstance(model, cls):
            return model
        given = tuple(model) if isinstance(model, list | tuple) else (model,)
        parts = [members_of(one) for one in given]
        members = tuple(chain.from_iterable(parts))
        if not members:
            raise ConfigError("no model; expected one, or several as an ensemble")
        for member in members:
            if not callable(member):
                raise ConfigError(f"model is a {type(member).__name__}; expected what load_model gives, or a function")
        names = names or [f"model {n}" for n in range(1, len(members) + 1)]
        first = _traits(members[0])
        for name, member in zip(names[1:], members[1:], strict=True):
            pairs = ((trait, own, first[trait]) for trait, own in _traits(member).items())
            differing = [
                f"{trait} {own} against {one}" for trait, own, one in pairs if None not in (own, one) and own != one
            ]
            if differing:
                raise ConfigError(f"{name} cannot be joined with {names[0]}: {'; '.join(differing)}")
        numbers = [homes.index(home) for home in homes] or range(len(parts))
        return cls(members, tuple(number for number, part in zip(numbers, parts, strict=True) for _ in part))

    @property
    def voters(self) -> tuple[tuple[Any, ...], ...]:
        """The members, those together of which the logits are averaged."""
        if self.data.nnunet is None:
            return tuple((member,) for member in self.members)
        models = self.models or (0,) * len(self.members)
        return tuple(tuple(compress(self.members, (n == one for n in models))) for one in dict.fromkeys(models))

    @property
    def data(self) -> DataProperties:
        """What it was trained on; the published values where it does not say."""
        return _metadata(self.members[0]) or DataProperties()

    @property
    def published(self) -> bool:
        """Whether it is bare weights, as published; a callable that is no network is not."""
        first = self.members[0]
        if isinstance(first, ExportedNetwork):
            return first.published
        return is_network(first) and _metadata(first) is None

    @property
    def knows_its_scans(self) -> bool:
        """Whether it is known for which scans it is: a mere callable may be for anything."""
        return self.published or _metadata(self.members[0]) is not None

    @property
    def channels(self) -> int | None:
        """Input channels, None where it does not say."""
        return getattr(getattr(self.members[0], "config", None), "in_chans", None)

    @property
    def classes(self) -> int | None:
        """Classes with the background, None where it does not say."""
        return getattr(getattr(self.members[0], "config", None), "out_chans", None)

    @property
    def window(self) -> Triple | None:
        """The only window that it takes, that of exported members; None where it takes others."""
        return next((member.window for member in self.members if isinstance(member, ExportedNetwork)), None)

    @property
    def multiples(self) -> Triple:
        """What a window is a multiple of along each axis, so that every member takes it."""
        configs = [getattr(member, "config", None) or ModelConfig() for member in self.members]
        a, b, c = (max(sizes) for sizes in zip(*(config.multiples for config in configs), strict=True))
        return a, b, c

    def check_window(self, size: Triple) -> None:
        """Raise ConfigError where a member cannot take windows of this size."""
        for member in self.members:
            if isinstance(member, ExportedNetwork):
                member.check_window(size)
            config: NetworkConfig = getattr(member, "config", None) or ModelConfig()
            config.check_size(size)

    @property
    def class_names(self) -> dict[int, str]:
        """Class, as the output counts them, -> structure; empty where it does not say."""
        names = dict(self.data.labels)
        regions = () if self.data.nnunet is None else self.data.nnunet.regions
        return {output: names[value] for output, value in enumerate(regions)} if regions else names

    @property
    def label_names(self) -> dict[int, str]:
        """Value in label maps -> structure; empty where it does not say."""
        stored = dict(self.data.values)
        return {stored.get(value, value): name for value, name in self.data.labels}

    @property
    def modalities(self) -> frozenset[Modality]:
        """The modalities that any member was trained on; empty where one of them does not say."""
        data = [_metadata(member) for member in self.members]
        named = [frozenset(item.modality for item in each.ranges) if each else frozenset() for each in data]
        return frozenset().union(*named) if all(named) else frozenset()

    @functools.cached_property
    def records(self) -> tuple[TrainingRecord | None, ...]:
        """What each member says of the scans that it saw; None where it says nothing."""
        return tuple(TrainingRecord.of(_metadata(member)) for member in self.members)

    def part_of(self, array: np.ndarray) -> tuple[Split | None, tuple[int, ...]]:
        """The part that a scan had in the training of the members that are to segment it, and their numbers.

        Of a scan that some were trained on, those that were not; all of them where none is known to be one of these.
        """
        digest = voxel_digest(array)
        splits = [None if record is None else record.split_of([digest]) for record in self.records]
        unseen = tuple(number for number, split in enumerate(splits) if split in ("val", "test"))
        everyone = tuple(range(len(splits)))
        if "train" not in splits:
            return None if None in splits else "val" if "val" in splits else "test", everyone
        if not unseen:
            return "train", everyone
        return "val" if any(splits[number] == "val" for number in unseen) else "test", unseen

    def only(self, members: Sequence[int]) -> "Ensemble":
        """The members of these numbers."""
        if len(members) == len(self.members):
            return self
        return Ensemble(tuple(self.members[n] for n in members), tuple(self.models[n] for n in members if self.models))

    def mirrors(self, orientation: str) -> tuple[tuple[Mirror, ...], tuple[str, ...]]:
        """Find the axes to mirror windows along, which every network was trained with, and remarks: `mirrors_for`."""
        if self.data.nnunet is not None:
            axes = self.data.nnunet.mirror_axes
            # Left and right are not swapped there, whatever the labels.
            return (tuple((axis, ()) for axis in axes), ()) if axes else ((), (_UNMIRRORED,))
        networks = [_metadata(member) for member in self.members if is_network(member)]
        trained = set(AXES).intersection(*(data.mirror if data else () for data in networks))
        records = [data.mirror_pairs if data else None for data in networks]
        return mirrors_for(self.class_names, orientation, trained, records)

    def ranges(self, modality: Modality) -> ScanRanges | None:
        """What scans of a modality were like in training, over all members; None where one of them does not say.

        Without the volumes of structures where the validation of a member found it poor: whatever the scan, its
        results are far from them.
        """
        data = [_metadata(member) for member in self.members]
        known = [item for each in data if each for item in each.ranges if item.modality == modality]
        if len(known) < len(data):
            return None
        ranges = functools.reduce(ScanRanges.joined, known)
        poor = any(each and each.val_dice is not None and each.val_dice < _POOR_DICE for each in data)
        return dataclasses.replace(ranges, structures=()) if poor else ranges


def is_network(member: Any) -> bool:
    """Whether it is a network, exported or of flax, and no mere callable. Imports no flax."""
    nnx = sys.modules.get("flax.nnx")
    return isinstance(member, ExportedNetwork) or (nnx is not None and isinstance(member, nnx.Module))


def members_of(model: Any) -> tuple[Any, ...]:
    """The networks of an exported model, or of nnU-Net's folds; any other is one by itself."""
    several = isinstance(model, ExportedModel) or (is_network(model) and hasattr(model, "networks"))
    return tuple(model.networks) if several else (model,)


def _metadata(member: Any) -> DataProperties | None:
    return getattr(member, "metadata", None)


def _traits(member: Any) -> dict[str, Any]:
    """What must be equal, in words; None where the model does not say."""
    config, alone = getattr(member, "config", None), Ensemble((member,))
    data = alone.data
    spacing = "of the scan" if data.spacing is None else " x ".join(f"{s:g}" for s in data.spacing) + " mm"
    return {
        "classes": getattr(config, "out_chans", None),
        "input channels": getattr(config, "in_chans", None),
        "labels": ", ".join(f"{value} {name}" for value, name in sorted(data.labels)) or "without names",
        "stored label values": ", ".join(str(stored) for _, stored in sorted(data.values)) or "those of the labels",
        "spacing": spacing,
        "resampling": data.resampling,
        "orientation": data.orientation,
        "modality": data.modality,
        "window": spaced(member.window) if isinstance(member, ExportedNetwork) else None,
        "intensities of CT": "by the window" if data.ct_normalisation == PUBLISHED_WINDOW else data.ct_normalisation,
        "preparation of scans": str(data.nnunet) if data.nnunet else "published" if alone.published else "trained",
    }


def log_mean_softmax(members: Sequence[jax.Array], regions: bool = False) -> jax.Array:
    """Make logits (..., classes) whose softmax is the mean of the members' softmax; a single member keeps its own.

    regions: in place of softmax the sigmoid of each.
    """
    if len(members) == 1:
        return members[0]
    if regions:
        inside, outside = (
            functools.reduce(jnp.logaddexp, (jax.nn.log_sigmoid(sign * logits) for logits in members))
            for sign in (1, -1)
        )
        return inside - outside
    total = jax.nn.log_softmax(members[0], axis=-1)
    for logits in members[1:]:
        total = jnp.logaddexp(total, jax.nn.log_softmax(logits, axis=-1))
    return total


def replicas(
    voter: Sequence[Any], mirrors: Sequence[Mirror] = (), devices: Sequence[jax.Device] | None = None
) -> list[Replica]:
    """Put the mean of networks' logits on each device, over mirrored windows too; a mere callable stays where it is."""
    if not all(map(is_network, voter)):
        return [Replica(None, mirrored(_mean(voter), mirrors))]
    placed: Sequence[jax.Device | None] = [None] if devices is None else devices
    return [Replica(device, mirrored(_mean([_on(member, device) for member in voter]), mirrors)) for device in placed]


def _on(member: Any, device: jax.Device | None) -> Predict:
    if isinstance(member, ExportedNetwork):
        return member.on(device)
    from flax import nnx  # not for exported ones

    graph, state = nnx.split(member)
    return partial(apply_network, graph, state if device is None else jax.device_put(state, device))


def bind(network: "nnx.Module") -> None:
    """Bind a network to the first device as in validation, so that the program which that compiled is found again."""
    from flax import nnx

    nnx.update(network, jax.device_put(nnx.state(network), jax.devices()[0]))


def apply_network(graph: "nnx.GraphDef", state: Any, windows: jax.Array) -> jax.Array:
    """Logits of windows. Validation calls it too, so that inference finds it compiled in the cache."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, windows))):
        return _logits(graph, state, windows)  # a part of what the caller compiles, which may not have own options
    return compiled_network()(graph, state, windows)


def _logits(graph: "nnx.GraphDef", state: Any, windows: jax.Array) -> jax.Array:
    from flax import nnx

    return nnx.merge(graph, state)(windows)


@functools.cache
def compiled_network() -> Any:
    """jit of (graphdef, state, windows) -> logits."""
    return jax.jit(_logits, static_argnums=0, compiler_options=compiler_options())


def _mean(predictions: Sequence[Predict]) -> Predict:
    """Average what each makes of the same windows."""
    if len(predictions) == 1:
        return predictions[0]
    return lambda windows: functools.reduce(operator.add, (one(windows) for one in predictions)) / len(predictions)


_WORDS = {"LR": "left-right", "AP": "front-back", "IS": "head-feet"}


def mirrors_for(
    labels: Mapping[int, str],
    orientation: str,
    trained: Collection[str] = AXES,
    records: Sequence[MirrorPairs | None] = (),
) -> tuple[tuple[Mirror, ...], tuple[str, ...]]:
    """Find the axes to mirror, each with the label values that trade places, and a remark for each axis left out.

    labels: value -> name. trained: anatomical axes along which the network saw mirrored scans: others would make it
    worse. records: the label values that each network says traded places in training; None: those of the names.
    """
    mirrors, remarks = [], []
    for anatomical in AXES:
        axis = axis_along(anatomical, orientation)
        pairs, alone = sides(labels, anatomical)
        known = {dict(record or ()).get(anatomical, pairs) for record in records}
        if known and None not in records:
            alone = ()
        if anatomical not in trained:
            why = f"the model was not trained on mirrored scans (train.py --mirror {anatomical})"
        elif anatomical == "LR" and not labels:
            why = "the model has no names of structures, so that left and right cannot be told apart"
        elif len(known) > 1:
            why = "in the training of these networks different labels traded places"
        elif alone:
            why = f"the model has no counterpart of {', '.join(alone)}"
        else:
            mirrors.append((axis, known.pop() if known else pairs))
            continue
        remarks.append(f"tta leaves the {_WORDS[anatomical]} axis out: {why}")
    return tuple(sorted(mirrors)), tuple(remarks)


def mirrored(predict: Predict, mirrors: Sequence[Mirror]) -> Predict:
    """Average `predict` over every combination of mirrors, 2 ** len(mirrors) calls, each brought back and swapped.

    As logits are added, the mean over windows and the mean over mirrors may be taken in any order.
    """
    if not mirrors:
        return predict
    chosen = [tuple(compress(mirrors, use)) for use in product((False, True), repeat=len(mirrors))]

    def one(windows: jax.Array, combination: tuple[Mirror, ...]) -> jax.Array:
        axes = tuple(axis + 1 for axis, _ in combination)
        logits = jnp.asarray(predict(jnp.flip(windows, axes) if axes else windows))
        return _back(logits, class_order(combination, logits.shape[-1]), axes) if axes else logits

    def mean(windows: jax.Array) -> jax.Array:
        total = one(windows, chosen[0])
        for combination in chosen[1:]:
            total = total + one(windows, combination)
        return total / len(chosen)

    return mean


def class_order(mirrors: Sequence[Mirror], classes: int) -> np.ndarray:
    """(classes,) int32: the class of the mirrored window that each class of the window itself is.

    Raises ConfigError: a label value that the network has no class for.
    """
    order = np.arange(classes, dtype=np.int32)
    for _, pairs in mirrors:
        largest = max((max(pair) for pair in pairs), default=0)
        if largest >= classes:
            raise ConfigError(f"the labels name {largest}, but the network has {classes} classes")
        order = order[swap_table(pairs, classes)]
    return order


@partial(jax.jit, static_argnames="axes")
def _back(logits, order, axes):
    return jnp.flip(jnp.take(logits, order, axis=-1), axes)
