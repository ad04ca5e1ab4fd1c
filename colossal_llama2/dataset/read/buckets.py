"""Buckets: how many samples of each source a bucket has, and their order.

Bucket k holds part k of every source. Inside it, each source is shuffled and spread evenly over the bucket. With shares
in tokens (`Mixture`), a source is subsampled or repeated.

The order is a pure function of lengths, shares, seed and epoch. Every epoch has the same number of samples of a source.
A subsampled source contributes different samples in each epoch, until all were used.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from colossal_llama2.dataset.read.sources import Mixture, Part

# Makes the random choice of samples independent of their random order, under one seed.
CHOICE = 1


class MeasuredPart(NamedTuple):
    """A part, and the number of tokens of each of its samples, (samples,) int64."""

    part: Part
    lengths: np.ndarray


@dataclass(frozen=True)
class Portion:
    """The samples of one source in a bucket, and how many of them an epoch uses.

    Attributes:
        source, number: the source's name, and its number among all sources.
        rows: (samples,) int64, row numbers in the concatenated data.
        lengths: (samples,) int64, in tokens.
        taken: samples per epoch; more than there are if some are repeated.
        asked: the requested share of the bucket's tokens; None without a mixture.
    """

    source: str
    number: int
    rows: np.ndarray
    lengths: np.ndarray
    taken: int
    asked: float | None = None

    def order(self, *, seed: int, epoch: int, bucket: int) -> np.ndarray:
        """The rows of an epoch in their order. No row is repeated before all were used once."""
        random = np.random.default_rng([seed, epoch, bucket, self.number])
        whole, more = divmod(self.taken, len(self.rows))
        passes = [random.permutation(self.rows) for _ in range(whole)]
        if more:
            chosen = self._choose(more, seed=seed, epoch=epoch, bucket=bucket)
            passes.append(random.permutation(self.rows[chosen]))
        return np.concatenate(passes)

    def _choose(self, count: int, *, seed: int, epoch: int, bucket: int) -> np.ndarray:
        """The indices of a subsample of `count` samples of all lengths.

        They are evenly spaced in the order of length, so their share of the tokens equals their share of the samples,
        to within about one sample. Each epoch moves on by one place.
        """
        samples = len(self.rows)
        random = np.random.default_rng([seed, bucket, self.number, 0, CHOICE])
        by_length = np.lexsort((random.permutation(samples), self.lengths))
        first = int(random.integers(samples)) + epoch
        return by_length[(np.arange(count) * samples // count + first) % samples]


class Buckets:
    """The portions of every bucket, and the order of an epoch."""

    def __init__(self, portions: Sequence[Sequence[Portion]]):
        """`portions` are those of each bucket, by source."""
        self.portions = [list(bucket) for bucket in portions]
        sizes = [sum(portion.taken for portion in bucket) for bucket in self.portions]
        self.ends: list[int] = np.cumsum(sizes).tolist()

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return self.ends[-1]

    def bucket_of(self, position: int) -> int:
        """The bucket of the sample at a position of any epoch, counted from 0; the last bucket beyond the end."""
        return min(bisect_right(self.ends, position), len(self.ends) - 1)

    def rows(self, *, seed: int, epoch: int) -> np.ndarray:
        """(num_samples,) rows of an epoch in their order."""
        return np.concatenate([self._bucket_rows(bucket, seed, epoch) for bucket in range(len(self.portions))])

    def _bucket_rows(self, bucket: int, seed: int, epoch: int) -> np.ndarray:
        """The rows of a bucket in order. For each source, it is divided into one equal stretch per sample.

        Each sample is at a random place in its own stretch. So up to any place of the bucket, a source has its share of
        the samples, to within about one, and no pattern assigns one source to one rank.
        """
        rows, places = [np.zeros(0, np.int64)], [np.zeros(0)]
        for portion in self.portions[bucket]:
            rows.append(portion.order(seed=seed, epoch=epoch, bucket=bucket))
            random = np.random.default_rng([seed, epoch, bucket, portion.number, CHOICE + 1])
            places.append((np.arange(portion.taken) + random.random(portion.taken)) / portion.taken)
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def make_buckets(measured: Sequence[MeasuredPart], *, bucketed: bool, mixture: Mixture | None) -> Buckets:
    """Sort samples into buckets, and decide how many of each source an epoch uses.

    Args:
        measured: the parts in the order of the concatenated data.
        bucketed: bucket k is part k of every source; otherwise one bucket holds everything.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(part.source for part, _ in measured))}
    starts = np.cumsum([0, *(len(lengths) for _, lengths in measured)])
    buckets: dict[int, dict[str, list[int]]] = {}
    for index, (part, lengths) in enumerate(measured):
        if len(lengths):
            of_source = buckets.setdefault(part.bucket if bucketed else 0, {}).setdefault(part.source, [])
            of_source.append(index)
    portions = []
    for bucket in range(max(buckets) + 1):
        whole = []
        for name, indices in buckets.get(bucket, {}).items():
            rows = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])
            lengths = np.concatenate([measured[index].lengths for index in indices])
            whole.append(Portion(name, numbers[name], rows, lengths, taken=len(rows)))
        portions.append(_mixed(whole, mixture) if whole and mixture else whole)
    return Buckets(portions)


def _mixed(portions: Sequence[Portion], mixture: Mixture) -> list[Portion]:
    """The portions with the numbers of samples that the shares require. Shares are rescaled to the sources present."""
    total = sum(mixture.shares[portion.source] for portion in portions)
    shares = {portion.source: mixture.shares[portion.source] / total for portion in portions}
    # The tokens of the whole bucket if a source is read exactly once.
    budgets = {portion.source: int(portion.lengths.sum()) / shares[portion.source] for portion in portions}
    first = next(source for source in mixture.shares if source in budgets)
    budget = min(budgets.values()) if mixture.end == "stop" else budgets[first]
    mixed = []
    for portion in portions:
        asked = shares[portion.source]
        taken = max(round(budget * asked / portion.lengths.mean()), 1)
        taken = min(taken, len(portion.rows)) if mixture.end == "stop" else taken
        mixed.append(Portion(portion.source, portion.number, portion.rows, portion.lengths, taken, asked))
    return mixed
