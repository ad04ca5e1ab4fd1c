"""Which rows are computed together: rows of similar length, and those that share a beginning after it is computed once.

The order of the rows depends on the rows alone, so a restarted command and any number of ranks have the same batches.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from colossal_llama2.evaluation.task import Row

# A shorter beginning is not worth its own forward pass.
LEAST_SHARED = 32


class Batch(NamedTuple):
    """Rows of one forward pass, and the ids that all of them begin with; each row is longer than these."""

    shared: tuple[int, ...]
    rows: list[Row]


class Room(NamedTuple):
    """How much is computed together.

    Attributes:
        rows: if given, the most rows of a batch; the two numbers of tokens are then not used.
        computed: the most tokens of a batch that are computed.
        kept: the most tokens whose states are kept.
        padding: the most tokens that a row is padded by; None for any number.
    """

    rows: int | None
    computed: int
    kept: int
    padding: int | None = None

    def holds(self, rows: int, *, shared: int, longest: int, shortest: int, new_tokens: int) -> bool:
        """Whether so many rows of these lengths in tokens fit; one always does."""
        if rows > 1 and self.padding is not None and longest - shortest > self.padding:
            return False
        if rows == 1 or self.rows is not None:
            return rows <= max(self.rows or 0, 1)
        return rows * (longest - shared) <= self.computed and rows * (longest + new_tokens) <= self.kept


def batches_of(rows: Sequence[Row], room: Room, *, new_tokens: int) -> list[Batch]:
    """All rows in batches: group by group, then the rows that share nothing; the longest rows first."""
    found: list[Batch] = []
    for shared, members in _groups(rows):
        batch: list[Row] = []
        for row in sorted(members, key=lambda row: (-len(row.ids), row.item)):
            longest, shortest, count = len((batch or [row])[0].ids), len(row.ids), len(batch) + 1
            if batch and not room.holds(
                count, shared=len(shared), longest=longest, shortest=shortest, new_tokens=new_tokens
            ):
                found.append(Batch(shared, batch))
                batch = []
            batch.append(row)
        found.append(Batch(shared, batch))
    return found


def _groups(rows: Sequence[Row]) -> list[tuple[tuple[int, ...], list[Row]]]:
    """Each shared beginning with its rows; last, without one, all other rows."""
    members: dict[Hashable, list[Row]] = {}
    for row in rows:
        members.setdefault(row.group, []).append(row)
    found, others = [], []
    for group, inside in members.items():
        shared = _common([list(row.ids) for row in inside]) if group is not None and len(inside) > 1 else ()
        if len(shared) >= LEAST_SHARED:
            found.append((shared, inside))
        else:
            others += inside
    return [*found, *([((), others)] if others else [])]


def _common(rows: Sequence[list[int]]) -> tuple[int, ...]:
    """What all rows begin with, without the last token of any."""
    least, most = min(rows), max(rows)
    length = next(
        (place for place, (one, other) in enumerate(zip(least, most, strict=False)) if one != other), len(least)
    )
    return tuple(least[: min(length, *(len(row) - 1 for row in rows))])
