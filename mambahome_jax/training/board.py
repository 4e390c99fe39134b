"""TensorBoard's file of a run, written by whoever has something to say.

The SummaryWriter of tensorboardX hands everything to a thread. A full disk ends that with a traceback, and the training
waits for ever to hand over the next value.
"""

import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar


class Board:
    """Values and pictures of a run, for TensorBoard. Everything raises OSError where it cannot be written.

    folder: is made where it is missing. purge_step: values from this step on, of an earlier file, do not count.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        """One value of a step."""
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """An RGB picture (rows, columns, 3) uint8."""
        summary = image(name, picture, dataformats="HWC")
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Bring everything to the disk, and close the file."""
        self._writer.close()
