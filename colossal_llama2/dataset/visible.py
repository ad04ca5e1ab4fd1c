"""Text of unknown origin for a terminal: every character that is not plainly one is written out, none is obeyed.

    a line break     ␊ and then the break         ESC     ␛        right-to-left override    <U+202E>

What stands for something else cannot be spelt by the text itself: its own ␛, and the "<" of its own <s>, </s> and
<U+..., are written by number as well.
"""

import re
import unicodedata

# Controls, format characters (direction, joining), halves of surrogate pairs, private use, line separators.
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
# Unicode's pictures of the 32 ASCII controls, of the space, and of DEL.
PICTURES = range(0x2400, 0x2422)
DELETE = 0x7F
LOOKS_LIKE_OURS = re.compile(r"<(?=/?s>|U\+)")


def visible(text: str) -> str:
    """`text` with its control characters shown; a line break is shown and kept."""
    quoted = LOOKS_LIKE_OURS.split(text)
    return _by_number("<").join("".join(map(_shown, part)) for part in quoted)


def visible_line(text: str) -> str:
    """The same on one line: a line break is shown alone."""
    return visible(text).replace("\n", "")


def terminal_width(text: str) -> int:
    """How many columns of a terminal `text` takes: Chinese characters take two each."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return chr(PICTURES[code]) + character
    if code < 32:
        return chr(PICTURES[code])
    if code == DELETE:
        return chr(PICTURES[-1])
    if code in PICTURES or unicodedata.category(character) in HIDDEN_CATEGORIES:
        return _by_number(character)
    return character


def _by_number(character: str) -> str:
    return f"<U+{ord(character):04X}>"
