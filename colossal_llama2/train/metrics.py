"""Where a run's figures go: TensorBoard, from rank 0."""

from typing import Dict


class SilentWriter:
    """A metrics writer that keeps nothing: for every rank but the first."""

    def write(self, step: int, figures: Dict[str, float]) -> None:
        """Record figures by name at an optimizer step."""

    def close(self) -> None:
        """Flush what was recorded."""


class TensorBoardWriter(SilentWriter):
    """Writes each figure as a TensorBoard scalar. A resumed run replaces what was logged after `last_step`."""

    def __init__(self, folder: str, last_step: int):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer = SummaryWriter(folder, purge_step=last_step + 1)

    def write(self, step: int, figures: Dict[str, float]) -> None:
        # One event with all figures: events are packed one by one, in Python.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        self._writer.close()
