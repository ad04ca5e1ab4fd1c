"""Where a run's figures go: TensorBoard, from rank 0."""

from typing import Dict


class SilentWriter:
    """A metrics writer that keeps nothing: for every rank but the first."""

    def write(self, step: int, figures: Dict[str, float]) -> None:
        """Record figures by name at an optimizer step."""

    def close(self) -> None:
        """Flush what was recorded."""


class TensorBoardWriter(SilentWriter):
    """Writes each figure as a TensorBoard scalar."""

    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, step: int, figures: Dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
