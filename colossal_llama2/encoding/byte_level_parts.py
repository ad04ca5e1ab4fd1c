"""Texts around a part of characters, which has no text of its own: e4bd, the first bytes of 你, is in 你 and in 佀."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from colossal_llama2.encoding.byte_level_file import bytes_of
from colossal_llama2.encoding.byte_level_tokens import CONTINUATION_BYTES

# More characters than this are represented by some of each general category of Unicode, by which pre-tokenizers divide.
MOST_COMPLETIONS = 128
FROM_EACH_CATEGORY = 8
# Surrogates, private and unassigned.
NOT_IN_TEXTS = ("Cs", "Co", "Cn")
# The number on each side where characters are needed on both.
MOST_OF_BOTH = 16


def texts_around(token: str) -> Iterator[str]:
    """Texts with the bytes of a part of characters, completed in front, behind, or both: "佀", "佁", ... for e4bd.

    Unassigned and private characters are left out. Of many characters, some of each general category stand for all.
    """
    content = bytes_of(token)
    start = next((place for place, byte in enumerate(content) if byte not in CONTINUATION_BYTES), len(content))
    whole = content[start:].decode(errors="ignore")
    rest = content[start + len(whole.encode()) :]
    before, after = _characters_ending(content[:start]), _characters_beginning(rest)
    if start and rest:
        before, after = _spread(before, MOST_OF_BOTH), _spread(after, MOST_OF_BOTH)
    for first in before:
        for last in after:
            yield f"{first}{whole}{last}"
    if start == len(content):
        yield from _characters_around(content)


@lru_cache(maxsize=1024)
def _characters_beginning(content: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 begins with these bytes and is longer; nothing to add for no bytes."""
    if not content:
        return ("",)
    length = 2 if content[0] < 0xE0 else 3 if content[0] < 0xF0 else 4
    missing = length - len(content)
    bits = _bits(content[1:], content[0] & (0x7F >> length))
    codes = range(bits << 6 * missing, (bits + 1) << 6 * missing)
    return _spread(text for text in _texts(codes) if text.encode().startswith(content))


@lru_cache(maxsize=1024)
def _characters_ending(content: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 ends with these bytes and is longer; nothing to add for no bytes."""
    if not content:
        return ("",)
    bits = _bits(content)
    codes = range(bits, 0x110000, 1 << 6 * len(content))
    return _spread(text for text in _texts(codes) if len(text.encode()) > len(content))


@lru_cache(maxsize=1024)
def _characters_around(content: bytes) -> tuple[str, ...]:
    """Characters whose UTF-8 has these continuation bytes inside, before its last byte."""
    bits = _bits(content)
    found: list[str] = []
    for length, most in ((3, 0xFFFF), (4, 0x10FFFF)):
        for place in range(1, length - len(content)):
            free = 6 * (length - place - len(content))
            rows = range(bits << free, most + 1, 1 << free + 6 * len(content))
            texts = _texts(code for row in rows for code in range(row, row + (1 << free)))
            found += (text for text in texts if text.encode()[place : place + len(content)] == content)
    return _spread(dict.fromkeys(found))


def _bits(continuation: bytes, first: int = 0) -> int:
    """The bits of a character's code in its continuation bytes, after those of the bytes before."""
    for byte in continuation:
        first = first << 6 | byte & 0x3F
    return first


def _texts(codes: Iterable[int]) -> Iterator[str]:
    """The characters with these codes that a text may have."""
    texts = (chr(code) for code in codes if code < 0x110000)
    return (text for text in texts if unicodedata.category(text) not in NOT_IN_TEXTS)


def _spread(characters: Iterable[str], most: int = MOST_COMPLETIONS) -> tuple[str, ...]:
    """All characters, or at most twice `most`: some of each general category in turn, and some at equal distances."""
    found = tuple(characters)
    if len(found) <= most:
        return found
    categories: dict[str, list[str]] = {}
    for character in found:
        categories.setdefault(unicodedata.category(character), []).append(character)
    few = [_evenly(members, FROM_EACH_CATEGORY) for members in categories.values()]
    turns = [members[turn] for turn in range(FROM_EACH_CATEGORY) for members in few if turn < len(members)]
    return tuple(dict.fromkeys([*turns[:most], *_evenly(found, most)]))


def _evenly(items: Sequence[str], most: int) -> list[str]:
    count = min(most, len(items))
    return [items[place * len(items) // count] for place in range(count)]
