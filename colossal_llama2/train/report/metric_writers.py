"""Writes a run's figures to TensorBoard, and to several writers at once."""

import itertools
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.train.stepping.silent_reporter import SilentWriter

# Distinguishes the files of one process.
_NUMBERS = itertools.count()


class TensorBoardWriter(SilentWriter):
    """Writes each figure as a TensorBoard scalar, to a file of its own. If the disk is full, that is logged once.

    TensorBoard's own writer has a thread that prints a traceback on a full disk, and its next call ends the run.
    """

    def __init__(self, folder: str, last_step: int):
        """TensorBoard discards figures after `last_step` in earlier files of `folder`; -1 for all figures."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._path, self._has_failed = Path(folder, name), False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(self._path.open("xb"))
        self._add(file_version="brain.Event:2")
        self._add(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, figures: dict[str, float]) -> None:
        # One event for all figures, since each event is packed in Python.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step=step, summary=self._summary(value=values))

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

        content = TextPluginData(version=0).SerializeToString()
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text", content=content))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        values = [
            self._summary.Value(
                tag=name,
                metadata=metadata,
                tensor=TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape),
            )
            for name, text in texts.items()
        ]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **content: Any) -> None:
        # TensorBoard reads nothing after an incomplete event.
        if self._has_failed:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            logs.get_logger().warning(
                "%s cannot be written (%s); TensorBoard will lack all later figures", self._path, error.strerror
            )

    def close(self) -> None:
        try:
            self._records.close()
        except OSError as error:
            self._fail(error)


class SeveralWriters(SilentWriter):
    """Passes everything on to each of its writers."""

    def __init__(self, writers: Sequence[SilentWriter]):
        self._writers = writers

    def write(self, step: int, figures: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, figures)

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        for writer in self._writers:
            writer.write_texts(step, texts)

    def begin_close(self) -> None:
        for writer in self._writers:
            writer.begin_close()

    def close(self) -> None:
        # Those that take long do so at the same time.
        self.begin_close()
        for writer in self._writers:
            writer.close()
