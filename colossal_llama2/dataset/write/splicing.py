"""Decide which pieces share a sample, and the order of the samples in a bin, from lengths alone.

Every piece is used exactly once.
"""

from collections.abc import Iterable, Sequence

import numpy as np

# Pieces handled together: best fit needs some hundred bytes for each of them in Python.
WINDOW_PIECES = 1 << 17
FULL_ENOUGH = 0.995


def piece_lengths(length: int, *, max_length: int) -> list[int]:
    """Lengths of the pieces that a document of `length` tokens is cut into, in order; `max_length` is at least 3.

    All pieces are full except the last. A last piece of one token would carry no loss, because nothing predicts its
    only token, so it gets a second token from the piece before it.

    >>> piece_lengths(8, max_length=8), piece_lengths(20, max_length=8), piece_lengths(17, max_length=8)
    ([8], [8, 8, 4], [8, 7, 2])
    """
    full, rest = divmod(length, max_length)
    pieces = [max_length] * full + ([rest] if rest else [])
    if len(pieces) > 1 and rest == 1:
        pieces[-2:] = [max_length - 1, 2]
    return pieces


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Group items into few groups whose lengths add up to at most `capacity`, by best-fit-decreasing bin packing.

    Items go in order of decreasing length (equal ones in their order), each into the fullest group that has room for
    it. Returns the item indices of each group. For lengths 6, 5, 4, 3, 2 and capacity 10: 6 opens a group, 5 another
    one, 4 fits best with the 6 (room 4), 3 and 2 fit with the 5:

    >>> best_fit_decreasing([3, 5, 6, 2, 4], capacity=10)
    [[2, 4], [1, 0, 3]]
    """
    groups: list[list[int]] = []
    groups_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some group has room r. The tightest fit is the lowest set bit at or above the item's length:
    # one shift of an integer of `capacity` bits, for any number of groups.
    rooms = 0
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
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


def next_fit(lengths: Iterable[int], *, capacity: int) -> list[list[int]]:
    """Group consecutive items: a new group begins where the next item does not fit.

    >>> next_fit([3, 5, 6, 2, 4], capacity=10)
    [[0, 1], [2, 3], [4]]
    """
    groups: list[list[int]] = []
    room = -1
    for item, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = capacity
        groups[-1].append(item)
        room -= length
    return groups


def best_fit_in_windows(lengths: np.ndarray, *, capacity: int, window: int = WINDOW_PIECES) -> list[np.ndarray]:
    """`best_fit_decreasing` in memory bounded by `window` items, plus eight bytes per item for the result.

    Groups of a window that are not full are opened again in the next window, up to half a window of items.
    """
    finished: list[np.ndarray] = []
    carried = np.zeros(0, np.int32)
    start = 0
    while start < len(lengths) or len(carried):
        stop = min(start + window - len(carried), len(lengths))
        items = np.concatenate([carried, np.arange(start, stop, dtype=np.int32)])
        start = stop
        groups = best_fit_decreasing(lengths[items].tolist(), capacity=capacity)
        members = [items[group] for group in groups]
        if start == len(lengths):
            return finished + members
        fills = np.array([lengths[group].sum() for group in members])
        carried_groups: list[np.ndarray] = []
        room = window // 2
        for index in np.argsort(fills, kind="stable"):
            group = members[index]
            if fills[index] >= FULL_ENOUGH * capacity or len(group) > room:
                finished.append(group)
            else:
                carried_groups.append(group)
                room -= len(group)
        carried = np.concatenate([*carried_groups, np.zeros(0, np.int32)])
    return finished


def group_pieces(lengths: np.ndarray, *, max_length: int, splicing: str) -> list[np.ndarray]:
    """The pieces of each sample, as indices; `splicing` is "best_fit", "sequential" or "none"."""
    if splicing == "best_fit":
        return best_fit_in_windows(lengths, capacity=max_length)
    if splicing == "sequential":
        return [np.array(group, np.int32) for group in next_fit(lengths.tolist(), capacity=max_length)]
    return list(np.arange(len(lengths), dtype=np.int32)[:, None])


def splice(
    lengths: np.ndarray, documents: np.ndarray, *, max_length: int, splicing: str, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Arrange the pieces of one bin, given in the order of the input, into samples.

    Args:
        lengths: (pieces,) tokens of each piece, at most `max_length`.
        documents: (pieces,) the number of each piece's document; the pieces of a document follow each other.
        seed: for the order of the samples, and of the pieces in a sample. "sequential" keeps the input order.

    Returns:
        (pieces,) the pieces in the order of the samples, and (samples,) how many pieces each sample has. The pieces
        of a cut document keep their order.
    """
    groups = group_pieces(lengths, max_length=max_length, splicing=splicing)
    if splicing != "sequential":
        generator = np.random.default_rng(seed)
        groups = [groups[index] for index in generator.permutation(len(groups))]
        _keep_order_of_cut_documents(groups, documents)
    counts = np.array([len(group) for group in groups], dtype=np.int32)
    pieces = np.concatenate(groups) if groups else np.zeros(0, np.int32)
    if splicing == "best_fit":
        # Shuffle inside the samples; otherwise long pieces would always come before short ones.
        keys = generator.random(len(pieces))
        pieces = pieces[np.lexsort((keys, np.repeat(np.arange(len(groups)), counts)))]
    return pieces, counts


def _keep_order_of_cut_documents(groups: list[np.ndarray], documents: np.ndarray) -> None:
    """Reorder groups so that the pieces of each cut document are in the order of their indices.

    All pieces of such a document except the last fill a sample each. So a sample with a last piece that comes too early
    is swapped with the latest of those samples, and then these are sorted over their places.
    """
    follows = documents[1:] == documents[:-1]
    is_first_or_middle = np.append(follows, False)
    is_cut = is_first_or_middle | np.append(False, follows)
    is_last = is_cut & ~is_first_or_middle
    places: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if len(group) == 1 and is_first_or_middle[group[0]]:
            places.setdefault(int(documents[group[0]]), []).append(place)
    if not places:
        return
    for place in range(len(groups)):
        while True:
            ends = documents[groups[place][is_last[groups[place]]]].tolist()
            document = max(ends, key=lambda end: max(places[end]), default=None)
            if document is None or max(places[document]) < place:
                break
            latest = max(places[document])
            groups[place], groups[latest] = groups[latest], groups[place]
            places[document][places[document].index(latest)] = place
    for own in places.values():
        ordered = sorted((groups[place] for place in own), key=lambda group: int(group[0]))
        for place, group in zip(sorted(own), ordered, strict=True):
            groups[place] = group
