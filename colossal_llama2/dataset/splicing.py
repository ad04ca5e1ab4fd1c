"""How tokenized documents become samples: cut where they are too long, dealt to bins, spliced together.

Every token that goes in comes out, once.
"""

import random
from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from colossal_llama2.dataset import IGNORE_INDEX


class TokenSequence(NamedTuple):
    """A document, a piece of one, or a sample: two int32 arrays of shape (length,)."""

    input_ids: np.ndarray
    labels: np.ndarray


def deal_to_bins(categories: Sequence[str], lengths: Sequence[int], *, num_bins: int) -> List[List[int]]:
    """Deal items (pieces or conversations) to `num_bins` bins so that each category and the tokens are spread evenly.

    A category is dealt in rounds of `num_bins` items, longest first, one to a bin: its count differs by one at most
    between bins. In a round the longest item goes to the bin with the fewest tokens. With at least as many items as
    bins, no bin stays empty, since an empty bin has the fewest tokens.

    Returns the indices of each bin's items, ascending. The result depends on the arguments alone.

    >>> deal_to_bins(["a", "a", "b", "b"], [10, 7, 4, 3], num_bins=2)
    [[0, 3], [1, 2]]
    """
    by_category: Dict[str, List[int]] = {}
    for index, category in enumerate(categories):
        by_category.setdefault(category, []).append(index)
    bins: List[List[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    for indices in by_category.values():
        indices.sort(key=lambda index: -lengths[index])
        for start in range(0, len(indices), num_bins):
            lightest_first = sorted(range(num_bins), key=tokens.__getitem__)
            for index, target in zip(indices[start : start + num_bins], lightest_first, strict=False):
                bins[target].append(index)
                tokens[target] += lengths[index]
    return [sorted(indices) for indices in bins]


def piece_lengths(length: int, *, max_length: int) -> List[int]:
    """Lengths of the pieces that a document of `length` tokens is cut into, in order; `max_length` is at least 3.

    All are full but the last. A last piece of one token has no loss (nothing in it is predicted from anything), so
    it takes a second token from its neighbour.

    >>> piece_lengths(8, max_length=8), piece_lengths(20, max_length=8), piece_lengths(17, max_length=8)
    ([8], [8, 8, 4], [8, 7, 2])
    """
    full, rest = divmod(length, max_length)
    pieces = [max_length] * full + ([rest] if rest else [])
    if len(pieces) > 1 and rest == 1:
        pieces[-2:] = [max_length - 1, 2]
    return pieces


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> List[List[int]]:
    """Group items so that the lengths in a group add up to `capacity` at most, with as few groups as this finds.

    Items are taken longest first (equal ones in their order), each into the fullest group that has room for it.
    Returns each group's item indices. Of lengths 6, 5, 4, 3, 2 at capacity 10: 6 opens a group, 5 another, 4 fits
    best with the 6 (room 4), 3 and 2 fit with the 5:

    >>> best_fit_decreasing([3, 5, 6, 2, 4], capacity=10)
    [[2, 4], [1, 0, 3]]
    """
    groups: List[List[int]] = []
    groups_with_room: List[List[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some group has room r, so the tightest fit is the lowest set bit from the item's length on:
    # one shift of a capacity-long integer, whatever the number of groups.
    rooms = 0
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            group = groups_with_room[room].pop()
            if not groups_with_room[room]:
                rooms ^= 1 << room
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(item)
        room -= length
        groups_with_room[room].append(group)
        rooms |= 1 << room
    return groups


def cut(document: TokenSequence, *, max_length: int) -> List[TokenSequence]:
    """The pieces of a document in order, each of at most `max_length` tokens; one that fits is its only piece."""
    pieces = []
    start = 0
    for length in piece_lengths(len(document.input_ids), max_length=max_length):
        stop = start + length
        pieces.append(TokenSequence(document.input_ids[start:stop], document.labels[start:stop]))
        start = stop
    return pieces


def has_trained_token(piece: TokenSequence) -> bool:
    """False if every label is -100: a sample of such pieces alone would have the loss 0/0."""
    return bool((piece.labels != IGNORE_INDEX).any())


def splice(pieces: Sequence[TokenSequence], *, max_length: int, seed: int) -> List[TokenSequence]:
    """Join the pieces of one bin into samples of at most `max_length` tokens, none longer itself, in a seeded order.

    Pieces are grouped by best fit. Inside a sample they are shuffled, or long documents would always stand before
    short ones; two pieces of one document never share a sample, since together they are over `max_length`.

    Documents of 11, 5 and 2 tokens at max_length 8: `cut` makes 8 + 3, 5 and 2; the samples hold 8, 5 + 3, and 2.
    """
    groups = best_fit_decreasing([len(piece.input_ids) for piece in pieces], capacity=max_length)
    generator = random.Random(seed)
    generator.shuffle(groups)
    samples = []
    for group in groups:
        generator.shuffle(group)
        input_ids = np.concatenate([pieces[item].input_ids for item in group])
        labels = np.concatenate([pieces[item].labels for item in group])
        samples.append(TokenSequence(input_ids, labels))
    return samples
