"""Log lines only from rank 0; a bar on a terminal, plain lines elsewhere."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from colossal_llama2 import launcher, logs
from colossal_llama2.launcher import Place

ROOT = Path(__file__).resolve().parents[1]
COUNT_TO_FIVE = (
    "from colossal_llama2 import logs\n"
    "logs.configure_logging()\n"
    "logs.get_logger().info('before')\n"
    "with logs.progress(total=5, description='counting', unit='rows') as shown:\n"
    "    for _ in range(5):\n"
    "        shown.update(1, loss='1.25')\n"
)
# The bar of a training run, with more figures than fit beside it, and a log line in the middle.
TRAIN = (
    "from colossal_llama2 import logs\n"
    "from colossal_llama2.train.report.reporter import BAR_FORMAT, shown\n"
    "logs.configure_logging()\n"
    "record = dict(loss=2.83912, lr=9.7e-05, grad_norm=0.4117, tokens_per_second=1234567.0, epoch=0, bucket=3)\n"
    "record.update(mfu=0.43, padding_share=0.011, memory_bytes=2**36)\n"
    "place = dict(total=200000, initial=123450)\n"
    "with logs.progress(**place, description='train', unit='step', bar_format=BAR_FORMAT) as bar:\n"
    "    for step in range(3):\n"
    "        bar.update(**shown(record))\n"
    "        logs.get_logger().info('saved')\n"
)


@pytest.fixture
def logger(monkeypatch):
    """The suite's logger, in a plain process; its state is restored."""
    monkeypatch.setattr(launcher, "_settled", None)
    found = logs.get_logger()
    state = (found.handlers[:], found.level, found.propagate)
    found.handlers = []
    yield found
    found.handlers, found.level, found.propagate = state


def count_to_five(**environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", COUNT_TO_FIVE],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def on_a_terminal(program: str, columns: int) -> str:
    """Run a program with a pseudo-terminal as its stderr; returns what the terminal received."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))  # a new one has no width, and tqdm draws as much as fits
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        received = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux's error when the other end is closed
                break
            if not piece:
                break
            received += piece
    os.close(ours)
    assert process.returncode == 0
    return received.decode()


def test_a_terminal_gets_a_bar():
    received = on_a_terminal(COUNT_TO_FIVE, 100)
    assert "before" in received
    assert "counting: 100%" in received and "5/5" in received and "loss=1.25" in received
    assert "\r" in received.replace("\r\n", "")


@pytest.mark.parametrize("columns", [80, 180])
def test_a_training_bar_never_wraps_and_lines_stand_alone(columns):
    received = on_a_terminal(TRAIN, columns).replace("\r\n", "\r").split("\r")
    bars = [line for line in received if line.startswith("train 1234")]
    assert bars and all(len(line) < columns for line in received)
    assert all("loss=2.8391, lr=9.70e-05" in line and len(line.split("|")[1]) >= 10 for line in bars[1:])
    assert ("epoch=0, bucket=3, MFU=43.0%, padding=1.1%, memory=64.0 GiB" in bars[-1]) is (columns == 180)
    # A bar is removed before a line is written, and drawn again after it.
    assert sum(line.endswith("| saved") and line[2] == ":" for line in received) == 3


def test_a_file_gets_plain_lines():
    process = count_to_five()
    assert process.stdout == ""
    assert "\r" not in process.stderr
    first, last = process.stderr.splitlines()
    assert first.endswith("| before")
    assert "counting: 5/5 rows | " in last and "rows/s" in last and last.endswith("loss 1.25")


def test_other_ranks_are_silent(monkeypatch, logger, capsys):
    monkeypatch.setattr(launcher, "_settled", Place(rank=1, local_rank=1, world_size=2))
    exec(COUNT_TO_FIVE)
    assert capsys.readouterr() == ("", "")


def test_a_command_without_a_launcher_logs_even_with_the_variables_of_a_job():
    names = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"}
    process = count_to_five(**names)
    assert process.returncode == 0 and "counting: 5/5 rows" in process.stderr


@pytest.mark.parametrize("columns, fewest", [(80, 2), (120, 5)])
def test_a_bar_has_ten_cells_and_the_most_important_figures(columns, fewest, monkeypatch, capsys):
    from colossal_llama2.train.report.reporter import BAR_FORMAT, shown

    monkeypatch.setattr(logs.shutil, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    record = {
        "loss": 2.345678,
        "lr": 1e-4,
        "grad_norm": 1.2345,
        "tokens_per_second": 123456.0,
        "epoch": 0,
        "bucket": 3,
        "mfu": 0.4123,
        "padding_share": 0.0123,
        "memory_bytes": 60e9,
    }
    figures = shown(record)
    bar = logs.BarProgress(
        total=125_000, description="train", unit="step", initial=9_998, unit_scale=False, bar_format=BAR_FORMAT
    )
    bar._bar.ncols = columns
    for _ in range(3):
        bar.update(**figures)
        line = str(bar._bar)
        assert len(line) <= columns
        cells = line.split("|")[1]
        assert len(cells) >= 10, line
        names = re.findall(r"(\S+)=", line)
        assert names == list(figures)[: len(names)] and len(names) >= fewest, line
    bar.close()


def test_other_ranks_still_log_errors(logger, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_settled", Place(rank=3, local_rank=3, world_size=4))
    logs.configure_logging()
    logger.info("nobody needs this twice")
    logger.error("this one is broken")
    assert capsys.readouterr().err.splitlines()[0].endswith("| ERROR: this one is broken")


def test_configuring_twice_logs_each_message_once(logger, capsys):
    logs.configure_logging()
    logs.configure_logging()
    logger.info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(logger.handlers) == 1 and logger.level == logging.INFO


def test_lines_come_at_the_interval_with_rate_and_time_left(logger, monkeypatch, capsys):
    logs.configure_logging()
    clock = FakeClock()
    monkeypatch.setattr(logs.time, "monotonic", clock)
    shown = logs.progress(total=100, description="training", unit="steps", initial=20)
    for _ in range(4):
        clock.now += 10.0
        shown.update(10, loss="2.0")
    lines = [line.split(" | ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "training: 40/100 steps | 1.0 steps/s | 60 s left | loss 2.0",
        "training: 60/100 steps | 1.0 steps/s | 40 s left | loss 2.0",
    ]


def test_an_unknown_total_promises_no_end(logger, monkeypatch, capsys):
    logs.configure_logging()
    clock = FakeClock()
    monkeypatch.setattr(logs.time, "monotonic", clock)
    with logs.progress(total=None, description="reading", unit="lines") as shown:
        clock.now += 2.0
        shown.update(3000)
    assert capsys.readouterr().err.strip().endswith("| reading: 3,000 lines | 1,500.0 lines/s")


class FakeClock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("count", "expected"),
    [(5, "5.0 B/s"), (8_525, "8.5 kB/s"), (852_482_645, "852.5 MB/s"), (7 * 10**12, "7,000.0 GB/s")],
)
def test_rates_of_bytes_have_prefixes(monkeypatch, caplog, count, expected):
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(logging.getLogger("colossal_llama2"), "propagate", True)
    display = logs.LineProgress(total=None, description="read", unit="B", initial=0, unit_scale=True)
    with caplog.at_level("INFO"):
        display._count = count
        display.close()
    assert expected in caplog.text
