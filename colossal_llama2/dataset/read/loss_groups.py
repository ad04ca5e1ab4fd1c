"""Group tokens by (source, category) of their document, for losses and counts by group.

A group is a pair such as ("zh", "news"). Groups are numbered in the order of their names.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS, DOCUMENT_NAMES, IGNORE_INDEX, SCAN_ROWS

if TYPE_CHECKING:
    import datasets

# More curves than this are not readable.
MAX_GROUPS = 256


class Amount(NamedTuple):
    """The amount of data in a group: pieces of documents, and tokens, in one epoch."""

    source: str
    category: str
    pieces: int
    tokens: int


def amounts(dataset: "datasets.Dataset", *, share: int = 0, shares: int = 1) -> list[Amount] | None:
    """The amount of each group in one of `shares` equal shares of the data; None if the data has no group columns."""
    import pyarrow
    import pyarrow.compute as compute

    columns = [*DOCUMENT_NAMES, DOCUMENT_LENGTHS]
    if not set(columns) <= set(dataset.column_names):
        return None
    part = dataset.select_columns(columns)
    part = part.select(range(len(dataset) * share // shares, len(dataset) * (share + 1) // shares))
    found = []
    for rows in part.iter(SCAN_ROWS):
        flat = pyarrow.table({name: compute.list_flatten(rows[name]) for name in columns})
        sums = flat.group_by(DOCUMENT_NAMES).aggregate([(DOCUMENT_LENGTHS, "count"), (DOCUMENT_LENGTHS, "sum")])
        sums = sums.select([*DOCUMENT_NAMES, f"{DOCUMENT_LENGTHS}_count", f"{DOCUMENT_LENGTHS}_sum"])
        found += [Amount(*row.values()) for row in sums.to_pylist()]
    return merged(found)


def merged(found: Iterable[Sequence[Any]]) -> list[Amount]:
    """The sums of amounts by group, in the order of names."""
    sums: dict[tuple[str, str], list[int]] = {}
    for source, category, pieces, tokens in found:
        total = sums.setdefault((source or "", category or ""), [0, 0])
        total[0] += pieces
        total[1] += tokens
    return [Amount(*group, *sums[group]) for group in sorted(sums)]


class Groups:
    """Numbers the groups of `pairs` (source, category)."""

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.pairs = list(pairs)
        self._numbers = {pair: number for number, pair in enumerate(self.pairs)}

    def of_predicted(self, rows: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of the token that each token predicts, and the number of predicted tokens in each group.

        Args:
            rows: arrow table with the columns DOCUMENT_LENGTHS and DOCUMENT_NAMES.
            labels: (rows, width), padded with IGNORE_INDEX.

        Returns:
            (rows, width) int64, 0 where nothing is predicted; and (groups,) int64.
        """
        groups = np.zeros(labels.shape, dtype=np.int64)
        lengths, sources, categories = (rows[name].to_pylist() for name in (DOCUMENT_LENGTHS, *DOCUMENT_NAMES))
        for row, pairs in enumerate(zip(sources, categories, strict=True)):
            numbers = [self._numbers[source or "", category or ""] for source, category in zip(*pairs, strict=True)]
            of_tokens = np.repeat(numbers, lengths[row])
            groups[row, : len(of_tokens) - 1] = of_tokens[1:]
        is_predicted = np.zeros(labels.shape, dtype=bool)
        is_predicted[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        groups[~is_predicted] = 0
        return groups, np.bincount(groups[is_predicted], minlength=len(self.pairs))


def by_name(pairs: Sequence[tuple[str, str]], values: Sequence[float], *, column: int) -> dict[str, float]:
    """Values of groups, summed by source (`column` 0) or by category (1)."""
    sums: dict[str, float] = {}
    for pair, value in zip(pairs, values, strict=True):
        sums[pair[column]] = sums.get(pair[column], 0.0) + value
    return sums
