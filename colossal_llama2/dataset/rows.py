"""The lines of a span of an input file, each checked: a record, nothing (blank), or why it cannot be used."""

import gzip
import hashlib
import io
import os
import zlib
from contextlib import ExitStack
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from colossal_llama2.dataset.plan import InputFile, Span
from colossal_llama2.dataset.repeated_keys import refuse_repeated_keys
from colossal_llama2.files import parse_object
from colossal_llama2.lines import MAX_LINE_BYTES, READ_BYTES, LineReader, RawLine

# Deeper, and what happens would depend on how deep the stack of the process is.
MAX_NESTING = 256
DAMAGE = (EOFError, zlib.error, OSError)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line: `number` counts from the span's first line; `record` is None if it is blank or `problem` tells why.

    `count` blank lines may come as one.
    """

    number: int
    size: int
    record: Optional[Dict[str, Any]]
    problem: Optional[str]
    count: int = 1


class SpanReader:
    """Reads the lines of one span; afterwards `sha256` is the hash of a file that was read as a whole."""

    def __init__(self, file: InputFile, span: Span, base: str = ""):
        """`base` is the folder that the file's path counts from."""
        self._file, self._span = file, span
        self._path = os.path.join(base, file.path)
        self._hash = hashlib.sha256()
        self._lines_before: Optional[int] = 0 if span.start == 0 else None

    def __iter__(self) -> Iterator[Line]:
        with ExitStack() as stack:
            raw = stack.enter_context(open(self._path, "rb"))
            if self._span.stop is not None:
                yield from self._range(raw)
                return
            hashed = io.BufferedReader(_HashingReader(raw, self._hash), READ_BYTES)
            if self._file.is_compressed:
                yield from self._whole(io.BufferedReader(_Decompressing(self._path, hashed, stack), READ_BYTES))
            else:
                yield from self._whole(hashed)
            while hashed.read(READ_BYTES):  # what a decompressor leaves unread
                pass

    @property
    def sha256(self) -> Optional[str]:
        """The file's hash; None if only a part of it was read."""
        return self._hash.hexdigest() if self._span.stop is None else None

    def line_number(self, number: int) -> int:
        """The line of the file that the span's line `number` is, both counted from 1."""
        if self._lines_before is None:
            self._lines_before = self._count_lines_before()
        return self._lines_before + number

    def _count_lines_before(self) -> int:
        with open(self._path, "rb") as raw:
            left, newlines = _first_line_start(raw, self._span.start, self._file.size), 0
            raw.seek(0)
            while left > 0 and (block := raw.read(min(left, READ_BYTES))):
                newlines += block.count(b"\n")
                left -= len(block)
        return newlines

    def _range(self, raw) -> Iterator[Line]:
        position = _first_line_start(raw, self._span.start, self._span.stop)
        reader, number = LineReader(raw), 1
        while position < self._span.stop:
            line = reader.read(room=self._span.stop - position)
            if not line.size:
                return
            yield _checked(line, number, is_first=position == 0)
            position += line.size
            number += line.count

    def _whole(self, stream) -> Iterator[Line]:
        reader, number = LineReader(stream), 1
        try:
            while (line := reader.read()).size:
                yield _checked(line, number, is_first=number == 1)
                number += line.count
        except DAMAGE as error:
            if not self._file.is_compressed:
                raise
            problem = f"the compressed data is cut short or damaged here ({error}), all after it is lost"
            yield Line(number, 0, None, f"{problem}; fetch the file again")


class _HashingReader(io.RawIOBase):
    """A raw file whose bytes are hashed on their way."""

    def __init__(self, raw, digest):
        self._raw, self._digest = raw, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count


def sha256_of(path: str) -> str:
    """The hash of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Decompressing(io.RawIOBase):
    """The decompressed bytes of a .gz or .zst file, read from `stream`; all that there are before an error is raised.

    A decompressor that fails keeps to itself what it has of the block asked for. So the data up to that block is then
    read once more, from `path`, and the block by the byte.
    """

    def __init__(self, path: str, stream, stack: ExitStack):
        self._path, self._stack = path, stack
        self._stream = _decompressor(path, stream, stack)
        self._given, self._step = 0, READ_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            block = self._stream.read(min(len(buffer), self._step))
        except DAMAGE:
            if self._step == 1:
                raise
            self._begin_anew()
            return self.readinto(buffer)
        buffer[: len(block)] = block
        self._given += len(block)
        return len(block)

    def _begin_anew(self) -> None:
        """Come back to the place from the start of the file, and go on by the byte."""
        self._step = 1
        self._stream = _decompressor(self._path, self._stack.enter_context(open(self._path, "rb")), self._stack)
        left = self._given
        while left:
            left -= len(self._stream.read(min(left, READ_BYTES)))


def _decompressor(path: str, stream, stack: ExitStack):
    """An object whose `read` gives decompressed bytes, and raises one of `DAMAGE`."""
    if path.endswith(".gz"):
        return stack.enter_context(gzip.GzipFile(fileobj=stream))
    import pyarrow

    source = pyarrow.PythonFile(stream, mode="r")
    return stack.enter_context(pyarrow.CompressedInputStream(source, "zstd"))


def _first_line_start(raw, start: int, stop: int) -> int:
    """Move to the first line that begins at `start` or after it, and return its place; `stop` if none does before."""
    if start == 0:
        return 0
    position = start - 1
    raw.seek(position)
    while position < stop:
        block = raw.readline(min(READ_BYTES, stop - position))
        position += len(block)
        if not block or block.endswith(b"\n"):
            return position
    return stop


def _checked(line: RawLine, number: int, *, is_first: bool) -> Line:
    if line.content is None:
        problem = f"a line of {line.size:,} bytes, at most {MAX_LINE_BYTES >> 20} MiB allowed; cut the document"
        return Line(number, line.size, None, problem)
    text = line.content.removeprefix(BYTE_ORDER_MARK) if is_first else line.content
    if not text or text.isspace():
        return Line(number, line.size, None, None, line.count)
    try:
        record = parse_object(text, allows_nan=True)
        _refuse_deep_nesting(text, record)
        refuse_repeated_keys(text, record)
    except ValueError as error:
        return Line(number, line.size, None, str(error))
    return Line(number, line.size, record, None)


def _refuse_deep_nesting(line: bytes, record: Dict[str, Any]) -> None:
    """Raise ValueError for lists and objects that are more than `MAX_NESTING` deep in each other."""
    if line.count(b"[") + line.count(b"{") <= MAX_NESTING:
        return
    level: List[Any] = [record]
    for _ in range(MAX_NESTING):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"lists and objects in each other more than {MAX_NESTING} deep; flatten the line")
