"""Why a row cannot be used: a reason to count rows by, and a message for its line."""

from functools import partial
from typing import Any


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: a short phrase, the same for all rows that have this fault, such as "a message with tool calls". Rows
            are counted by it, so it holds nothing of the row.

    `str(error)` is the message for this row: what it holds, and what is allowed.
    """

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made anew of their `args` alone, and one that cannot be breaks the pool of its worker.
        return partial(type(self), reason=self.reason), self.args


def json_type(value: Any) -> str:
    """What a value of JSON is, in JSON's own words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "string", list: "list", dict: "object"}
    return f"a JSON {names.get(type(value), 'number')}"
