"""The measurements of a run for TensorBoard."""

import math
import shutil
import time
from pathlib import Path
from typing import Any


class Board:
    """Write every number of a measurement as a scalar at its step; earlier files are removed.

    It writes in the thread that calls it: tensorboardX's own thread dies on a full disk, and the
    next measurement waits for it without end.
    """

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, line: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                summary = scalar(name, value)
                event = Event(wall_time=time.time(), step=line["step"], summary=summary)
                self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
