"""The lines of a binary stream, in time that is linear in its bytes whatever they are, and in bounded memory."""

import re
from typing import NamedTuple, Optional

# A document of this size is a mistake in the data, and a worker must not hold it in memory.
MAX_LINE_BYTES = 32 << 20
READ_BYTES = 1 << 20
SPACES = frozenset(b" \t\n\r\v\f")
NEWLINE = ord("\n")
NO_SPACE = re.compile(rb"\S")


class RawLine(NamedTuple):
    """One line, or a run of `count` blank ones; `size` is its bytes in the stream, 0 at the end of it.

    `content` has its line break, is empty for blank lines, and None for a line over `MAX_LINE_BYTES`.
    """

    content: Optional[bytes]
    size: int
    count: int


class LineReader:
    """Reads lines from a stream with `read1`, which may raise an error after the lines before it were read."""

    def __init__(self, stream):
        self._stream = stream
        self._block, self._start = b"", 0

    def read(self, *, room: Optional[int] = None) -> RawLine:
        """The next line. Blank lines come together, as far as they lie in the next `room` bytes."""
        if self._start == len(self._block):
            self._block, self._start = self._stream.read1(READ_BYTES), 0
            if not self._block:
                return RawLine(b"", 0, 0)
        block, start = self._block, self._start
        if block[start] in SPACES:
            stop = len(block) if room is None else min(start + room, len(block))
            solid = NO_SPACE.search(block, start, stop)
            self._start = block.rfind(b"\n", start, solid.start() if solid else stop) + 1
            if self._start:
                return RawLine(b"", self._start - start, block.count(b"\n", start, self._start))
        end = block.find(b"\n", start) + 1
        self._start = end or len(block)
        line = block[start : self._start]
        return _limited([line], len(line)) if end else self._rest_of(line)

    def _rest_of(self, line: bytes) -> RawLine:
        """A line that goes on in the next block, or ends with the stream."""
        parts, size = [line], len(line)
        while True:
            self._block, self._start = self._stream.read1(READ_BYTES), 0
            self._start = self._block.find(b"\n") + 1 or len(self._block)
            size += self._start
            if size <= MAX_LINE_BYTES:
                parts.append(self._block[: self._start])
            else:
                parts.clear()
            if not self._block or self._block[self._start - 1] == NEWLINE:
                return _limited(parts, size)


def _limited(parts, size: int) -> RawLine:
    return RawLine(b"".join(parts) if size <= MAX_LINE_BYTES else None, size, 1)
