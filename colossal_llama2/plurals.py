"""A number and its noun in messages: "1 sample", "2 samples"."""


def counted(number: int, noun: str) -> str:
    """The number with thousands separators, and the noun, given in the singular, in the form that fits the number."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
