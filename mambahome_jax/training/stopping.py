"""Signals that end a training after the step under way, in all of its processes at once."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh

from mambahome_jax.training.distributed import Votes
from mambahome_jax.training.progress import Display


class StopOnSignal(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT, so that the step is finished and a checkpoint written; the second SIGINT interrupts.

    Several processes stop after the same step, whichever of them was asked to: each step they vote.
    """

    def __init__(self, display: Display, mesh: Mesh):
        self.received: int | None = None
        self._decided: int | None = None
        self._votes = Votes(mesh) if jax.process_count() > 1 else None
        self._display = display
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noticed(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    def requested(self) -> int | None:
        """The signal to stop for, None for none: the same answer in every process."""
        return self.received if self._votes is None else self._decided

    def agree(self, at_once: bool = False) -> None:
        """Take part in a vote; without `at_once` its result counts from the next one on, when it is there anyway."""
        if self._votes is not None and self._decided is None:
            vote = self._votes.settle if at_once else self._votes.cast
            self._decided = vote(self.received or 0) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        self._display.say(f"{name}: finishing this step and writing a checkpoint (a compilation ends first)")
