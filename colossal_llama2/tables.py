"""Tables for people: aligned by rich, which measures the width of Chinese characters.

    print_table     on a terminal as wide as that is, with the head in bold; anywhere else (a pipe, a file, CI) plain
    table_lines     plain text, each row on one line however long, equal for equal rows: for logs and files

Cells are literal text: no markup, no colours, no emoji codes. Control characters are shown escaped.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from colossal_llama2.terminal_text import one_line, show_line

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[str]]
GAP = 2
# Names are folded where a terminal is narrow, but not to fewer columns than this. Figures are never folded.
MIN_NAME_WIDTH = 16
# rich needs some width; no line is longer.
PLAIN_WIDTH = 1 << 20


def table_lines(rows: Rows, *, align: str = "lr", indent: str = "", width: int | None = None) -> list[str]:
    """`rows` as aligned lines without blanks at their ends; shorter rows are filled with empty cells.

    Args:
        align: "l" or "r" for each column, left or right. The last letter is that of all further columns.
        indent: stands before each line.
        width: the terminal's width in columns. If the table needs more, each row after the first,
            which is the head, becomes a list of its cells under the row's name. None: no limit.
    """
    from rich.console import Console

    if not rows:
        return []
    padded = _padded(rows)
    if width is not None and _total(_widths(padded)) + len(indent) > width:
        return [line for record in _records(padded) for line in table_lines(record, align="l", indent=indent)]
    written = io.StringIO()
    console = Console(file=written, width=PLAIN_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_table(padded, align=align, has_header=False))
    return [(indent + line).rstrip() for line in written.getvalue().split("\n")[:-1]]


def print_table(rows: Rows, *, align: str = "lr", has_header: bool = True, file: TextIO | None = None) -> None:
    """Print `rows`, whose first is the head if `has_header`; to stdout without `file`. `align` as in `table_lines`.

    On a terminal that is too narrow for all columns, each row becomes a list of its cells under the row's name.
    """
    file = file or sys.stdout
    if file.isatty() and rows:
        from rich.console import Console

        console = Console(file=file, markup=False, emoji=False, highlight=False)
        padded = _padded(rows)
        if _least_width(padded, align) <= console.width:
            console.print(_table(padded, align=align, has_header=has_header))
            return
        if has_header:
            for record in _records(padded):
                console.print(_table(record, align="l", has_header=False))
            return
    for line in table_lines(rows, align=align):
        show_line(line, file=file)


def _padded(rows: Rows) -> list[list[str]]:
    """All rows with the same number of cells, each on one line."""
    columns = max(map(len, rows))
    return [[*map(one_line, row), *[""] * (columns - len(row))] for row in rows]


def _widths(rows: Rows) -> list[int]:
    """The widest cell of each column."""
    from rich.cells import cell_len

    return [max(map(cell_len, column)) for column in zip(*rows, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _least_width(rows: Rows, align: str) -> int:
    """Columns of a terminal that a table needs if long names are folded."""
    return _total(
        [
            min(width, MIN_NAME_WIDTH) if _letter(align, column) == "l" else width
            for column, width in enumerate(_widths(rows))
        ]
    )


def _records(rows: Rows) -> Iterator[Rows]:
    """For each row after the head, a table of its own: the names of its columns and its cells."""
    head, *rest = rows
    for row in rest:
        first, *others = zip(head, row, strict=True)
        yield [[first[1] or first[0]]]
        yield [[f"  {name}", cell] for name, cell in others if cell]


def _table(rows: Rows, *, align: str, has_header: bool) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, GAP, 0, 0), pad_edge=False)
    for column in range(len(rows[0]) if rows else 0):
        is_name = _letter(align, column) == "l"
        table.add_column(justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell, "bold" if has_header and number == 0 else "") for cell in row))
    return table


def _letter(align: str, column: int) -> str:
    return align[min(column, len(align) - 1)]
