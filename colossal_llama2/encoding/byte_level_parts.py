"""Texts around a part of characters, which has no text of its own: e4bd, the first bytes of 你, is in 你 and in 佀."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from colossal_llama2.encoding.byte_level_file import bytes_of
from colossal_llama2.encoding.byte_level_tokens import CONTINUATION_BYTES

# More characters than this are represented by some of each general category of Unicode, by which pre-tokenizers divide.
MOST_COMPLETIONS = 128
FROM_EACH_CATEGORY = 8
# Where characters are needed on both sides, so many of each.
MOST_OF_BOTH = 32


def texts_around(token: str) -> Iterator[str]:
    """Texts with the bytes of a part of characters, completed in front, behind, or both: "佀", "佁", ... for e4bd."""
    content = bytes_of(token)
    start = next((place for place, byte in enumerate(content) if byte not in CONTINUATION_BYTES), len(content))
    whole = content[start:].decode(errors="ignore")
    rest = content[start + len(whole.encode()) :]
    before, after = _characters_ending(content[:start]), _characters_beginning(rest)
    if start and rest:
        before, after = before[:MOST_OF_BOTH], after[:MOST_OF_BOTH]
    for first in before:
        for last in after:
            yield f"{first}{whole}{last}"


@lru_cache(maxsize=1024)
def _characters_beginning(content: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 begins with these bytes and is longer; nothing to add for no bytes."""
    if not content:
        return ("",)
    length = 2 if content[0] < 0xE0 else 3 if content[0] < 0xF0 else 4
    missing = length - len(content)
    bits = content[0] & (0x7F >> length)
    for byte in content[1:]:
        bits = bits << 6 | byte & 0x3F
    codes = range(bits << 6 * missing, (bits + 1) << 6 * missing)
    return _spread(text for text in _texts(codes) if text.encode().startswith(content))


@lru_cache(maxsize=1024)
def _characters_ending(content: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 ends with these bytes and is longer; nothing to add for no bytes."""
    if not content:
        return ("",)
    bits = 0
    for byte in content:
        bits = bits << 6 | byte & 0x3F
    codes = range(bits, 0x110000, 1 << 6 * len(content))
    return _spread(text for text in _texts(codes) if len(text.encode()) > len(content))


def _texts(codes: Iterable[int]) -> Iterator[str]:
    return (chr(code) for code in codes if code < 0x110000 and not 0xD800 <= code < 0xE000)


def _spread(characters: Iterable[str]) -> tuple[str, ...]:
    """All characters, or some of each general category in turn."""
    found = tuple(characters)
    if len(found) <= MOST_COMPLETIONS:
        return found
    categories: dict[str, list[str]] = {}
    for character in found:
        categories.setdefault(unicodedata.category(character), []).append(character)
    few = [_evenly(members, FROM_EACH_CATEGORY) for members in categories.values()]
    turns = (members[turn] for turn in range(FROM_EACH_CATEGORY) for members in few if turn < len(members))
    return tuple(dict.fromkeys([*turns, *_evenly(found, MOST_COMPLETIONS)]))


def _evenly(items: Sequence[str], most: int) -> list[str]:
    count = min(most, len(items))
    return [items[place * len(items) // count] for place in range(count)]
