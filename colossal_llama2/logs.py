"""Output of a running command: log lines and progress bars, from rank 0 only.

A terminal gets a tqdm bar; anything else (a file, a pipe, CI) gets a plain line now and then, never carriage returns.
"""

import contextlib
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from colossal_llama2.launcher import place
from colossal_llama2.terminal_text import one_line, printable

PLAIN_LINE_SECONDS = 15.0
# Times in a bar are unknown at first and become longer.
SPARE_CELLS = 5


def is_first_rank() -> bool:
    """True in a single process and on rank 0 of a launched job."""
    return place().rank == 0


def get_logger() -> logging.Logger:
    """The logger of this package, which `configure_logging` sets up."""
    return logging.getLogger("colossal_llama2")


def configure_logging() -> None:
    """Send this package's log lines to stderr: all of them from rank 0, only errors from the others.

    From now on, messages of libraries are escaped too: they may quote files that others wrote.
    """
    logging.setLogRecordFactory(_PrintableRecord)
    if not isinstance(warnings.formatwarning, _PrintableWarnings):
        warnings.formatwarning = _PrintableWarnings(warnings.formatwarning)
    logger = get_logger()
    if not logger.handlers:
        handler = _LinesAboveBars(sys.stderr)
        handler.setFormatter(_OneLineFormatter("%(asctime)s | %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    logger.propagate = False


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


class _PrintableWarnings:
    def __init__(self, plain: Callable[..., str]):
        self._plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return printable(self._plain(*args, **kwargs))


class _OneLineFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        # A warning must stand out among informational lines.
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class _LinesAboveBars(logging.StreamHandler):
    """Hides progress bars while a line is written, so that the line does not end up beside one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with tqdm.external_write_mode(file=self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)


class SilentProgress:
    """A progress display that shows nothing, for every rank except the first."""

    def update(self, count: int = 1, /, **figures: str) -> None:
        """Advance by `count` units and show `figures` beside the bar."""

    def close(self) -> None:
        """End the display."""

    def __enter__(self) -> "SilentProgress":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def abandon(self) -> None:
        """End the display of a job that failed, without a last line: only the error is reported."""


class BarProgress(SilentProgress):
    """A tqdm bar on a terminal. On a narrow one, the last figures beside the bar are left out."""

    def __init__(
        self,
        *,
        total: int | None,
        description: str,
        unit: str,
        initial: int,
        unit_scale: bool,
        bar_format: str | None = None,
    ):
        from tqdm import tqdm

        # A terminal that reports no columns (as in some containers) would get an empty bar.
        width_is_known = shutil.get_terminal_size((0, 0)).columns > 0
        self._bar = tqdm(
            total=total,
            desc=one_line(description),
            unit=unit,
            initial=initial,
            unit_scale=unit_scale,
            bar_format=bar_format,
            dynamic_ncols=width_is_known,
            ncols=None if width_is_known else 80,
        )

    def update(self, count: int = 1, /, **figures: str) -> None:
        if figures:
            self._show_what_fits([f"{name}={one_line(value)}" for name, value in figures.items()], count)
        self._bar.update(count)

    def _show_what_fits(self, figures: list[str], count: int) -> None:
        """Show as many of the figures, in order of importance, as fit beside a bar of ten cells."""
        for kept in range(len(figures), -1, -1):
            self._bar.set_postfix_str(", ".join(figures[:kept]), refresh=False)
            layout = self._bar.format_dict
            # Without a width, tqdm draws ten cells.
            least = self._bar.format_meter(**{**layout, "n": layout["n"] + count, "ncols": None})
            if not layout["ncols"] or len(least) + SPARE_CELLS <= layout["ncols"]:
                return

    def close(self) -> None:
        self._bar.close()

    abandon = close


class LineProgress(SilentProgress):
    """One log line every `PLAIN_LINE_SECONDS`, and one at the end."""

    def __init__(self, *, total: int | None, description: str, unit: str, initial: int, unit_scale: bool):
        self._total, self._description, self._unit, self._scaled = total, description, unit, unit_scale
        self._start_count = self._count = initial
        self._start = time.monotonic()
        self._last_line = self._start
        self._logged_count: int | None = None
        self._figures: dict = {}

    def update(self, count: int = 1, /, **figures: str) -> None:
        self._count += count
        self._figures = figures or self._figures
        if time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._log()

    def close(self) -> None:
        if self._count != self._logged_count:
            self._log()

    def _log(self) -> None:
        now = time.monotonic()
        self._last_line, self._logged_count = now, self._count
        rate = (self._count - self._start_count) / max(now - self._start, 1e-9)
        of_total = f"/{self._total:,}" if self._total is not None else ""
        parts = [f"{self._description}: {self._count:,}{of_total} {self._unit}", f"{self._scale(rate)}{self._unit}/s"]
        if self._total is not None and 0 < rate and self._count < self._total:
            parts.append(f"{(self._total - self._count) / rate:,.0f} s left")
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        get_logger().info(" | ".join(parts))

    def _scale(self, rate: float) -> str:
        """A rate up to its unit: "852.5 M" before "B/s" if the unit is scaled, else "3.8 " before "step/s"."""
        if not self._scaled:
            return f"{rate:,.1f} "
        for prefix in ("", "k", "M"):
            if rate < 1000:
                return f"{rate:.1f} {prefix}"
            rate /= 1000
        return f"{rate:,.1f} G"


def progress(
    *,
    total: int | None,
    description: str,
    unit: str,
    initial: int = 0,
    unit_scale: bool = False,
    bar_format: str | None = None,
) -> SilentProgress:
    """A progress display for `total` units (None: unknown) that suits stderr and this process's rank.

    `bar_format` is tqdm's, for a bar with many figures.
    """
    if not is_first_rank():
        return SilentProgress()
    if sys.stderr.isatty():
        return BarProgress(
            total=total,
            description=description,
            unit=unit,
            initial=initial,
            unit_scale=unit_scale,
            bar_format=bar_format,
        )
    return LineProgress(total=total, description=description, unit=unit, initial=initial, unit_scale=unit_scale)
