"""Why a row cannot be used: a reason to count rows by, and a message for its line."""

from functools import partial
from typing import Any, Dict, Sequence

from colossal_llama2.dataset.absent import is_absent

RECORDS_INSIDE = "an object that holds records, and is none itself"


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

    def __reduce__(self):
        # Exceptions are made anew of their `args` alone, and one that cannot be breaks the pool of its worker.
        return partial(type(self), reason=self.reason), self.args


def where_records_lie(row: Dict[str, Any], fields: Sequence[str]) -> str:
    """Where an object that is not a record holds some, as {"data": [...]} and {"id1": {...}, ...} do, and the cure.

    Args:
        fields: names of which a record has one.

    Returns:
        An empty string if its lists do not begin with a record, and not all its values are records.
    """

    def is_record(value: Any) -> bool:
        return isinstance(value, dict) and any(not is_absent(value.get(field)) for field in fields)

    for name, value in row.items():
        if isinstance(value, list) and value and is_record(value[0]):
            return f"the records lie in {name!r:.80}; write that list alone into the file"
    if row and all(is_record(value) for value in row.values()):
        return "each value of this object is a record; write them as one array, or one a line"
    return ""


def json_type(value: Any) -> str:
    """What a value of JSON is, in JSON's own words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "string", list: "list", dict: "object"}
    return f"a JSON {names.get(type(value), 'number')}"
