"""Bucket after bucket: how many samples of each source a bucket takes, and in which order.

Bucket k holds part k of every source. Inside it, each source is shuffled and spread evenly over the bucket. With shares
in tokens (`Mixture`), a source gives fewer samples than it has, or gives some again.

The order is a pure function of lengths, shares, seed and epoch. Every epoch takes the same number of samples of a
source; of one that has too many it takes others each time, until all were taken.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from colossal_llama2.dataset.read.sources import Mixture, Part

# Sets the choice of samples apart from their order, under one seed.
CHOICE = 1


class MeasuredPart(NamedTuple):
    """A part with the tokens of each of its samples, (samples,) int64."""

    part: Part
    lengths: np.ndarray


@dataclass(frozen=True)
class Portion:
    """What a bucket holds of a source, and how much of that an epoch takes.

    Attributes:
        source, number: the source's name, and its place among all sources.
        rows: (samples,) int64, in the data of all parts one after the other.
        lengths: (samples,) int64, in tokens.
        taken: samples that an epoch takes; more than there are if some are repeated.
        asked: share of the bucket's tokens that was asked for; None if none was.
    """

    source: str
    number: int
    rows: np.ndarray
    lengths: np.ndarray
    taken: int
    asked: float | None = None

    def order(self, *, seed: int, epoch: int, bucket: int) -> np.ndarray:
        """The rows that an epoch takes, in its order. None is taken a second time before all were taken once."""
        random = np.random.default_rng([seed, epoch, bucket, self.number])
        whole, more = divmod(self.taken, len(self.rows))
        passes = [random.permutation(self.rows) for _ in range(whole)]
        if more:
            chosen = self._choose(more, seed=seed, epoch=epoch, bucket=bucket)
            passes.append(random.permutation(self.rows[chosen]))
        return np.concatenate(passes)

    def _choose(self, count: int, *, seed: int, epoch: int, bucket: int) -> np.ndarray:
        """Places of `count` samples of which there are more, short and long ones alike.

        They are equally far apart among all samples by length, so their tokens are the part of all tokens that `count`
        is of all samples, up to about one sample. Each epoch moves on by one place.
        """
        samples = len(self.rows)
        random = np.random.default_rng([seed, bucket, self.number, 0, CHOICE])
        by_length = np.lexsort((random.permutation(samples), self.lengths))
        first = int(random.integers(samples)) + epoch
        return by_length[(np.arange(count) * samples // count + first) % samples]


class Buckets:
    """The portions of every bucket, and the order of an epoch."""

    def __init__(self, portions: Sequence[Sequence[Portion]]):
        """`portions` of each bucket, by source."""
        self.portions = [list(bucket) for bucket in portions]
        sizes = [sum(portion.taken for portion in bucket) for bucket in self.portions]
        self.ends: list[int] = np.cumsum(sizes).tolist()

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return self.ends[-1]

    def bucket_of(self, position: int) -> int:
        """The bucket of the sample at that place of any epoch, counted from 0; the last one's at the end."""
        return min(bisect_right(self.ends, position), len(self.ends) - 1)

    def rows(self, *, seed: int, epoch: int) -> np.ndarray:
        """(num_samples,) rows of an epoch in their order."""
        return np.concatenate([self._bucket_rows(bucket, seed, epoch) for bucket in range(len(self.portions))])

    def _bucket_rows(self, bucket: int, seed: int, epoch: int) -> np.ndarray:
        """Each source is cut into as many equal stretches as it has samples, and each sample lies somewhere in its own.

        So up to any place of the bucket, a source has its share of the samples but for about one of each source; and
        there is no pattern by which one rank could get one source.
        """
        rows, places = [np.zeros(0, np.int64)], [np.zeros(0)]
        for portion in self.portions[bucket]:
            rows.append(portion.order(seed=seed, epoch=epoch, bucket=bucket))
            random = np.random.default_rng([seed, epoch, bucket, portion.number, CHOICE + 1])
            places.append((np.arange(portion.taken) + random.random(portion.taken)) / portion.taken)
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def make_buckets(measured: Sequence[MeasuredPart], *, bucketed: bool, mixture: Mixture | None) -> Buckets:
    """Sort samples into buckets and decide how many each gives.

    Args:
        measured: the parts in the order in which the data has them one after the other.
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
    """The portions with as many samples taken as the shares ask, which are divided among those that are there."""
    total = sum(mixture.shares[portion.source] for portion in portions)
    shares = {portion.source: mixture.shares[portion.source] / total for portion in portions}
    # How many tokens the bucket would have if a source were read exactly once.
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
