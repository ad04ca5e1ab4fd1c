"""Which samples each data-parallel rank reads at each step, in which order: a pure function of a few numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from colossal_llama2.dataset.read.buckets import Buckets
from colossal_llama2.dataset.read.length_groups import grouped_by_length


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples over epochs, steps and ranks: a pure function of these numbers.

    Each epoch is one seeded permutation, or bucket after bucket. Each micro batch of the whole job consumes the next
    samples, and each data-parallel rank its slice of them. So the order does not depend on the number of ranks, and a
    position in it is a count of samples.

    Attributes:
        num_samples: per epoch: the samples of the data, or those that `buckets` select.
        lengths: (rows,) tokens of each row of the data, if samples of similar length are to follow each other.
        data_size: the number of data-parallel ranks.
    """

    num_samples: int
    micro_batch_size: int
    data_size: int
    accumulation_steps: int
    seed: int
    buckets: Buckets | None = None
    lengths: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def samples_per_micro_step(self) -> int:
        """Samples that all ranks together consume in one forward pass."""
        return self.micro_batch_size * self.data_size

    def steps_after(self, consumed: int) -> int:
        """Optimizer steps left in an epoch after `consumed` samples.

        The last step may have fewer micro batches.
        """
        micro_steps = (self.num_samples - consumed) // self.samples_per_micro_step
        return -(-micro_steps // self.accumulation_steps)

    def dropped_after(self, consumed: int) -> int:
        """The number of samples left at the end of the epoch, too few for another micro batch on all ranks."""
        return (self.num_samples - consumed) % self.samples_per_micro_step

    def rows(self, epoch: int, begin: int, end: int) -> list[int]:
        """The rows of the data at the positions `begin` to `end` - 1 of an epoch."""
        return self.epoch_rows(epoch)[begin:end].tolist()

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """(num_samples,) rows of the data in the order of an epoch, including those dropped at its end."""
        if self.buckets is not None:
            rows = self.buckets.rows(seed=self.seed, epoch=epoch)
        else:
            rows = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        if self.lengths is None:
            return rows
        # Inside each bucket.
        ends = self.buckets.ends[:-1] if self.buckets is not None else []
        parts = [grouped_by_length(part, self.lengths, seed=self.seed, epoch=epoch) for part in np.split(rows, ends)]
        return np.concatenate(parts)

    def bucket_of(self, position: int) -> int:
        """The bucket of the sample at a position of any epoch, both counted from 0; 0 without buckets."""
        return self.buckets.bucket_of(position) if self.buckets is not None else 0

    def steps(self, epoch: int, consumed: int, data_rank: int) -> Iterator[tuple[list[np.ndarray], int]]:
        """Yield, for each optimizer step, this rank's rows per micro batch, and the samples that all ranks consume."""
        order = self.epoch_rows(epoch)
        width = self.samples_per_micro_step
        while consumed + width <= self.num_samples:
            micro_steps = min(self.accumulation_steps, (self.num_samples - consumed) // width)
            starts = [consumed + i * width + data_rank * self.micro_batch_size for i in range(micro_steps)]
            yield [order[start : start + self.micro_batch_size] for start in starts], micro_steps * width
            consumed += micro_steps * width
