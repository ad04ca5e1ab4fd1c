"""The lines of a span of an input file, each checked: a record, nothing (blank), or why it cannot be used."""

import gzip
import hashlib
import io
import json
import os
import zlib
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from colossal_llama2.dataset.plan import InputFile, Span
from colossal_llama2.files import parse_object

# A document of this size is a mistake in the data, and a worker must not hold it in memory.
MAX_LINE_BYTES = 32 << 20
READ_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line: `number` counts from the span's first line; `record` is None if it is blank or `problem` tells why."""

    number: int
    size: int
    record: Optional[Dict[str, Any]]
    problem: Optional[str]


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
            # Named, because a stream that nobody holds closes those below it, which are not read to their end yet.
            stream = _decompressed(self._file.path, hashed, stack)
            yield from self._whole(stream)
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
            left, newlines = _first_line_start(raw, self._span.start), 0
            raw.seek(0)
            while left > 0 and (block := raw.read(min(left, READ_BYTES))):
                newlines += block.count(b"\n")
                left -= len(block)
        return newlines

    def _range(self, raw) -> Iterator[Line]:
        position = _first_line_start(raw, self._span.start)
        number = 0
        while position < self._span.stop:
            line, size = _read_line(raw)
            if not size:
                return
            position += size
            number += 1
            yield _checked(line, number, size, is_first=position == size)

    def _whole(self, stream) -> Iterator[Line]:
        number = 0
        try:
            while True:
                line, size = _read_line(stream)
                if not size:
                    return
                number += 1
                yield _checked(line, number, size, is_first=number == 1)
        except (EOFError, zlib.error, OSError) as error:
            if not self._file.is_compressed:
                raise
            problem = f"the compressed data is cut short or damaged here ({error}); fetch the file again"
            yield Line(number + 1, 0, None, problem)


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


def _decompressed(path: str, stream, stack: ExitStack):
    if path.endswith(".gz"):
        return io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=stream)), READ_BYTES)
    if path.endswith(".zst"):
        import pyarrow

        source = pyarrow.PythonFile(stream, mode="r")
        return io.BufferedReader(stack.enter_context(pyarrow.CompressedInputStream(source, "zstd")), READ_BYTES)
    return stream


def _first_line_start(raw, start: int) -> int:
    """Move to the first line that begins at `start` or after it, and return its place."""
    if start == 0:
        return 0
    position = start - 1
    raw.seek(position)
    while True:
        block = raw.readline(READ_BYTES)
        position += len(block)
        if not block or block.endswith(b"\n"):
            return position


def _read_line(stream) -> Tuple[Optional[bytes], int]:
    """The next line and its bytes; of one over `MAX_LINE_BYTES` only the bytes, and 0 at the end."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    size = len(line)
    if size <= MAX_LINE_BYTES:
        return line, size
    while not line.endswith(b"\n"):
        line = stream.readline(READ_BYTES)
        if not line:
            break
        size += len(line)
    return None, size


def _checked(line: Optional[bytes], number: int, size: int, *, is_first: bool) -> Line:
    if line is None:
        limit = f"{MAX_LINE_BYTES >> 20} MiB"
        return Line(number, size, None, f"a line of {size:,} bytes, at most {limit} allowed; cut the document")
    text = line.removeprefix(BYTE_ORDER_MARK) if is_first else line
    if not text or text.isspace():
        return Line(number, size, None, None)
    try:
        record = parse_object(text)
        _refuse_repeated_keys(text, record)
    except ValueError as error:
        return Line(number, size, None, str(error))
    return Line(number, size, record, None)


def _refuse_repeated_keys(line: bytes, record: Dict[str, Any]) -> None:
    """Raise ValueError if an object names a key twice: parsers keep one of the values without a word.

    A flat record in which each key's bytes stand once, none of them escaped, needs no second parse.
    """
    for key, value in record.items():
        if isinstance(value, (dict, list)) or line.count(_quoted(key)) != 1:
            break
    else:
        if b"\\u00" not in line:
            return
    try:
        json.loads(line, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply; each line must be one JSON object in UTF-8")


@lru_cache(maxsize=16)
def _quoted(key: str) -> bytes:
    """A key as it stands in a line, unless something in it is escaped."""
    return f'"{key}"'.encode()


def _unique_keys(pairs: List[tuple]) -> dict:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands there twice; each key must be unique")
    return unique
