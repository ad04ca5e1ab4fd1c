"""Numbers and lists in messages: "1 sample", "2 samples", "a, b, c and 5 more"."""

from collections.abc import Sequence

MOST_NAMED = 3


def counted(number: int, noun: str) -> str:
    """The number with thousands separators, and the noun, given in the singular, in the form that fits the number."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def some(names: Sequence[str], most: int = MOST_NAMED) -> str:
    """The first names, and how many there are besides."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
