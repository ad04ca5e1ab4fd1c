"""Read the records of a JSON document that may be larger than memory: an array, or consecutive objects.

    [{"target": "a"}, {"target": "b"}]          compact, one record per line, or pretty-printed
    {                                           objects one after the other, over several lines
      "target": "a"
    }
    {"target": "b"}

This module only finds where a record begins and ends, from brackets and strings; the caller parses it. So an invalid
record is one bad row, while unbalanced brackets end the document.
"""

import re
from functools import partial
from typing import Any, NamedTuple, NoReturn

from colossal_llama2.storage.lines import MAX_LINE_BYTES, READ_BYTES, BlockStream, LineCounter

# The body of a string, in which an escape takes two bytes; and the bytes that matter outside strings.
_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SOLID = re.compile(rb"[^ \t\n\r]")
_SCALAR_END = re.compile(rb'[\s,\[\]{}"]')
_CLOSERS = {ord("{"): ord("}"), ord("["): ord("]")}
_QUOTE, _COMMA, _OPEN, _CLOSE = b'",[]'
_PRETTY = re.compile(rb"\{[ \t]*[\r\n]")
# How much of a file decides how it is read.
HEAD_BYTES = 64 << 10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RawRecord(NamedTuple):
    """The text of one record. It begins on `line` of the document, counted from 1.

    `content` is None for a record over the reader's `max_bytes`. `size` counts its bytes and those since the last
    record; it is 0 at the end of the document.
    """

    content: bytes | None
    line: int
    size: int


class BrokenDocumentError(Exception):
    """A document cannot be read from `line` on."""

    def __init__(self, problem: str, *, line: int):
        super().__init__(problem)
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), line=self.line), self.args


class RecordReader:
    """Reads records from a stream with `read1`, one at a time.

    Errors of the stream itself are raised after the records before them.
    """

    def __init__(self, stream: BlockStream, *, is_array: bool, max_bytes: int = MAX_LINE_BYTES):
        self._max_bytes = max_bytes
        self._stream, self._is_array = stream, is_array
        self._block, self._position = b"", 0
        self._lines = LineCounter()
        self._is_open = False
        # Of the current record.
        self._size, self._line = 0, 1

    @property
    def line(self) -> int:
        """The current line."""
        return self._lines.count + 1

    def read(self) -> RawRecord:
        """The next record. Raises BrokenDocumentError where brackets, commas or strings are not valid JSON."""
        self._size = 0
        byte = self._next_solid()
        if self._is_array:
            byte = self._inside_array(byte)
        if byte is None:
            return RawRecord(b"", self._line, 0)
        scan = _Scan(byte)
        parts: list[bytes] = []
        length, end = 0, None
        while end is None:
            try:
                end = scan.feed(self._block, self._position)
            except ValueError as error:
                self._fail(str(error))
            stop = len(self._block) if end is None else end
            length += stop - self._position
            if length <= self._max_bytes:
                parts.append(self._block[self._position : stop])
            else:
                parts.clear()
            self._advance(stop)
            if end is None and not self._fill():
                if self._is_array or not scan.is_scalar:
                    self._fail("the file is cut off inside the record that begins here")
                break
        return RawRecord(b"".join(parts) if length <= self._max_bytes else None, self._line, self._size)

    def _inside_array(self, byte: int | None) -> int | None:
        """Skip the "[", "," or "]" at the current position. Returns the record's first byte, None after the array."""
        is_behind_comma = byte == _COMMA and self._is_open
        if is_behind_comma or not self._is_open:
            self._is_open = True
            self._advance(self._position + 1)
            byte = self._next_solid()
        elif byte is not None and byte != _CLOSE:
            self._fail('expected "," or "]" after a record of the JSON array')
        if byte is None:
            self._fail('the JSON array is cut off here, its "]" is missing')
        if byte != _CLOSE:
            return byte
        if is_behind_comma:
            self._fail("a comma without a record after it; remove the comma")
        self._advance(self._position + 1)
        if self._next_solid() is not None:
            self._fail("there is text after the JSON array; a file holds one array, or one record per line")
        return None

    def _next_solid(self) -> int | None:
        """Move to the next byte that is not white space and return it, None at the end. Sets the record's line."""
        while True:
            found = _SOLID.search(self._block, self._position)
            self._advance(found.start() if found else len(self._block))
            self._line = self.line
            if found and not self._passed_mark():
                return self._block[self._position]
            if self._position == len(self._block) and not self._fill():
                return None

    def _passed_mark(self) -> bool:
        """Skip a byte order mark at the current position. Returns whether there was one."""
        if self._block[self._position] != BYTE_ORDER_MARK[0]:
            return False
        while len(self._block) - self._position < len(BYTE_ORDER_MARK):
            rest = self._block[self._position :]
            if not self._fill():
                self._block = rest
                return False
            self._block = rest + self._block
        if not self._block.startswith(BYTE_ORDER_MARK, self._position):
            return False
        self._advance(self._position + len(BYTE_ORDER_MARK))
        return True

    def _advance(self, position: int) -> None:
        self._lines.add(self._block, self._position, position)
        self._size += position - self._position
        self._position = position

    def _fill(self) -> bool:
        self._block, self._position = self._stream.read1(READ_BYTES), 0
        return bool(self._block)

    def _fail(self, problem: str) -> NoReturn:
        raise BrokenDocumentError(problem, line=self._line)


class _Scan:
    """Finds the end of one value in blocks that are fed to it. The first byte of the value is given."""

    def __init__(self, first: int):
        self._closers = bytearray()
        self._in_string = self._is_escaped = self._is_begun = False
        self.is_scalar = not (first in _CLOSERS or first == _QUOTE)

    def feed(self, block: bytes, start: int) -> int | None:
        """The offset where the value ends in the block; None if it continues. Raises ValueError for wrong brackets."""
        if self.is_scalar:
            return self._scalar_end(block, start)
        position = start
        while position < len(block):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                    position += 1
                # It matches everywhere, if only an empty text.
                position = _STRING_BODY.match(block, position).end()  # type: ignore[union-attr]
                if position == len(block):
                    return None
                if block[position] != _QUOTE:
                    self._is_escaped = True
                    return None
                self._in_string = False
                position += 1
            else:
                found = _STRUCTURE.search(block, position)
                if found is None:
                    return None
                position = found.end()
                self._structure(block[position - 1])
            if not self._closers and not self._in_string:
                return position
        if len(self._closers) > MAX_LINE_BYTES:
            raise ValueError("brackets are nested without end")
        return None

    def _structure(self, byte: int) -> None:
        if byte == _QUOTE:
            self._in_string = True
        elif byte in _CLOSERS:
            self._closers.append(_CLOSERS[byte])
        elif self._closers.pop() != byte:
            raise ValueError("the brackets of the record that begins here do not match")

    def _scalar_end(self, block: bytes, start: int) -> int | None:
        found = _SCALAR_END.search(block, start)
        if found is None:
            self._is_begun = True
            return None
        if found.start() == start and not self._is_begun:
            raise ValueError(f"a record should begin here, not {chr(block[start])!r}")
        return found.start()


def layout_of(head: bytes) -> str:
    """How a text holds records, from its first `HEAD_BYTES`: "array", "objects" of several lines each, or "lines"."""
    text = head.removeprefix(BYTE_ORDER_MARK)
    found = _SOLID.search(text)
    if found is None or text[found.start()] not in _CLOSERS:
        return "lines"
    start = found.start()
    if text[start] == _OPEN:
        return "lines" if _is_lists_in_lines(text[start:]) else "array"
    # Pretty-printed objects begin like this, lines of jsonl never do.
    if _PRETTY.match(text, start):
        return "objects"
    try:
        end = _Scan(text[start]).feed(text, start)
    except ValueError:
        end = None
    value = text[start:end]
    if end is None or b"\n" not in value and b"\r" not in value:
        return "lines"
    import orjson

    try:
        orjson.loads(value)
    except orjson.JSONDecodeError:
        return "lines"
    return "objects"


def _is_lists_in_lines(text: bytes) -> bool:
    """Whether the text is several lines, each of which is an array."""
    scan = _Scan(_OPEN)
    try:
        end = scan.feed(text, 0)
    except ValueError:
        return False
    if end is None or b"\n" in text[:end] or b"\r" in text[:end]:
        return False
    return text[end:].lstrip(b" \t\r\n")[:1] == b"["
