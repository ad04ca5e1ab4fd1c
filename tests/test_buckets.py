"""The order with buckets: the same for any number of ranks, one bucket before the next, shares by tokens."""

from collections import Counter

import numpy as np
import pytest

from colossal_llama2.dataset.read.buckets import MeasuredPart, make_buckets
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Mixture, Part

# For each part: source, bucket, samples, longest sample. Source "en" has no third part.
SHAPES = [("zh", 0, 900, 512), ("zh", 1, 700, 512), ("zh", 2, 800, 64), ("en", 0, 400, 256), ("en", 1, 90, 2048)]
NAMES = ["zh", "en"]


def measured(shapes=SHAPES):
    """Parts with lengths as in fine-tuning: most are short, a few have the maximum length."""
    random = np.random.default_rng(5)
    parts = []
    for source, bucket, samples, longest in shapes:
        lengths = np.clip(random.lognormal(np.log(longest / 8), 1.0, samples), 1, longest).astype(np.int64)
        parts.append(MeasuredPart(Part(source, f"{source}/part-{bucket:05d}", bucket), lengths))
    return parts


def order_of(parts, *, ranks=1, micro=4, mixture=None, bucketed=True, seed=3):
    buckets = make_buckets(parts, bucketed=bucketed, mixture=mixture)
    return SampleOrder(buckets.num_samples, micro, ranks, 8 // (micro * ranks), seed, buckets)


def taken(order, epoch, consumed=0):
    """The samples that all ranks together read, in their order."""
    ranked = [list(order.steps(epoch, consumed, rank)) for rank in range(order.data_size)]
    return [
        int(row)
        for steps in zip(*ranked, strict=True)
        for micro in zip(*(indices for indices, _ in steps), strict=True)
        for rows in micro
        for row in rows
    ]


def row_facts(parts):
    """(source, bucket, tokens) of each row."""
    return [(part.source, part.bucket, int(length)) for part, lengths in parts for length in lengths]


MIXTURES = [None, Mixture({"zh": 0.8, "en": 0.2}, "repeat"), Mixture({"zh": 0.8, "en": 0.2}, "stop")]


@pytest.mark.parametrize("mixture", MIXTURES, ids=["no mixture", "repeat", "stop"])
def test_the_same_samples_on_1_2_and_4_ranks_one_bucket_before_the_next(mixture):
    parts = measured()
    facts = row_facts(parts)
    for epoch in (0, 1):
        whole = taken(order_of(parts, micro=8, mixture=mixture), epoch)
        for ranks in (1, 2, 4):
            order = order_of(parts, ranks=ranks, micro=8 // ranks, mixture=mixture)
            assert taken(order, epoch) == whole
            # With other micro batches, a different number is left over.
            other = taken(order_of(parts, ranks=ranks, micro=2, mixture=mixture), epoch)
            assert other[: len(whole)] == whole[: len(other)] and abs(len(other) - len(whole)) < 8
            # A position is a count of samples: another number of ranks continues in the middle of a bucket.
            assert taken(order, epoch, consumed=16) == whole[16:]
        buckets = [facts[row][1] for row in whole]
        assert buckets == sorted(buckets) == [order.bucket_of(place) for place in range(len(whole))]
        assert set(buckets) == {0, 1, 2} and len(order.epoch_rows(epoch)) - len(whole) == order.dropped_after(0)
    if mixture is None:
        assert sorted(order.epoch_rows(0)) == list(range(len(facts)))
    assert whole != taken(order_of(parts, mixture=mixture), 0)
    assert whole != taken(order_of(parts, mixture=mixture, seed=4), 1)


def test_sources_are_spread_evenly_over_a_bucket():
    parts = measured()
    facts = row_facts(parts)
    order = order_of(parts)
    start = 0
    for end in order.buckets.ends:
        here = [facts[row][0] for row in order.epoch_rows(0)[start:end]]
        total = Counter(here)
        for name in total:
            counts = np.cumsum([source == name for source in here])
            expected = total[name] * np.arange(1, len(here) + 1) / len(here)
            assert np.abs(counts - expected).max() <= 1 + len(total)
        start = end


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("end", ["repeat", "stop"])
@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.5, 0.5), (0.2, 0.8)])
def test_shares_by_tokens_within_1_percent_in_every_epoch(weights, end, bucketed):
    parts = measured()
    lengths = np.concatenate([lengths for _, lengths in parts])
    is_english = np.array([source == "en" for source, _, _ in row_facts(parts)])
    order = order_of(parts, bucketed=bucketed, mixture=Mixture(dict(zip(NAMES, weights, strict=True)), end))
    for epoch in range(4):
        rows = order.epoch_rows(epoch)
        assert len(rows) == order.num_samples
        for start, stop, portions in zip(
            [0, *order.buckets.ends], order.buckets.ends, order.buckets.portions, strict=False
        ):
            bucket = rows[start:stop]
            english = int(lengths[bucket[is_english[bucket]]].sum()) / int(lengths[bucket].sum())
            asked = weights[1] if len(portions) > 1 else 0
            assert abs(english - asked) < 0.01, (epoch, english)
            times = {portion.source: np.bincount(bucket, minlength=len(lengths))[portion.rows] for portion in portions}
            if end == "stop":
                assert max(count.max() for count in times.values()) == 1
                assert any(count.min() == 1 for count in times.values())
            else:
                assert set(times["zh"]) == {1}
                assert all(count.max() - count.min() <= 1 for count in times.values())


def test_samples_left_out_in_one_epoch_are_read_in_another():
    shapes = [("zh", 0, 100, 64), ("en", 0, 1000, 64)]
    order = order_of(measured(shapes), mixture=Mixture({"zh": 0.5, "en": 0.5}, "repeat"))
    epochs = -(-1000 // order.buckets.portions[0][1].taken)
    seen = {int(row) for epoch in range(epochs) for row in order.epoch_rows(epoch)}
    assert seen == set(range(1100))


def test_what_is_repeated_is_read_to_its_end_first():
    shapes = [("zh", 0, 1000, 64), ("en", 0, 30, 64)]
    parts = measured(shapes)
    order = order_of(parts, mixture=Mixture({"zh": 0.5, "en": 0.5}, "repeat"))
    english = [row for row in order.epoch_rows(0) if row >= 1000]
    assert len(english) > 300
    for start in range(0, len(english) // 30 * 30, 30):
        assert sorted(english[start : start + 30]) == list(range(1000, 1030))


def test_without_buckets_the_order_is_what_it_was():
    order = SampleOrder(num_samples=10, micro_batch_size=1, data_size=1, accumulation_steps=1, seed=1024)
    assert order.epoch_rows(1).tolist() == np.random.default_rng([1024, 1]).permutation(10).tolist()
    assert order.bucket_of(7) == 0
