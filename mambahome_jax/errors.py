"""Errors that a user can act on. The command line prints their message without a traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class MambaHomeError(Exception):
    """Base of every error that is the user's to mend; anything else is a fault of ours and keeps its traceback."""


class ConfigError(MambaHomeError):
    """A flag, a configuration value or an array shape that cannot work."""


class CheckpointError(MambaHomeError):
    """Weights or a checkpoint folder that cannot be read or do not fit the model."""


class TrainingError(MambaHomeError):
    """A training that cannot go on: its numbers are no longer finite."""


class OutputError(MambaHomeError):
    """A result that cannot be written (full disk, read-only folder)."""


class ScanWarning(UserWarning):
    """A scan whose intensities, size or result are far from those of the scans that a model is for."""


def why_not_written(error: Exception) -> str:
    """The reason in a few words; Orbax and TensorStore wrap that of the system in a page of their own."""
    text = str(getattr(error, "strerror", None) or error)
    known = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
    return next((reason for reason in known if reason in text), text.partition("\n")[0] or type(error).__name__)


_LONGEST = 2000


class DatasetError(MambaHomeError):
    """A scan, a label map or a folder that is not what it should be.

    Says which file, what was found, what was expected and what to do, in that order.
    """

    def __init__(
        self,
        found: str,
        *,
        case: str | None = None,
        file: str | Path | None = None,
        expected: str | None = None,
        action: str | None = None,
    ):
        self.found, self.case, self.file, self.expected, self.action = found, case, file, expected, action
        super().__init__(self.message())

    def message(self) -> str:
        """One line: `case: file: found; expected ...; what to do`."""
        head = ": ".join(str(part) for part in (self.case, self.file) if part is not None)
        # What was found may be what a damaged or hostile file says, at any length.
        found = self.found if len(self.found) <= _LONGEST else f"{self.found[:_LONGEST]}..."
        text = f"{head}: {found}" if head else found
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}. {self.action}" if self.action else text


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """A DatasetError that names no file, as of a volume in memory, leaves as one of `file`."""
    try:
        yield
    except DatasetError as error:
        if error.file is not None:
            raise
        raise DatasetError(
            error.found, case=error.case, file=file, expected=error.expected, action=error.action
        ) from error
