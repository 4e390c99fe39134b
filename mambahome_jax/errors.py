"""Errors that a user can act on. The command line prints their message without a traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class MambaHomeError(Exception):
    """Base of the errors that a user can fix; any other is a bug of ours and keeps its traceback."""


class ConfigError(MambaHomeError):
    """A flag, a configuration value or an array shape that cannot work."""


class SizeError(ConfigError):
    """A patch that a network cannot take; fitting: the nearest one that it can."""

    def __init__(self, message: str, fitting: tuple[int, int, int]):
        super().__init__(message)
        self.fitting = fitting


class CheckpointError(MambaHomeError):
    """Weights or a checkpoint folder that cannot be read or do not fit the model."""


class TrainingError(MambaHomeError):
    """A training that cannot go on: its numbers are no longer finite."""


class OutputError(MambaHomeError):
    """A result that cannot be written (full disk, read-only folder)."""


class ScanWarning(UserWarning):
    """A scan whose intensities, size or result are far from those that the model was trained for."""


def why_not_written(error: Exception) -> str:
    """Return the reason in a few words; Orbax and TensorStore wrap that of the system in a page of their own."""
    text = str(getattr(error, "strerror", None) or error)
    known = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
    return next((reason for reason in known if reason in text), text.partition("\n")[0] or type(error).__name__)


_LONGEST = 2000  # letters of a fault that are printed: a damaged or hostile file may say anything at any length


class DatasetError(MambaHomeError):
    """A scan, a label map or a folder that is not what it should be.

    Says which file, what is wrong with it, what was expected and what to do, in that order.
    """

    def __init__(
        self,
        fault: str,
        *,
        case: str | None = None,
        file: str | Path | None = None,
        expected: str | None = None,
        action: str | None = None,
    ):
        self.fault, self.case, self.file, self.expected, self.action = fault, case, file, expected, action
        super().__init__(self.message())

    def message(self) -> str:
        """Return one line: `case: file: fault; expected ...; what to do`."""
        fault = self.fault if len(self.fault) <= _LONGEST else f"{self.fault[:_LONGEST]}..."
        text = ": ".join(str(part) for part in (self.case, self.file, fault) if part is not None)
        text += f"; expected {self.expected}" if self.expected else ""
        return f"{text}. {self.action}" if self.action else text

    @classmethod
    @contextlib.contextmanager
    def with_file(cls, file: Path) -> Iterator[None]:
        """Name `file` in a DatasetError raised inside that names none, as one of a volume in memory."""
        try:
            yield
        except cls as error:
            if error.file is not None:
                raise
            raise cls(error.fault, case=error.case, file=file, expected=error.expected, action=error.action) from error
