"""Errors of single rows: a reason to count rows by, and a message for the line."""

from functools import partial
from typing import Any


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: a short phrase, the same for all rows with this fault, such as "a message with tool calls". Rows are
            counted by it, so it has no content of the row.

    `str(error)` is the message for this row: what it has, and what is allowed.
    """

    def __init__(self, message: str, *, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling an exception passes only its `args`; if that fails, the pool of the worker breaks.
        return partial(type(self), reason=self.reason), self.args


def json_type(value: Any) -> str:
    """The JSON type of a value, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "string", list: "list", dict: "object"}
    return f"a JSON {names.get(type(value), 'number')}"
