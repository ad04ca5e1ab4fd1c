"""Cutting and splicing: nothing lost, nothing over length, nothing cut that fits, pieces in order."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset.write.splicing import (
    best_fit_decreasing,
    best_fit_in_windows,
    next_fit,
    piece_lengths,
    splice,
)

SPLICINGS = ("best_fit", "sequential", "none")


def test_piece_lengths():
    assert [piece_lengths(length, max_length=8) for length in (1, 8, 9, 16, 17, 20)] == [
        [1],
        [8],
        [7, 2],
        [8, 8],
        [8, 7, 2],
        [8, 8, 4],
    ]


def test_worked_examples_of_the_docstrings():
    assert best_fit_decreasing([3, 5, 6, 2, 4], capacity=10) == [[2, 4], [1, 0, 3]]
    assert next_fit([3, 5, 6, 2, 4], capacity=10) == [[0, 1], [2, 3], [4]]


@given(lengths=st.lists(st.integers(1, 20)), capacity=st.integers(20, 50))
def test_best_fit_places_each_item_once(lengths, capacity):
    groups = best_fit_decreasing(lengths, capacity=capacity)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[item] for item in group) for group in groups]
    assert all(room >= 0 for room in rooms)
    # A group is only opened if no other has room, so there cannot be two that are half empty.
    assert sum(2 * room >= capacity for room in rooms) <= 1


def test_best_fit_is_not_quadratic():
    lengths = np.random.default_rng(0).integers(1, 4096, size=100_000).tolist()
    start = time.process_time()
    groups = best_fit_decreasing(lengths, capacity=4096)
    assert time.process_time() - start < 5
    assert sum(lengths) / (len(groups) * 4096) > 0.99


@given(lengths=st.lists(st.integers(1, 20)), window=st.integers(4, 30))
def test_windows_place_each_item_once_and_end(lengths, window):
    groups = best_fit_in_windows(np.array(lengths, np.int32), capacity=20, window=window)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in group) <= 20 for group in groups)


def test_small_windows_hardly_cost_fill():
    lengths = np.random.default_rng(0).integers(1, 2048, size=20_000).astype(np.int32)
    whole, windowed = (best_fit_in_windows(lengths, capacity=2048, window=window) for window in (1 << 17, 2000))
    assert len(windowed) < 1.005 * len(whole)


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30),
    max_length=st.integers(8, 20),
    splicing=st.sampled_from(SPLICINGS),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_splice_places_each_piece_once_in_the_order_of_its_document(lengths, max_length, splicing, seed):
    cut_up = [piece_lengths(length, max_length=max_length) for length in lengths]
    pieces = np.array([piece for part in cut_up for piece in part], np.int32)
    documents = np.repeat(np.arange(len(cut_up)), [len(part) for part in cut_up])
    order, counts = splice(pieces, documents, max_length=max_length, splicing=splicing, seed=[seed, 0])
    assert sorted(order) == list(range(len(pieces))) and counts.sum() == len(pieces)
    ends = np.cumsum(counts)
    assert all(pieces[order[end - count : end]].sum() <= max_length for end, count in zip(ends, counts, strict=True))
    for document in range(len(cut_up)):
        own = [piece for piece in order if documents[piece] == document]
        assert own == sorted(own)
    if splicing == "sequential":
        assert list(order) == list(range(len(pieces)))
    if splicing == "none":
        assert set(counts) == {1}


@pytest.mark.parametrize("splicing", ["best_fit", "none"])
def test_splice_is_seeded_and_shuffles_also_inside_samples(splicing):
    lengths = np.array([3 + number % 5 for number in range(50)], np.int32)
    first, again, other = (
        splice(lengths, np.arange(50), max_length=16, splicing=splicing, seed=[seed, 0])[0].tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other
