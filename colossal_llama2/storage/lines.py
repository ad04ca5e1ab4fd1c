"""Read the lines of a binary stream in time linear in its bytes, whatever they are, and in bounded memory.

A line ends with "\\n", "\\r\\n" or "\\r", as Python's own text files have it.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

# A larger document is a mistake in the data, and must not be held in memory.
MAX_LINE_BYTES = 32 << 20
READ_BYTES = 1 << 20
SPACES = frozenset(b" \t\n\r\v\f")
NEWLINE, RETURN = b"\n\r"
NO_SPACE = re.compile(rb"\S")


class RawLine(NamedTuple):
    """One line, or a run of `count` blank ones; `size` is its bytes in the stream, 0 at the end of it.

    `content` has its line break, is empty for blank lines, and None for a line over `MAX_LINE_BYTES`.
    """

    content: bytes | None
    size: int
    count: int  # type: ignore[assignment]  # a tuple's own `count` is not needed


class BlockStream(Protocol):
    """A stream that is read in blocks."""

    def read1(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        ...


class LineReader:
    """Reads lines from a stream with `read1`; an error of the stream is raised after the lines before it are read."""

    def __init__(self, stream: BlockStream):
        self._stream = stream
        self._block, self._start = b"", 0
        self._has_returns = False

    def read(self, *, room: int | None = None) -> RawLine:
        """The next line. Consecutive blank lines in the next `room` bytes are returned together."""
        if self._start == len(self._block):
            self._block, self._start = self._stream.read1(READ_BYTES), 0
            if not self._block:
                return RawLine(b"", 0, 0)
            self._has_returns = b"\r" in self._block
        block, start = self._block, self._start
        if block[start] in SPACES:
            stop = len(block) if room is None else min(start + room, len(block))
            solid = NO_SPACE.search(block, start, stop)
            end = last_line_end(block, start, solid.start() if solid else stop)
            if end > start:
                self._start = end
                return RawLine(b"", end - start, count_line_ends(block, start, end))
        end = first_line_end(block, start) if self._has_returns else block.find(b"\n", start) + 1
        self._start = end or len(block)
        line = block[start : self._start]
        # A line inside a block is not too long.
        return RawLine(line, len(line), 1) if end else self._rest_of(line)

    def _rest_of(self, line: bytes) -> RawLine:
        """A line that continues in the next block, or ends with the stream."""
        parts, size = [line], len(line)
        # The "\n" of a "\r\n" may be in the next block.
        returned = line[-1] == RETURN
        while True:
            self._block = self._stream.read1(READ_BYTES)
            self._has_returns = b"\r" in self._block
            end = int(self._block[:1] == b"\n") if returned else first_line_end(self._block, 0)
            is_whole = returned or end > 0 or not self._block
            self._start = end if is_whole else len(self._block)
            size += self._start
            if size <= MAX_LINE_BYTES:
                parts.append(self._block[: self._start])
            else:
                parts.clear()
            if is_whole:
                return _limited(parts, size)
            returned = self._block[-1] == RETURN


def first_line_end(block: bytes, start: int) -> int:
    """Where the line that begins at `start` ends; 0 if it may continue after the block."""
    end = block.find(b"\n", start) + 1
    # The "\r" of a "\r\n" does not end a line by itself.
    alone = block.find(b"\r", start, max(end - 2, start) if end else len(block) - 1) + 1
    return alone or end


def last_line_end(block: bytes, start: int, stop: int) -> int:
    """Where the last line that ends in block[start:stop] does so; `start` if none does, as far as the block shows."""
    end = max(block.rfind(b"\n", start, stop), block.rfind(b"\r", start, stop)) + 1
    if end > start and block[end - 1] == RETURN and block[end : end + 1] in (b"", b"\n"):
        stop = end - 1
        end = max(block.rfind(b"\n", start, stop), block.rfind(b"\r", start, stop)) + 1
    return max(end, start)


def count_line_ends(block: bytes, start: int, stop: int) -> int:
    """The line ends in block[start:stop]."""
    ends = block.count(b"\n", start, stop)
    returns = block.count(b"\r", start, stop)
    return ends + returns - (block.count(b"\r\n", start, stop) if returns else 0)


class LineCounter:
    """Counts the line ends of a stream of blocks; a block may end inside a "\\r\\n"."""

    def __init__(self) -> None:
        self.count = 0
        self._returned = False

    def add(self, block: bytes, start: int = 0, stop: int | None = None) -> None:
        """Count those in block[start:stop], which continues what was added before."""
        stop = len(block) if stop is None else stop
        if start < stop:
            self.count += count_line_ends(block, start, stop) - (self._returned and block[start] == NEWLINE)
            self._returned = block[stop - 1] == RETURN


def _limited(parts: Iterable[bytes], size: int) -> RawLine:
    return RawLine(b"".join(parts) if size <= MAX_LINE_BYTES else None, size, 1)
