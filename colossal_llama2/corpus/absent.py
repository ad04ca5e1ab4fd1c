"""Which values count as absent: those that `datasets` and pandas fill in where rows have different fields."""

from typing import Any


def is_absent(value: Any) -> bool:
    """True for null, NaN, an empty list or object, and a list or object that contains only such values.

    >>> is_absent({"name": None, "arguments": []}), is_absent(""), is_absent(0)
    (True, False, False)
    """
    if value is None:
        return True
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    if isinstance(value, list):
        return all(map(is_absent, value))
    # Only NaN is unequal to itself.
    return value != value
