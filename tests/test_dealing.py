"""Dealing to bins: categories even, tokens within one piece, no bin empty, in one pass or in many parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama2.dataset.write.assign_bins import Dealer
from colossal_llama2.dataset.write.bins import MEMBER


def members(categories, lengths) -> np.ndarray:
    """Entries with these categories and lengths; `offset` numbers them."""
    entries = np.zeros(len(lengths), MEMBER)
    entries["category"], entries["length"], entries["offset"] = categories, lengths, np.arange(len(lengths))
    return entries


def deal(entries: np.ndarray, *, num_bins: int, parts: int = 1):
    """All dealt entries, and the bin of each."""
    dealer = Dealer(num_bins)
    dealt = [dealer.deal(part) for part in np.array_split(entries, parts)]
    dealt.append(dealer.finish())
    return tuple(np.concatenate(column) for column in zip(*dealt, strict=True))


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(2, 100)), min_size=1, max_size=60),
    num_bins=st.integers(1, 9),
    parts=st.integers(1, 4),
)
def test_categories_and_tokens_are_even_and_no_bin_is_empty(rows, num_bins, parts):
    entries = members(*zip(*rows, strict=True))
    dealt, bins = deal(entries, num_bins=num_bins, parts=parts)
    assert sorted(dealt["offset"]) == list(range(len(rows)))
    assert set(bins) <= set(range(num_bins))
    assert len(set(bins)) == num_bins or len(rows) < num_bins
    tokens = np.bincount(bins, weights=dealt["length"], minlength=num_bins)
    assert tokens.max() - tokens.min() <= entries["length"].max()
    for category in range(3):
        counts = np.bincount(bins[dealt["category"] == category], minlength=num_bins)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_bins", [7, 10])
def test_bins_have_nearly_the_same_number_of_tokens(num_bins):
    lengths = np.random.default_rng(0).lognormal(6, 1, size=5000).astype(int)
    dealt, bins = deal(members(np.zeros(5000), lengths), num_bins=num_bins, parts=5)
    tokens = np.bincount(bins, weights=dealt["length"])
    assert tokens.max() / tokens.min() < 1.01
