"""Read the batches of one data-parallel rank, one optimizer step at a time, a few steps ahead of the training loop."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prefetch import prefetched
from colossal_llama2.dataset.read.prepared_data import without_names

if TYPE_CHECKING:
    import datasets


class StepLoader:
    """Reads this rank's micro batches, one optimizer step at a time, with a few steps prefetched.

    With `pins` the batches are in page-locked memory, so that a GPU copies them while it computes.
    """

    def __init__(
        self, dataset: "datasets.Dataset", order: SampleOrder, collator: Collator, data_rank: int, *, pins: bool = False
    ):
        dataset = without_names(dataset) if collator.groups is None else dataset
        self._dataset, self.order, self._collator, self._data_rank = dataset, order, collator, data_rank
        self._pins = pins

    def steps(self, epoch: int, consumed: int) -> Iterator[tuple[list[Batch], int]]:
        """Yield (micro batches of this rank, samples that all ranks consume) for each step left in the epoch."""
        return prefetched(self._steps(epoch, consumed))

    def _steps(self, epoch: int, consumed: int) -> Iterator[tuple[list[Batch], int]]:
        for indices, taken in self.order.steps(epoch, consumed, self._data_rank):
            batches = [self._collator(self._dataset[rows]) for rows in indices]
            yield [batch.pinned() for batch in batches] if self._pins else batches, taken
