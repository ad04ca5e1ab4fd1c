"""Read the files of evaluation sets: CSV and folders, with errors that name the file and the line."""

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import is_stray, read_jsonl
from colossal_llama2.storage.input_files import JSON_BYTES, check_regular

# The largest file of these sets has a few MB.
MAX_BYTES = 256 << 20
MAX_CELL = 1 << 24
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The first begins with a mark of UTF-16.
UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


class Row(NamedTuple):
    """A row of a CSV file: the file and the line where it begins, and its cells."""

    where: str
    cells: list[str]


def check_readable(path: Path, *, max_bytes: int = JSON_BYTES) -> None:
    """Raise a UserError unless the path is a regular file that is neither too large nor empty."""
    check_regular(path, max_bytes=max_bytes, allows_empty=True)
    if not path.stat().st_size:
        raise UserError(f"{path}:1: is empty; copy it again from its source")


def jsonl_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The records of a jsonl file, each with its file:line.

    Raises:
        UserError: it cannot be read or has none; with file:line, for a line that is no JSON object.
    """
    check_readable(path)
    found = [(line.where, line.record) for line in read_jsonl(path) if line.record is not None]
    if not found:
        raise UserError(f"{path}:1: has only blank lines; copy it again from its source")
    return found


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it is missing, empty or too large; or it is not UTF-8 or not text, then with the line.
    """
    check_readable(path, max_bytes=MAX_BYTES)
    content = path.read_bytes()
    if content.startswith(UTF_32_MARKS):
        raise UserError(f"{path}:1: is UTF-32, not UTF-8; convert it, such as with iconv -f UTF-32 -t UTF-8")
    if content.startswith(UTF_16_MARKS):
        raise UserError(f"{path}:1: is UTF-16, not UTF-8; convert it, such as with iconv -f UTF-16 -t UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 at byte {error.start + 1:,} of the file; convert it, such as with "
            f"iconv -f GB18030 -t UTF-8"
        )
    zero = text.find("\0")
    if zero >= 0:
        line = text.count("\n", 0, zero) + 1
        raise UserError(f"{path}:{line}: has a zero byte, so it is not text; copy it again from its source")
    if not text.strip():
        raise UserError(f"{path}:1: has only blank lines; copy it again from its source")
    return text


def csv_rows(path: Path) -> list[Row]:
    """The rows of a CSV file without blank ones; at least one.

    Raises:
        UserError: as `read_text`, and with file:line for what is not CSV, or has only blank cells.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    before = csv.field_size_limit(MAX_CELL)
    rows, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(f"{path}:{line}", cells))
            line = reader.line_num + 1
    except csv.Error as error:
        # Python's messages for a quote that is opened and not closed, and for one that is closed within a cell.
        cause = {
            "unexpected end of data": "a quote that this row opens is never closed",
            "',' expected after '\"'": "a quote inside a quoted cell must be written twice",
        }.get(str(error), str(error))
        raise UserError(f"{path}:{line}: not CSV ({cause}); correct the row, or copy the file again from its source")
    finally:
        csv.field_size_limit(before)
    if not rows:
        raise UserError(f"{path}:1: has only blank cells; copy it again from its source")
    return rows


def named_cells(path: Path, needed: Sequence[str], *, ignored: Sequence[str] = ()) -> list[Row]:
    """The cells of the columns `needed`, in this order, of a CSV file with a header; upper and lower case are equal.

    Raises:
        UserError: as `csv_rows`; a column is missing or unknown, or a row has another number of cells than the header.
    """
    header, *rows = csv_rows(path)
    names = [cell.strip().lower() for cell in header.cells]
    wanted = [name.lower() for name in needed]
    unknown = [name for name in names if name not in (*wanted, *ignored)]
    if unknown or sorted(name for name in names if name in wanted) != sorted(wanted):
        raise UserError(
            f"{header.where}: the columns are {', '.join(cell.strip() or '(no name)' for cell in header.cells)}, and "
            f"{', '.join(needed)} are expected; "
            "give the file as its authors publish it"
        )
    places = [names.index(name) for name in wanted]
    for row in rows:
        if len(row.cells) != len(names):
            raise UserError(f"{row.where}: {len(row.cells)} cells, and the header has {len(names)}; correct the row")
    if not rows:
        raise UserError(f"{header.where}: has a header and no question; copy the file again from its source")
    return [Row(row.where, [row.cells[place] for place in places]) for row in rows]


def folder_of(given: Path, *inside: str, needed: str) -> Path:
    """The folder `given`, or the first of those `inside` it, that has an entry `needed`.

    Raises:
        UserError: there is no such entry; it names what is missing.
    """
    places = [given, *(given / name for name in inside)]
    found = next((place for place in places if (place / needed).exists()), None)
    if found is None:
        looked = " or ".join(str(place / needed) for place in places)
        raise UserError(f"{looked}: there is no such file or folder; give the folder as the set's authors publish it")
    return found


def files_of(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder whose names end with `suffix`, by name. Raises UserError if there is none."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; give the folder as the set's authors publish it")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder as the set's authors publish it")
    found = [path for path in sorted(folder.iterdir()) if path.name.endswith(suffix) and not is_stray(path.name)]
    if not found:
        raise UserError(f"{folder}: has no file *{suffix}; give the folder as the set's authors publish it")
    return found
