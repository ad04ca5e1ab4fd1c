"""--group_by_length: every sample once, less padding, and an order that ranks and batches do not change."""

import numpy as np
import pytest

from colossal_llama2.dataset.read.buckets import MeasuredPart, make_buckets
from colossal_llama2.dataset.read.length_groups import grouped_by_length
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Data, Part


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(3).lognormal(5, 1, count).astype(np.int64) + 1


def padding(order: SampleOrder, lengths: np.ndarray) -> float:
    """The share of padding in an epoch of one rank."""
    batches = [rows for step, _ in order.steps(0, 0, 0) for rows in step]
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    return 1 - sum(lengths[rows].sum() for rows in batches) / padded


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000, 20_000])
def test_every_sample_once_in_every_epoch(count):
    lengths = lengths_of(count)
    orders = []
    for epoch in range(2):
        rows = np.random.default_rng(epoch).permutation(count)
        regrouped = grouped_by_length(rows, lengths, seed=1, epoch=epoch)
        assert sorted(regrouped) == list(range(count))
        assert (regrouped == grouped_by_length(rows, lengths, seed=1, epoch=epoch)).all()
        orders.append(regrouped)
    assert count < 64 or (orders[0] != orders[1]).any()
    assert not len(grouped_by_length(np.zeros(0, np.int64), lengths, seed=1, epoch=0))


@pytest.mark.parametrize("micro, ranks", [(8, 1), (8, 4), (2, 3)])
def test_less_padding(micro, ranks):
    lengths = lengths_of(5000)
    plain = SampleOrder(5000, micro, ranks, 1, seed=7)
    grouped = SampleOrder(5000, micro, ranks, 1, seed=7, lengths=lengths)
    assert padding(grouped, lengths) < 0.2 * padding(plain, lengths)
    # Each window of the epoch has its share of the tokens.
    windows = [lengths[rows].sum() for rows in np.split(grouped.epoch_rows(0)[:4096], 4)]
    assert max(windows) < 1.2 * min(windows)


def test_ranks_and_batches_do_not_change_the_order():
    lengths = lengths_of(500)
    orders = [
        SampleOrder(500, micro, ranks, steps, seed=7, lengths=lengths).epoch_rows(1)
        for micro, ranks, steps in [(1, 1, 8), (8, 1, 1), (2, 4, 1)]
    ]
    assert all((order == orders[0]).all() for order in orders)


def test_buckets_stay_in_order():
    lengths = [lengths_of(100), lengths_of(80), lengths_of(60)]
    parts = [Part(path=f"s/part-0000{number}", source="s", bucket=number) for number in range(3)]
    measured = [MeasuredPart(part, own) for part, own in zip(parts, lengths, strict=True)]
    buckets = make_buckets(measured, bucketed=True, mixture=None)
    order = SampleOrder(240, 4, 1, 1, seed=7, buckets=buckets, lengths=np.concatenate(lengths))
    rows = order.epoch_rows(0)
    assert sorted(rows[:100]) == list(range(100)) and sorted(rows[100:180]) == list(range(100, 180))
    assert (rows != buckets.rows(seed=7, epoch=0)).any()


def test_a_resumed_run_needs_the_same_choice():
    assert Data([], groups_by_length=True).facts()["groups_by_length"] is True
    # As in checkpoints of earlier versions.
    assert Data([]).facts()["groups_by_length"] is None
    assert Data([], groups_by_length=True).needs_lengths and not Data([]).needs_lengths
