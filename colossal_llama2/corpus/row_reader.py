"""Read the lines of a span of an input file. Each one is a record, blank, or has a problem."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from colossal_llama2.corpus.data_files import InputFile, Span
from colossal_llama2.corpus.decompression import DAMAGE, Decompressing, MissingPackageError
from colossal_llama2.corpus.file_kinds import COMPRESSIONS, PARQUET, unreadable
from colossal_llama2.corpus.json_stream import BYTE_ORDER_MARK, HEAD_BYTES, BrokenDocumentError, RecordReader, layout_of
from colossal_llama2.corpus.parquet_rows import BrokenParquetError, ParquetRow, read_parquet
from colossal_llama2.corpus.repeated_keys import refuse_repeated_keys
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import parse_object
from colossal_llama2.storage.lines import (
    MAX_LINE_BYTES,
    NEWLINE,
    READ_BYTES,
    RETURN,
    BlockStream,
    LineCounter,
    LineReader,
    first_line_end,
)
from colossal_llama2.storage.row_errors import RowError

# A fixed limit, so that the result does not depend on the stack size of the process.
MAX_NESTING = 256
OTHER_REASON = "other faults"


class Line(NamedTuple):
    """One line, or one record of a JSON array or a Parquet file, each of which counts as a line.

    Attributes:
        number: of its first line, counted from the span's first line; in a Parquet file, of the row.
        size: in bytes.
        record: None if the line is blank or has a `problem`.
        problem: why it cannot be used, and the cure.
        count: how many lines it stands for: several blank lines may come as one.
        reason: the key under which rows with this problem are counted.
        is_lost: True if the rest of the file cannot be read either; then it is not counted as a line.
    """

    number: int
    size: int
    record: dict[str, Any] | None
    problem: str | None = None
    count: int = 1  # type: ignore[assignment]  # a tuple's own `count` is not needed
    reason: str = OTHER_REASON
    is_lost: bool = False


class SpanReader:
    """Reads the lines of one span. Afterwards `sha256` is the hash of the file, if the span is the whole file."""

    def __init__(self, file: InputFile, span: Span, base: str = ""):
        """`base` is the folder that the file's path is relative to."""
        self._file, self._span = file, span
        self._path = os.path.join(base, file.path)
        self._hash = hashlib.sha256()
        self._lines_before: int | None = 0 if span.start == 0 else None

    def __iter__(self) -> Iterator[Line]:
        if self._file.kind == PARQUET:
            yield from self._parquet()
            return
        with ExitStack() as stack:
            raw = stack.enter_context(open(self._path, "rb"))
            if self._span.stop is not None:
                yield from self._range(raw, self._span.stop)
                return
            hashed = io.BufferedReader(_HashingReader(raw, self._hash), READ_BYTES)
            stream: io.BufferedIOBase = hashed
            if self._file.kind in COMPRESSIONS:
                stream = io.BufferedReader(Decompressing(self._path, self._file.kind, hashed, stack), READ_BYTES)
            yield from self._whole(_WithHead(stream))
            while hashed.read(READ_BYTES):  # the bytes that a decompressor did not read
                pass

    @property
    def sha256(self) -> str | None:
        """The hash of the file; None if only a part of it was read."""
        return self._hash.hexdigest() if self._span.stop is None else None

    def line_number(self, number: int) -> int:
        """The number of the span's line `number` in the whole file, both counted from 1."""
        if self._lines_before is None:
            self._lines_before = self._count_lines_before()
        return self._lines_before + number

    def _count_lines_before(self) -> int:
        counter = LineCounter()
        with open(self._path, "rb") as raw:
            left = _first_line_start(raw, self._span.start, self._file.size)
            raw.seek(0)
            while left > 0 and (block := raw.read(min(left, READ_BYTES))):
                counter.add(block)
                left -= len(block)
        return counter.count

    def _range(self, raw: io.BufferedReader, stop: int) -> Iterator[Line]:
        position = _first_line_start(raw, self._span.start, stop)
        raw.seek(position)
        reader, number = LineReader(raw), 1
        while position < stop:
            line = reader.read(room=stop - position)
            if not line.size:
                return
            yield _checked(line.content, number, line.size, line.count)
            position += line.size
            number += line.count

    def _whole(self, stream: "_WithHead") -> Iterator[Line]:
        if problem := unreadable(stream.head):
            yield _lost(1, problem.why, problem.reason)
            return
        layout = layout_of(stream.head)
        if layout == "lines":
            read = self._lines(LineReader(stream))
        else:
            read = self._records(RecordReader(stream, is_array=layout == "array"))
        number = 1
        try:
            for line in read:
                number = line.number + line.count
                yield line
        except DAMAGE as error:
            if self._file.kind not in COMPRESSIONS:
                raise
            if isinstance(error, MissingPackageError):
                yield _lost(number, str(error), "zstd window over 128 MiB")
                return
            damage = f"the compressed data is cut short or damaged here ({error}), and everything after it is lost"
            yield _lost(number, f"{damage}; fetch the file again", "compressed data cut short or damaged")

    def _lines(self, reader: LineReader) -> Iterator[Line]:
        number = 1
        while (line := reader.read()).size:
            yield _checked(line.content, number, line.size, line.count)
            number += line.count

    def _records(self, reader: RecordReader) -> Iterator[Line]:
        number = 0
        try:
            while (record := reader.read()).size:
                number += 1
                yield _checked(record.content, record.line, record.size, what=f"record {number:,}")
        except BrokenDocumentError as error:
            problem = f"{error}, after {counted(number, 'record')}; fetch the file again, or fix it"
            yield _lost(error.line, problem, "JSON array cut short or broken")

    def _parquet(self) -> Iterator[Line]:
        number = 0
        try:
            for row in read_parquet(self._path):
                number += 1
                yield _checked_row(row, number)
        except BrokenParquetError as error:
            yield _lost(number + 1, f"{error}; fetch the file again", "Parquet file cut short or damaged")
        with open(self._path, "rb") as raw:
            while block := raw.read(READ_BYTES):
                self._hash.update(block)


class _WithHead:
    """A stream with `read1` whose `head` is known in advance. An error in the head is raised after its valid bytes."""

    def __init__(self, stream: BlockStream):
        self._stream = stream
        self._error: BaseException | None = None
        head = b""
        try:
            while len(head) < HEAD_BYTES and (block := stream.read1(READ_BYTES)):
                head += block
        except DAMAGE as error:
            self._error = error
        self.head, self._left = head[:HEAD_BYTES], head

    def read1(self, size: int) -> bytes:
        """Like `read1` of the stream; the first block is the head, whatever `size` is."""
        if self._left:
            block, self._left = self._left, b""
            return block
        if self._error is not None:
            raise self._error
        return self._stream.read1(size)


class _HashingReader(io.RawIOBase):
    """A raw file that hashes the bytes that are read from it."""

    def __init__(self, raw: io.BufferedReader, digest: "hashlib._Hash"):
        self._raw, self._digest = raw, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count


def sha256_of(path: str) -> str:
    """The hash of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line_start(raw: io.BufferedReader, start: int, stop: int) -> int:
    """The offset of the first line that begins in [start, stop); `stop` or more if there is none."""
    if start == 0:
        return 0
    position, returned = start - 1, False
    raw.seek(position)
    while position < stop and (block := raw.read(min(READ_BYTES, stop - position + 1))):
        if returned:
            return position + (block[0] == NEWLINE)
        if end := first_line_end(block, 0):
            return position + end
        returned = block[-1] == RETURN
        position += len(block)
    return max(position, stop)


def _lost(number: int, problem: str, reason: str) -> Line:
    return Line(number, 0, None, problem, 0, reason, is_lost=True)


def _too_long(number: int, size: int, what: str) -> Line:
    problem = f"{what} of {size:,} bytes, at most {MAX_LINE_BYTES >> 20} MiB allowed; cut the document"
    return Line(number, size, None, problem, reason=f"over {MAX_LINE_BYTES >> 20} MiB")


def _checked_row(row: ParquetRow, number: int) -> Line:
    if row.content is not None:
        return Line(number, row.size, parse_object(row.content))
    if row.size:
        return _too_long(number, row.size, "a row")
    return Line(number, 0, None, "not UTF-8; each text must be UTF-8", reason="not UTF-8")


def _checked(content: bytes | None, number: int, size: int, count: int = 1, what: str = "") -> Line:
    """Check one line, or one record of a JSON document, which `what` then names."""
    if content is None:
        return _too_long(number, size, what or "a line")
    text = content.removeprefix(BYTE_ORDER_MARK)
    if not text or text.isspace():
        return Line(number, size, None, count=count)
    try:
        record = parse_object(text, "record" if what else "line", allows_nan=True)
        _refuse_deep_nesting(text, record)
        refuse_repeated_keys(text, record)
    except ValueError as error:
        reason = getattr(error, "reason", OTHER_REASON)
        return Line(number, size, None, f"{what}: {error}" if what else str(error), reason=reason)
    return Line(number, size, record)


def _refuse_deep_nesting(line: bytes, record: dict[str, Any]) -> None:
    """Raise RowError for lists and objects that are nested more than `MAX_NESTING` deep."""
    level: list[Any] = [value for value in record.values() if isinstance(value, (dict, list))]
    if not level or line.count(b"[") + line.count(b"{") <= MAX_NESTING:
        return
    for _ in range(MAX_NESTING - 1):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    if level:
        why = f"lists and objects are nested more than {MAX_NESTING} deep; flatten the line"
        raise RowError(why, reason=f"nested more than {MAX_NESTING} deep")
