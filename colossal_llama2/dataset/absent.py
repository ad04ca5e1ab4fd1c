"""Which values are as good as absent: what `datasets` fills in where it merges rows that have different fields."""

from typing import Any


def is_absent(value: Any) -> bool:
    """True for null, for an empty list or object, and for one that holds nothing else.

    >>> is_absent({"name": None, "arguments": []}), is_absent(""), is_absent(0)
    (True, False, False)
    """
    if value is None:
        return True
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    return isinstance(value, list) and all(map(is_absent, value))
