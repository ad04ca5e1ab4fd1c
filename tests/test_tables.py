"""Tables: plain lines that are equal everywhere, and on a terminal folded cells without any loss."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from colossal_llama2.tables import print_table, table_lines
from tests.conftest import ROOT

ROWS = [["category", "tokens", "share"], ["猜谜", "1,000", "1.0%"], ["[red]web[/red] :smile: \x1b[31m", "22"]]
NAMES = ["猜" * 30, "/a/long/path" * 6]


def test_lines_are_aligned_and_text_stays_as_it_is():
    assert table_lines(ROWS) == [
        "category                      tokens  share",
        "猜谜                           1,000   1.0%",
        "[red]web[/red] :smile: ␛[31m      22",
    ]


def test_columns_are_aligned_as_asked():
    rows = [["a", "1", "one", "x"], ["long", "100", "hundred", "yy"], [], ["b", "", "", ""]]
    assert table_lines(rows, align="lrl", indent="> ") == [
        ">  a       1  one      x".replace(">  ", "> "),
        "> long  100  hundred  yy",
        ">",
        "> b",
    ]
    assert table_lines([]) == []


def test_a_line_is_as_long_as_its_cells(monkeypatch):
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    assert table_lines([["x" * 5000, "1"]]) == ["x" * 5000 + "  1"]


def test_a_pipe_gets_the_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(ROWS)
    assert capsys.readouterr().out == "".join(line + "\n" for line in table_lines(ROWS))


def on_terminal(rows, columns: int, **options) -> str:
    """The output on a terminal with this number of columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = f"from colossal_llama2.tables import print_table; print_table({rows!r}, **{options!r})"
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        [sys.executable, "-c", command], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        output = b""
        try:
            while chunk := os.read(master, 1 << 16):
                output += chunk
        except OSError:  # Linux raises this when the other end is closed
            pass
        assert process.wait(timeout=60) == 0, output.decode()
    os.close(master)
    return output.decode().replace("\r", "")


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_nothing_is_lost_on_a_terminal_of_any_width(columns):
    figures = ["123,456", "1.234", "[bold]5"]
    text = on_terminal([["name", "figure", "rate", "last"], *([name, *figures] for name in NAMES)], columns)
    joined = "".join(text.split())
    for cell in figures:
        assert joined.count(cell) == 2
    for name in NAMES:
        assert all(joined.count(character) >= name.count(character) for character in set(name))


def test_a_terminal_gets_a_bold_head_and_user_text_is_not_obeyed():
    text = on_terminal(ROWS, 80)
    assert text.startswith("\x1b[1mcategory") and "[red]web[/red] :smile: ␛[31m" in text and "\x1b[31m" not in text
    assert "\x1b[1m" not in on_terminal(ROWS, 80, has_header=False)
