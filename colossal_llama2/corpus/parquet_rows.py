"""The rows of a Parquet file as the records that the same data has as jsonl, some at a time, and without running code.

Lists and structs become lists and objects, dates and times their ISO 8601 text, decimals and durations text, NaN null.
Binary values become text where they are UTF-8, and else an object that says how long they are, which no field that
holds text takes; so do values that Python has no type for, such as a date after the year 9999. A map becomes a list of
pairs. The metadata of pandas and of Arrow's extension types is not used.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from colossal_llama2.storage.lines import MAX_LINE_BYTES

MAGIC = b"PAR1"
BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 4096
BUFFER_BYTES = 1 << 20
# Of text that is not UTF-8, a time zone that is not known here, and dates and durations out of Python's range.
NO_VALUE = (ValueError, OverflowError)


class BrokenParquetError(Exception):
    """A Parquet file that cannot be read any further, with the reason."""


class ParquetRow(NamedTuple):
    """One row as JSON; None if it is over `MAX_LINE_BYTES`, then with its `size`, or holds text that is not UTF-8."""

    content: bytes | None
    size: int


def read_parquet(path: str) -> Iterator[ParquetRow]:
    """Every row of a file, by row groups. Raises BrokenParquetError where it cannot be read on."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=BUFFER_BYTES, arrow_extensions_enabled=False
        ) as file:
            names = file.schema_arrow.names
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise BrokenParquetError(f"two columns have the name {repeated!r:.80}; rename one")
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                size = max(metadata.total_byte_size // max(metadata.num_rows, 1), 1)
                rows = min(max(BATCH_BYTES // size, 1), MAX_BATCH_ROWS)
                for batch in file.iter_batches(rows, row_groups=[group], use_threads=False):
                    yield from _rows_of(batch)
    # pyarrow's own errors are of these kinds.
    except (OSError, ValueError, NotImplementedError, KeyError, TypeError, OverflowError) as error:
        raise BrokenParquetError(f"the Parquet file is cut short or damaged ({str(error).splitlines()[0]:.200})")


def _rows_of(batch) -> Iterator[ParquetRow]:
    import orjson

    for row in _values(batch):
        if row is None:
            yield ParquetRow(None, 0)
            continue
        content = orjson.dumps(row, default=_as_json, option=orjson.OPT_NON_STR_KEYS)
        is_short = len(content) <= MAX_LINE_BYTES
        yield ParquetRow(content if is_short else None, len(content))


def _values(batch) -> list[dict | None]:
    """The rows as Python has them, None for one with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except NO_VALUE:
        return [_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row(batch) -> dict | None:
    """The only row of a batch of which some value cannot be had."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            (row[name],) = column.to_pylist()
        except UnicodeDecodeError:
            return None
        except NO_VALUE:
            row[name] = {"unreadable": str(column.type)}
    return row


def _as_json(value: Any) -> Any:
    """What orjson writes in place of a value of a type that JSON has not."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"binary_bytes": len(value)}
