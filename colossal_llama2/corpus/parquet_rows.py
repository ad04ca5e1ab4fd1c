"""Read the rows of a Parquet file, in batches, as the records that the same data would have as jsonl.

Lists and structs become lists and objects, dates and times their ISO 8601 text, decimals and durations text, NaN null.
Binary values become text if they are UTF-8. Otherwise they become an object with their length, which is never valid
where text is expected; so do values that Python cannot represent, such as a date after the year 9999. A map becomes a
list of pairs. The metadata of pandas and of Arrow's extension types is ignored, so no code in a file is run.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.storage.lines import MAX_LINE_BYTES

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"PAR1"
BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 4096
BUFFER_BYTES = 1 << 20
# Raised for text that is not UTF-8, for unknown time zones, and for dates and durations outside Python's range.
NO_VALUE = (ValueError, OverflowError)


class BrokenParquetError(Exception):
    """A Parquet file cannot be read any further. The message is the reason."""


class ParquetRow(NamedTuple):
    """One row as JSON. `content` is None if it is over `MAX_LINE_BYTES`, or, with `size` 0, holds invalid UTF-8."""

    content: bytes | None
    size: int


def read_parquet(path: str) -> Iterator[ParquetRow]:
    """Yield every row of a file, one row group at a time. Raises BrokenParquetError where the file is damaged."""
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
    # The classes of pyarrow's own errors.
    except (OSError, ValueError, NotImplementedError, KeyError, TypeError, OverflowError) as error:
        raise BrokenParquetError(f"the Parquet file is cut short or damaged ({str(error).splitlines()[0]:.200})")


def _rows_of(batch: "pyarrow.RecordBatch") -> Iterator[ParquetRow]:
    import orjson

    for row in _values(batch):
        if row is None:
            yield ParquetRow(None, 0)
            continue
        content = orjson.dumps(row, default=_as_json, option=orjson.OPT_NON_STR_KEYS)
        is_short = len(content) <= MAX_LINE_BYTES
        yield ParquetRow(content if is_short else None, len(content))


def _values(batch: "pyarrow.RecordBatch") -> list[dict | None]:
    """The rows as Python objects; None for a row with text that is not UTF-8."""
    try:
        return batch.to_pylist()
    except NO_VALUE:
        return [_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row(batch: "pyarrow.RecordBatch") -> dict | None:
    """The only row of a batch in which some value cannot be converted."""
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
    """The value that orjson writes for a type that JSON lacks."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"binary_bytes": len(value)}
