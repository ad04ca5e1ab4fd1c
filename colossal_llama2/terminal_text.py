"""Text of unknown origin for a terminal, escaped to two degrees.

    printable, one_line      only what a terminal would act on is escaped: for names, messages, answers
    visible, visible_line    every character without a glyph is escaped: for inspecting data

    ESC   ␛      right-to-left override   <U+202E>      a line break in `visible`   ␊ and then the break

Escapes in `visible` are unambiguous: a literal ␛ in the text, and the "<" of a literal <s>, </s> or <U+..., are written
by number.
"""

import re
import sys
import unicodedata
from contextlib import suppress
from typing import TextIO

# Controls, format characters (direction, joining), halves of surrogate pairs, private use, line separators.
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
# Unicode's pictures of the 32 ASCII controls, of the space, and of DEL.
PICTURES = range(0x2400, 0x2422)
DELETE = 0x7F
LOOKS_LIKE_OURS = re.compile(r"<(?=/?s>|U\+)")
# Characters that move the cursor, change the terminal's state, reverse the order of the text, break lines, or cannot
# be encoded: controls but tab and line feed, line and paragraph separators, directional embeddings, overrides
# and isolates, deprecated and annotation controls, the byte order mark, halves of surrogate pairs. Joiners (emoji,
# Persian, Indic scripts), direction marks, soft hyphens and combining characters belong to ordinary text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
LINE_BREAK = re.compile(r"[ \t]*\r?\n[ \t\r\n]*")


def printable(text: str) -> str:
    """`text` with what a terminal would act on escaped; line feeds and tabs stay."""
    return UNSAFE.sub(lambda found: _shown(found[0]), text)


def one_line(text: str) -> str:
    """`printable(text)` on one line: a line break and the blanks around it become a space."""
    return printable(LINE_BREAK.sub(" ", text.strip("\r\n"))).replace("\t", _shown("\t"))


def show(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print `printable(text)` and `end` at once; to stdout without `file`. With end="", the text may come in parts."""
    _write(printable(text) + end, file)


def show_line(text: str, *, file: TextIO | None = None) -> None:
    """Print `one_line(text)` at once; to stdout without `file`."""
    _write(one_line(text) + "\n", file)


def _write(text: str, file: TextIO | None) -> None:
    """Write all of `text` in one call. `print` writes the end by itself where output is not buffered
    (PYTHONUNBUFFERED), and then the lines of several processes mix.
    """
    stream = file or sys.stdout
    stream.write(text)
    stream.flush()


def report_line(text: str) -> None:
    """The same on stderr, for threads and for the end of a process: nothing is raised if its reader is gone.

    The reader is often gone when a launcher was killed, or its connection to this host.
    """
    with suppress(OSError):
        show_line(text, file=sys.stderr)


def visible(text: str) -> str:
    """`text` with every character without a glyph escaped; a line break is escaped and kept."""
    quoted = LOOKS_LIKE_OURS.split(text)
    return _by_number("<").join("".join(map(_shown, part)) for part in quoted)


def visible_line(text: str) -> str:
    """The same on one line: a line break is only escaped."""
    return visible(text).replace("\n", "")


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
