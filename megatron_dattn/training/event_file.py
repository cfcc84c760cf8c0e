"""TensorBoard's file of one run, whose failures cost points and never the run.

torch's `SummaryWriter` writes in a thread: a full disk ends that thread with a traceback, and the
training with the next call. Here points are written at once, and what does not get through is
counted: one warning when that begins, one line when it is over, and one at the end.
"""

import io
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dattn.runtime.append_file import AppendFile
from megatron_dattn.runtime.os_errors import explain

logger = logging.getLogger(__name__)


class EventFile:
    """A new event file in a folder; its steps replace those of earlier files from there on."""

    def __init__(self, folder: str | Path, purge_step: int) -> None:
        """
        Args:
            purge_step: the first step that is written here; what earlier files say of it and of
                later ones is dropped by TensorBoard.

        Raises:
            OSError: the folder or the file cannot be made.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        Path(folder).mkdir(parents=True, exist_ok=True)
        unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        name = f"events.out.tfevents.{int(time.time()):010d}.{unique}"
        self._file = AppendFile(Path(folder) / name)
        self._make_event = Event
        start = SessionLog(status=SessionLog.START)
        # Before the first points: without it no reader takes the file.
        self._head = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=start),
        ]
        self._fails = False
        self._lost = 0  # points, since the run began

    def add_text(self, tag: str, text: str, step: int) -> None:
        """A text, in Markdown."""
        from torch.utils.tensorboard.summary import text as summary

        self._add([summary(tag, text)], step)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag, all of one step."""
        from torch.utils.tensorboard.summary import scalar

        self._add([scalar(tag, value) for tag, value in values.items()], step)

    def close(self) -> None:
        """Say what is missing, if anything is."""
        try:
            self._file.close()
        except OSError as error:
            logger.warning("TensorBoard's file may be incomplete: %s", explain(error))
        if self._lost:
            path = self._file.path
            logger.warning("%d points are missing in TensorBoard's file %s", self._lost, path)

    def _add(self, summaries: list[Any], step: int) -> None:
        now = time.time()
        points = [self._make_event(wall_time=now, step=step, summary=one) for one in summaries]
        try:
            self._file.append(_encode([*self._head, *points]))
        except OSError as error:
            self._lost += len(points)
            if not self._fails:
                self._fails = True
                logger.warning(
                    "TensorBoard's file cannot be written: %s; training goes on without these "
                    "points",
                    explain(error),
                )
            return
        self._head = []
        if self._fails:
            self._fails = False
            logger.warning("TensorBoard's file is written again; %d points are lost", self._lost)


def _encode(events: Iterable[Any]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = io.BytesIO()
    for event in events:
        RecordWriter(records).write(event.SerializeToString())
    return records.getvalue()
