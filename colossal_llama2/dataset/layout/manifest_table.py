"""A manifest.json with any content as aligned lines: names and values, nested ones indented, records as rows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from colossal_llama2.plurals import some
from colossal_llama2.tables import table_lines
from colossal_llama2.terminal_text import visible_line

MAX_ROWS = 20
MAX_LISTED = 10
MAX_CELL_CHARACTERS = 60
INDENT = "  "
SHA256 = re.compile(r"[0-9a-f]{64}")


def manifest_lines(content: Mapping[str, Any], *, indent: str = "", width: int | None = None) -> Iterator[str]:
    """Lines for a JSON object: first its plain values, then each nested object or list under its name.

    Long lists and tables are shortened with a count of what is left out. Where records would be wider than `width`
    columns, each is a list of its fields.
    """
    plain = {name: _cell(value) for name, value in content.items() if _is_plain(value)}
    yield from table_lines([[visible_line(name), text] for name, text in plain.items()], align="l", indent=indent)
    for name, value in content.items():
        if not _is_plain(value):
            yield f"{indent}{visible_line(name)}:"
            yield from _nested(value, indent=indent + INDENT, width=width)


def _nested(value: Any, *, indent: str, width: int | None) -> Iterator[str]:
    named = value if isinstance(value, dict) else {str(index): entry for index, entry in enumerate(value)}
    shown = dict(list(named.items())[:MAX_ROWS])
    if all(isinstance(entry, dict) and any(map(_is_plain, entry.values())) for entry in shown.values()):
        yield from _rows(shown, indent=indent, width=width)
    else:
        yield from manifest_lines(shown, indent=indent, width=width)
    if len(named) > MAX_ROWS:
        yield f"{indent}and {len(named) - MAX_ROWS:,} more"


def _rows(records: Mapping[str, Mapping[str, Any]], *, indent: str, width: int | None) -> Iterator[str]:
    """Records as rows under the names of their fields; what is nested in them goes into one cell."""
    fields = list(dict.fromkeys(field for record in records.values() for field in record))
    rows: list[list[str]] = [["", *map(visible_line, fields)]]
    for name, record in records.items():
        rows.append([_short(name), *(_cell(record[field]) if field in record else "" for field in fields)])
    yield from table_lines(rows, indent=indent, width=width)


def _is_plain(value: Any) -> bool:
    """True for a value that fits on the line of its name: an empty object, a scalar, or a list of scalars."""
    if isinstance(value, dict):
        return not value
    return not isinstance(value, list) or not any(isinstance(entry, (dict, list)) for entry in value)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return _short("; ".join(f"{name}: {_cell(entry)}" for name, entry in value.items()) or "none")
    if isinstance(value, list):
        return _list_text(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else _short(str(value))


def _list_text(values: Sequence[Any]) -> str:
    if len(values) <= MAX_LISTED:
        return ", ".join(map(_cell, values)) or "none"
    if all(isinstance(value, (int, float)) for value in values):
        return f"{len(values):,} numbers, {_cell(min(values))} to {_cell(max(values))}"
    return some([_cell(value) for value in values], MAX_LISTED)


def _short(text: str) -> str:
    """One line of at most `MAX_CELL_CHARACTERS`: the end of a longer text, where paths differ; the start of a hash."""
    if SHA256.fullmatch(text):
        return text[:12]
    line = visible_line(text)
    return line if len(line) <= MAX_CELL_CHARACTERS else "…" + line[1 - MAX_CELL_CHARACTERS :]
