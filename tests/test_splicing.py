"""Dealing, cutting and splicing: nothing lost, nothing over length, nothing cut that fits."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.splicing import (
    TokenSequence,
    best_fit_decreasing,
    cut,
    deal_to_bins,
    has_trained_token,
    piece_lengths,
    splice,
)


def document(number: int, length: int, masked: int = 0) -> TokenSequence:
    """A document whose every token is unique among documents, its first `masked` labels -100."""
    ids = np.arange(length, dtype=np.int32) + number * 10_000
    labels = ids.copy()
    labels[:masked] = IGNORE_INDEX
    return TokenSequence(ids, labels)


def pairs(tokens: TokenSequence) -> list:
    """Each token with its label."""
    return np.stack(tokens, axis=1).tolist()


def test_piece_lengths():
    assert [piece_lengths(length, max_length=8) for length in (1, 8, 9, 16, 17, 20)] == [
        [1], [8], [7, 2], [8, 8], [8, 7, 2], [8, 8, 4],
    ]  # fmt: skip


def test_worked_examples_of_the_docstrings():
    assert best_fit_decreasing([3, 5, 6, 2, 4], capacity=10) == [[2, 4], [1, 0, 3]]
    assert deal_to_bins(["a", "a", "b", "b"], [10, 7, 4, 3], num_bins=2) == [[0, 3], [1, 2]]
    documents = [document(number, length) for number, length in enumerate((11, 5, 2))]
    pieces = [piece for whole in documents for piece in cut(whole, max_length=8)]
    samples = splice(pieces, max_length=8, seed=0)
    assert sorted(len(sample.input_ids) for sample in samples) == [2, 8, 8]


@given(lengths=st.lists(st.integers(1, 20)), capacity=st.integers(20, 50))
def test_best_fit_places_each_item_once(lengths, capacity):
    groups = best_fit_decreasing(lengths, capacity=capacity)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[item] for item in group) for group in groups]
    assert all(room >= 0 for room in rooms)
    # A group is only opened when no other has room, so two half-empty ones cannot exist.
    assert sum(2 * room >= capacity for room in rooms) <= 1


def test_best_fit_is_not_quadratic():
    lengths = np.random.default_rng(0).integers(1, 4096, size=100_000).tolist()
    start = time.process_time()
    groups = best_fit_decreasing(lengths, capacity=4096)
    assert time.process_time() - start < 5
    assert sum(lengths) / (len(groups) * 4096) > 0.99


@given(
    shapes=st.lists(st.tuples(st.integers(2, 60), st.integers(0, 60)), min_size=1, max_size=12),
    max_length=st.integers(3, 20),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_splice_loses_and_cuts_nothing(shapes, max_length, seed):
    documents = [document(number, length, min(masked, length - 1)) for number, (length, masked) in enumerate(shapes)]
    cut_up = [cut(whole, max_length=max_length) for whole in documents]
    pieces = [piece for part in cut_up for piece in part]
    masked_pieces = [piece for piece in pieces if not has_trained_token(piece)]
    samples = splice([piece for piece in pieces if has_trained_token(piece)], max_length=max_length, seed=seed)
    everything = [*samples, *masked_pieces]
    assert all(len(part.input_ids) == len(part.labels) <= max_length for part in everything)
    # Tokens are unique, so equal sorted pairs mean: each token once, beside its own label.
    before = sorted(pair for whole in documents for pair in pairs(whole))
    after = sorted(pair for part in everything for pair in pairs(part))
    assert before == after
    assert all((part.labels == IGNORE_INDEX).all() for part in masked_pieces)
    # Every sample has a token that is predicted from the one before it: its loss is a number.
    assert all((part.labels[1:] != IGNORE_INDEX).any() for part in samples)
    for whole in documents:
        if len(whole.input_ids) <= max_length:
            holder = next(part for part in everything if whole.input_ids[0] in part.input_ids)
            start = holder.input_ids.tolist().index(whole.input_ids[0])
            assert (holder.input_ids[start : start + len(whole.input_ids)] == whole.input_ids).all()


def test_splice_is_seeded():
    documents = [document(number, 3 + number % 5) for number in range(50)]
    first, again, other = (splice(documents, max_length=16, seed=seed) for seed in (1, 1, 2))
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(first, again, strict=True))
    assert [a.input_ids.tolist() for a in first] != [b.input_ids.tolist() for b in other]


def test_pieces_of_a_long_source_keep_their_order_and_are_told_apart():
    pieces = cut(document(0, 30, masked=27), max_length=8)
    assert [(piece.input_ids[0], piece.input_ids[-1]) for piece in pieces] == [(0, 7), (8, 15), (16, 23), (24, 29)]
    assert [has_trained_token(piece) for piece in pieces] == [False, False, False, True]


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 100)), min_size=1, max_size=60),
    num_bins=st.integers(1, 9),
)
def test_deal_spreads_categories_and_leaves_no_bin_empty(rows, num_bins):
    categories, lengths = zip(*rows, strict=True)
    bins = deal_to_bins(categories, lengths, num_bins=num_bins)
    assert len(bins) == num_bins
    assert sorted(index for indices in bins for index in indices) == list(range(len(rows)))
    assert all(bins) or len(rows) < num_bins
    for category in set(categories):
        counts = [sum(categories[index] == category for index in indices) for indices in bins]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_bins", [7, 10])
def test_deal_evens_out_tokens(num_bins):
    lengths = np.random.default_rng(0).lognormal(6, 1, size=5000).astype(int).tolist()
    bins = deal_to_bins(["a"] * 5000, lengths, num_bins=num_bins)
    totals = [sum(lengths[index] for index in indices) for indices in bins]
    assert max(totals) / min(totals) < 1.01
