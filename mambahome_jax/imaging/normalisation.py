"""How intensities reach the network: one frozen value a scheme, called with an array and its volume's statistics.

NumPy is imported late: config.py imports this file, and --help does not wait for it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mambahome_jax.errors import ConfigError
from mambahome_jax.support.console import counted

if TYPE_CHECKING:
    import numpy as np

    from mambahome_jax.imaging.intensity import IntensityStatistics

Modality = Literal["ct", "mr", "us"]
CT_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class CtWindow:
    """Clip HU to a window, and map it to [0, 1]; the default is the published one."""

    low: float = -175.0
    high: float = 250.0

    modality: ClassVar[Modality] = "ct"
    needs_statistics: ClassVar[bool] = False

    def __call__(self, array: "np.ndarray", statistics: "IntensityStatistics | None" = None) -> "np.ndarray":
        return scale_range(array, self.low, self.high, 0.0, 1.0, clip=True)


PUBLISHED_WINDOW = CtWindow()


@dataclass(frozen=True)
class CtScale:
    """Clip HU to [low, high], then (x - mean) / std: the dataset's own numbers, one entry a channel.

    They are the 0.5 and 99.5 percentiles, mean and standard deviation of its labelled voxels.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    modality: ClassVar[Modality] = "ct"
    needs_statistics: ClassVar[bool] = False

    def __call__(self, array: "np.ndarray", statistics: "IntensityStatistics | None" = None) -> "np.ndarray":
        """Raises ConfigError: another number of channels."""
        import numpy as np

        if len(self.mean) != array.shape[-1]:
            raise ConfigError(f"intensities of {counted(len(self.mean), 'channel')} for a scan of {array.shape[-1]}")
        low, high, mean, std = (np.asarray(getattr(self, field.name), np.float32) for field in fields(self))
        return (np.clip(array.astype(np.float32), low, high) - mean) / std

    @classmethod
    def of_voxels(cls, values: "np.ndarray") -> "CtScale":
        """Measure labelled voxels (n, C)."""
        import numpy as np

        low, high = np.percentile(values, CT_PERCENTILES, axis=0)
        mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
        # What float32 cannot resolve is one value, and would be divided by nearly nothing.
        std = np.where(std > 1e-7 * np.abs(mean), std, 1.0)
        return cls(*(tuple(float(value) for value in column) for column in (low, high, mean, std)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CtScale":
        """From {"low": [...], ...}. Raises TypeError, ValueError or KeyError: anything else, or unusable numbers."""
        lists = [values[field.name] for field in fields(cls)]
        if not all(isinstance(column, list | tuple) for column in lists):
            raise TypeError("low, high, mean and std are not all lists")
        columns = [tuple(map(float, column)) for column in lists]
        if not columns[0] or len({len(column) for column in columns}) != 1:
            raise ValueError("not as many entries in each as there are channels")
        scale = cls(*columns)
        ordered = all(low <= high for low, high in zip(scale.low, scale.high, strict=True))
        if not all(map(math.isfinite, sum(columns, ()))) or min(scale.std) <= 0 or not ordered:
            raise ValueError("numbers that cannot be")
        return scale


@dataclass(frozen=True)
class ZScore:
    """Subtract the volume's mean and divide by its deviation, both of its voxels that are not 0; zeros stay 0."""

    modality: ClassVar[Modality] = "mr"
    needs_statistics: ClassVar[bool] = True

    def __call__(self, array: "np.ndarray", statistics: "IntensityStatistics | None") -> "np.ndarray":
        import numpy as np

        stats, values = _required(self, statistics), array.astype(np.float32)
        scaled = (values - np.asarray(stats.mean, np.float32)) / np.asarray(stats.std, np.float32)
        scaled[values == 0] = 0
        return scaled


@dataclass(frozen=True)
class MinMax:
    """Map the volume's minimum and maximum to 0 and 1."""

    modality: ClassVar[Modality] = "us"
    needs_statistics: ClassVar[bool] = True

    def __call__(self, array: "np.ndarray", statistics: "IntensityStatistics | None") -> "np.ndarray":
        import numpy as np

        stats, values = _required(self, statistics), array.astype(np.float32)
        low = np.asarray(stats.minimum, np.float32)
        extent = np.asarray(stats.maximum, np.float32) - low
        return (values - low) / np.where(extent > 0, extent, np.float32(1))


# nnU-Net's names of what it does to a channel.
Scheme = Literal[
    "CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization", "RGBTo01Normalization", "NoNormalization"
]
_LEAST_STD = 1e-8


@dataclass(frozen=True)
class ChannelScheme:
    """What nnU-Net does to one channel (nnunetv2 2.8.1, preprocessing/normalization/default_normalization_schemes.py).

    masked: a z-score is that of the voxels inside of the scan's mask, and changes these alone. low, high, mean, std: of
    the dataset's foreground, for CTNormalization.
    """

    scheme: Scheme
    masked: bool = False
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    def __str__(self) -> str:
        numbers = f" {self.low:g} {self.high:g} {self.mean:g} {self.std:g}" if self.scheme == "CTNormalization" else ""
        return f"{self.scheme}{numbers}{' in the mask' if self.masked else ''}"

    def __call__(
        self, values: "np.ndarray", statistics: "IntensityStatistics | None", channel: int, mask: "np.ndarray | None"
    ) -> "np.ndarray":
        import numpy as np

        if self.scheme == "NoNormalization":
            return values
        if self.scheme == "RGBTo01Normalization":
            return values / np.float32(255)
        if self.scheme == "CTNormalization":
            low, high, mean, std = map(np.float32, (self.low, self.high, self.mean, max(self.std, _LEAST_STD)))
            return (np.clip(values, low, high) - mean) / std
        stats = _required(self, statistics)
        if self.scheme == "RescaleTo01Normalization":
            least, most = np.float32(stats.minimum[channel]), np.float32(stats.maximum[channel])
            return (values - least) / max(most - least, np.float32(_LEAST_STD))
        scaled = (values - np.float32(stats.mean[channel])) / np.float32(stats.std[channel])
        return np.where(mask, scaled, values) if self.masked and mask is not None else scaled


@dataclass(frozen=True)
class PerChannel:
    """What nnU-Net does to a scan, a scheme a channel."""

    channels: tuple[ChannelScheme, ...]

    @property
    def modality(self) -> Modality:
        """That of scans of these channels, as far as the schemes say it."""
        return "ct" if all(channel.scheme == "CTNormalization" for channel in self.channels) else "mr"

    @property
    def several(self) -> bool:
        """Whether some channels are CT and others not."""
        return len({channel.scheme == "CTNormalization" for channel in self.channels}) > 1

    @property
    def masked(self) -> bool:
        """Whether a mask of the scan is needed."""
        return any(channel.masked for channel in self.channels)

    @property
    def needs_statistics(self) -> bool:
        """Whether those of the scan are needed: mean and std of what each channel counts, minimum and maximum."""
        own = ("ZScoreNormalization", "RescaleTo01Normalization")
        return any(channel.scheme in own for channel in self.channels)

    def __call__(
        self,
        array: "np.ndarray",
        statistics: "IntensityStatistics | None" = None,
        mask: "np.ndarray | None" = None,
    ) -> "np.ndarray":
        """array (D, H, W, C), mask (D, H, W) bool. float32. Raises ConfigError: another number of channels."""
        if len(self.channels) != array.shape[-1]:
            raise ConfigError(
                f"intensities of {counted(len(self.channels), 'channel')} for a scan of {array.shape[-1]}"
            )
        values = array.astype("float32")
        for number, channel in enumerate(self.channels):
            values[..., number] = channel(values[..., number], statistics, number, mask)
        return values


CtNormalisation = CtWindow | CtScale
Normalisation = CtNormalisation | ZScore | MinMax | PerChannel


def normalisations(
    ct: CtNormalisation | None = None, override: Modality | None = None
) -> dict[Modality, Normalisation]:
    """What a case of each modality gets; ct: that of CT (default: the published window).

    override: the modality that every case is taken for.
    """
    table: dict[Modality, Normalisation] = {"ct": ct or PUBLISHED_WINDOW, "mr": ZScore(), "us": MinMax()}
    return table if override is None else dict.fromkeys(table, normalisation_for(override, ct))


def normalisation_for(modality: Modality, ct: CtNormalisation | None = None) -> Normalisation:
    """What a scan of a modality gets. Raises ConfigError: no such modality."""
    table = normalisations(ct)
    if modality not in table:
        raise ConfigError(f"modality is {modality!r}; expected ct, mr or us")
    return table[modality]


def ct_to_json(ct: CtNormalisation) -> dict[str, Any] | None:
    """As checkpoints and dataset.json keep it under "ct_scale": None for the published window."""
    return None if ct == PUBLISHED_WINDOW else asdict(ct)


def ct_from_json(values: Any) -> CtNormalisation:
    """From what `ct_to_json` gives. Raises TypeError, ValueError or KeyError: anything else."""
    if values is None:
        return PUBLISHED_WINDOW
    if set(values) != {"low", "high"}:
        return CtScale.from_json(values)
    window = CtWindow(float(values["low"]), float(values["high"]))
    if not -math.inf < window.low < window.high < math.inf:
        raise ValueError(f"{window.low} to {window.high} is no window")
    return window


def scale_range(
    array: "np.ndarray", a_min: float, a_max: float, b_min: float, b_max: float, clip: bool = False
) -> "np.ndarray":
    """Map [a_min, a_max] to [b_min, b_max], beyond it too unless `clip`. float32, as MONAI's ScaleIntensityRange.

    Raises ConfigError where a_min equals a_max.
    """
    import numpy as np

    if a_min == a_max:
        raise ConfigError(f"intensity range {a_min} to {a_max}; expected two different values")
    scaled = array.astype(np.float32)
    scaled -= np.float32(a_min)
    scaled *= np.float32((b_max - b_min) / (a_max - a_min))
    scaled += np.float32(b_min)
    return np.clip(scaled, b_min, b_max, out=scaled) if clip else scaled


def _required(
    scheme: ZScore | MinMax | ChannelScheme, statistics: "IntensityStatistics | None"
) -> "IntensityStatistics":
    if statistics is None:
        raise ValueError(f"{type(scheme).__name__} needs the statistics of the volume")
    return statistics
